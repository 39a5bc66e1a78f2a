"""Compares programs with adapted kernels with the same programs with merged kernels, in float64, and counts them."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import chex
import fuzz
import fuzz_program as fp
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from evaluate import without_compiling
from helpers import FORWARD, GRADIENT, dense
from law import total

import lora_jax as lj
from lora_jax._transform import registry as registry

VARIANTS = {"LoRA": lj.LoRA, "RSLoRA": lj.RSLoRA}
Function = Callable[..., Any]


def normal(shape: fp.Shape, seed: int, size: float) -> np.ndarray:
    return size * np.random.default_rng(seed).standard_normal(shape)


def arguments(program: fp.Program) -> tuple[Any, ...]:
    """Parameters, adapter, x and the traced number."""
    params, adapter = {}, {}
    for number, (name, leaf) in enumerate(program.leaves):
        params[name] = normal(leaf.shape, number, 0.5)
        if leaf.variant is not None:
            variant = lj.Full() if leaf.variant == "Full" else VARIANTS[leaf.variant](rank=leaf.rank, alpha=1.5)
            axes = leaf.axes if variant.needs_axes else ""
            shapes = enumerate(variant.shapes(leaf.shape, axes).items(), 100 + 10 * number)
            adapter[name] = lj.Adapter(
                variant, axes, **{key: normal(shape, seed, 0.4) for seed, (key, shape) in shapes}
            )
    return params, adapter, normal(program.x, 50, 1.0), np.int32(1)


# What is compared. Each function returns values, compared as forward results, and values compared as gradients.


def forward(function: Function, params: Any, adapter: Any, x: Any, number: Any) -> Any:
    return function(params, adapter, x, number), ()


def gradient(function: Function, params: Any, adapter: Any, x: Any, number: Any) -> Any:
    def run(adapter: Any, x: Any) -> Any:
        out = function(params, adapter, x, number)
        return total(out), out

    gradients, out = jax.grad(run, (0, 1), has_aux=True)(adapter, x)
    return out, gradients


def jvp(function: Function, params: Any, adapter: Any, x: Any, number: Any) -> Any:
    return jax.jvp(lambda adapter, x: function(params, adapter, x, number), (adapter, x), direction(adapter, x))


def second(function: Function, params: Any, adapter: Any, x: Any, number: Any) -> Any:
    """The derivative of the gradient along a direction."""

    def first(adapter: Any, x: Any) -> Any:
        return gradient(function, params, adapter, x, number)[1]

    return (), jax.jvp(first, (adapter, x), direction(adapter, x))


def second_in_reverse(function: Function, params: Any, adapter: Any, x: Any, number: Any) -> Any:
    """The gradient of the directional derivative."""
    along = direction(adapter, x)[0]

    def slope(adapter: Any) -> Any:
        gradients = gradient(function, params, adapter, x, number)[1][0]
        return sum(jax.tree.leaves(jax.tree.map(lambda one, other: (one * other).sum(), gradients, along)))

    return (), jax.grad(slope)(adapter)


def over_x(function: Function, params: Any, adapter: Any, x: Any, number: Any) -> Any:
    return jax.vmap(lambda x: function(params, adapter, x, number))(jnp.stack([x, -x])), ()


def over_adapter(function: Function, params: Any, adapter: Any, x: Any, number: Any) -> Any:
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf / 2]), adapter)
    return jax.vmap(lambda adapter: function(params, adapter, x, number))(two), ()


def direction(*trees: Any) -> Any:
    leaves, treedef = jax.tree.flatten(trees)
    return treedef.unflatten([jnp.asarray(normal(leaf.shape, 200 + seed, 1.0)) for seed, leaf in enumerate(leaves)])


UNDER: dict[str, Function] = {
    function.__name__: function
    for function in (forward, gradient, jvp, second, second_in_reverse, over_x, over_adapter)
}


class BeyondJaxError(Exception):
    """JAX does not support the program with merged kernels."""


FORMS = ("factored", "factored", "hybrid", "merged", None)


def digest(program: fp.Program) -> int:
    return int.from_bytes(hashlib.blake2b(repr(program).encode(), digest_size=8).digest())


def form_of(program: fp.Program) -> Any:
    """The form in which a program is run: mostly factored, because rules define that form."""
    return FORMS[digest(program) % len(FORMS)]


def compare(program: fp.Program) -> tuple[Any, Any]:
    """The results with adapted kernels and with merged kernels."""
    args, under = jax.tree.map(jnp.asarray, arguments(program)), UNDER.get(program.under, gradient)

    def compute(*args: Any) -> Any:
        try:
            expected = under(dense(program.apply), *args)
        except NotImplementedError as error:
            raise BeyondJaxError from error
        return under(lj.lora(program.apply, form=form_of(program)), *args), expected

    if program.under == "eager":
        return compute(*args)
    if program.under == "jit":
        return jax.jit(compute)(*args)
    return without_compiling(compute)(*args)


@dataclasses.dataclass
class Count:
    """What has been run: the programs, refusals and rules by primitive, steps, comparisons and forms."""

    programs: set[int] = dataclasses.field(default_factory=set)
    run: int = 0
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    rules: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    steps: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    under: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    forms: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add_program(self, program: fp.Program, steps: Sequence[Any]) -> None:
        self.run += 1
        self.programs.add(digest(program))
        self.forms[str(form_of(program))] += 1
        self.steps.update(type(step).__name__ for step in steps)
        self.under[program.under] += 1

    def add(self, other: Count) -> None:
        self.programs |= other.programs
        self.run += other.run
        for name in ("refused", "rules", "steps", "under", "forms"):
            getattr(self, name).update(getattr(other, name))

    def __str__(self) -> str:
        lines = [f"{self.run} programs, {len(self.programs)} distinct"]
        for name in ("under", "forms", "refused", "rules", "steps"):
            counts = getattr(self, name).most_common()
            lines.append(f"{name}: " + ", ".join(f"{key} {number}" for key, number in counts))
        return "\n".join(lines)


def assert_program(program: fp.Program, count: Count | None = None) -> None:
    """Checks the law for a program or, if a step has no rule, that the error names the primitive and a kernel."""
    steps = fp.steps_of(program)
    opaque = next((step for step in steps if isinstance(step, fp.Opaque)), None)
    count = Count() if count is None else count
    try:
        with jax.enable_x64(True):
            got, expected = compare(program)
    except BeyondJaxError:
        return
    except lj.UnsupportedError as error:
        assert opaque is not None, f"refused, though all its steps have rules: {error}"
        assert f"`{opaque.how}`" in error.what, f"refused, but not at `{opaque.how}`: {error}"
        assert any(repr(name) in error.what for name, _ in program.leaves), error
        count.add_program(program, steps)
        count.refused[opaque.how] += 1
        return
    count.add_program(program, steps)
    assert opaque is None, f"not refused at {opaque}"
    dtype = "float32" if any(isinstance(step, fp.Cast) for step in steps) else None
    assert_close(got, expected, dtype or "float64")


def assert_close(got: Any, expected: Any, dtype: str) -> None:
    """Compares by the table of tolerances, relative to the largest element of a leaf.

    The terms of a sum may cancel. A leaf that is nearly zero is therefore compared relative to a fraction of the
    largest element of all leaves, or of 1, the size of the inputs.
    """
    share = {"float64": 1e-3, "float32": 1e-1}[dtype]
    sizes = [np.max(np.abs(leaf), initial=0.0) for leaf in jax.tree.leaves(expected)]
    assert np.all(np.isfinite(sizes)), "the oracle is not finite"
    for one, other, table in zip(got, expected, (FORWARD, GRADIENT), strict=True):
        chex.assert_trees_all_equal_shapes_and_dtypes(one, other)
        for got_leaf, expected_leaf in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            size = max(np.max(np.abs(expected_leaf), initial=0.0), share * max(1.0, *sizes))
            np.testing.assert_allclose(got_leaf, expected_leaf, rtol=0, atol=table[dtype] * size)


class ProgramError(AssertionError):
    """A program that fails, with its error."""


class CountedRules(dict[str, Any]):
    """The registry of rules, which counts lookups."""

    def __init__(self, rules: Any, counts: collections.Counter[str]) -> None:
        super().__init__(rules)
        self.counts = counts

    def __getitem__(self, name: str) -> Any:
        self.counts[name] += 1
        return super().__getitem__(name)


def fuzz_programs(seed: int, programs: int) -> Count:
    """Runs and counts the programs of a seed; raises for the smallest one that fails."""
    count = Count()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=programs,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
    )
    @hypothesis.given(fuzz.programs)
    def run(program: fp.Program) -> None:
        try:
            assert_program(program, count)
        except Exception as error:
            raise ProgramError(f"{program!r}\n{type(error).__name__}: {error}") from error

    rules, registry.RULES = registry.RULES, CountedRules(registry.RULES, count.rules)
    try:
        run()
    finally:
        registry.RULES = rules
    return count
