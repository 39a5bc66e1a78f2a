"""The table to read before a run: what is trained, how the model consumes it, what it costs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from .._core.adapter import Adapter, Adapters
from .._core.attach import attach, check
from .._core.base import base_of
from .._core.kernel import PlainKernel
from .._core.paths import Pattern, flatten
from .._core.uses import Use
from .._core.variant import LowRank
from .._errors import AdapterError, listed, refuse_keywords
from .._transform.contraction.costs import FormName
from .._transform.kernels import find_kernels, group_by_path, roles_agree
from .._transform.kinds import kinds
from .._transform.program import Program, collect_uses, trace
from .._transform.refusal import Refusal, materializable_paths, refusal_error
from .._transform.settings import CustomDerivatives, make_settings
from ..sharding import placements
from .explanation import Explanation, Row
from .flops import flops


def explain(
    apply: Callable[..., Any],
    params: Any,
    adapter: Adapters,
    /,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    strict: bool = False,
    materialize: Sequence[Pattern] = (),
    custom_derivatives: CustomDerivatives = "refuse",
    form: FormName | None = None,
    tx: Any = None,
    shardings: Any = None,
    **unexpected: Any,
) -> Explanation:
    """Says for each adapted leaf how the model consumes it, and what it costs; nothing is evaluated.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.ones((64, 32))}
    >>> apply = lambda params, x: x @ params["kernel"]
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> print(lj.explain(apply, params, adapter, jnp.ones((8, 64))))
    path    shape  axes  kind  variant  rank  scale  used                     trainable  of base  operations
    ──────  ─────  ────  ────  ───────  ────  ─────  ───────────────────────  ─────────  ───────  ──────────
    kernel  64×32  io    head  LoRA        2      2  factored dot_general ×1        192   9.375%       3,344
    <BLANKLINE>
    trainable: 192 numbers, 9.375% of the base's 2,048
    memory:    adapter 768 B, optimizer 1.5 kB (two moments, as Adam keeps)
    forward:   3,344 operations more, 10.21% of the base's 32,768

    Args:
      apply: the model, `apply(params, *args, **kwargs)`.
      params: the parameter tree, or its shapes and dtypes.
      adapter: from `init`.
      *args: the model's positional arguments; arrays may be `ShapeDtypeStruct`s.
      kwargs: the model's keyword arguments, likewise.
      strict: raise if a leaf of the adapter is never used, if its axes are not those of the traced model, or if `lora`
        would refuse it.
      materialize: as given to `lora`.
      custom_derivatives: as given to `lora`.
      form: as given to `lora`.
      tx: the optax optimizer whose state to count; otherwise two moments of each number, as Adam keeps.
      shardings: of `params`, as `sharding.like_base` takes them: then it also says where each array goes.
      **unexpected: none; the model's keyword arguments are in `kwargs`.

    Returns:
      An `Explanation`, to print.

    Raises:
      TypeError: for a keyword argument that is not in `kwargs`.
      AdapterError: if the adapter does not fit, or the shardings; with `strict`, if the function never uses some of
        its leaves, or gives their axes other roles.
      UnsupportedError: with `strict`, where `lora` would raise it. Otherwise what it would refuse is in the table, as
        `refused`, and below it the list for `materialize`.
    """
    refuse_keywords("explain", unexpected)
    check(flatten(params)[0], adapter)  # first: with swapped arguments the trace would fail somewhere in the model
    program = trace(apply, params, args, kwargs or {})
    leaves = program.param_arrays
    kernels = attach(leaves, {path: part for path, part in adapter.items() if part.variant.needs_axes})
    # A leaf that is trained as a whole has no factors; what stands for it tells whether and where it is used.
    whole = {path: PlainKernel.of(path, base_of(leaves[path])) for path in adapter if path not in kernels}
    refusals: list[Refusal] = []
    settings = make_settings(
        materialize=materialize, custom_derivatives=custom_derivatives, form=form, refusals=refusals
    )
    uses = group_by_path(collect_uses(program, kernels | whole, settings))
    if strict and refusals:
        raise refusal_error(refusals)
    given = flatten(shardings)[0]
    places = {} if shardings is None else {path: placements(path, part, given) for path, part in adapter.items()}
    facts = _Facts(
        uses, _prepared(adapter, leaves), kinds(program.jaxpr, list(leaves)), _traced(program, adapter, uses)
    )
    rows = tuple(_row(path, part, leaves[path], facts, places.get(path)) for path, part in adapter.items())
    unused = [row.path for row in rows if row.used == _NEVER]
    if strict and unused:
        raise AdapterError(
            f"Expected the function to use every leaf of the adapter; it never uses {len(unused)} of {len(rows)}.\n"
            f"{listed(unused)}\n  Take them out of the spec, or check that this is the function that is trained."
        )
    if strict and facts.traced:
        differ = [
            f"{path!r} has {adapter[path].axes!r}, the model uses it as {its!r}" for path, its in facts.traced.items()
        ]
        raise AdapterError(
            f"Expected the roles of the adapter's axes to be those of the traced model; {len(differ)} of {len(rows)} "
            f"leaves differ.\n{listed(differ)}\n"
            "  Make the adapter with init(..., kernels=lora_jax.kernels(apply, params, *args)), without `axes=`."
        )
    adapter_bytes = _bytes(adapter)
    return Explanation(
        rows,
        base_parameters=sum(math.prod(leaf.shape) for leaf in leaves.values()),
        base_flops=_flops_of(program),
        adapter_bytes=adapter_bytes,
        optimizer_bytes=2 * adapter_bytes if tx is None else _bytes(jax.eval_shape(tx.init, dict(adapter))),
        optimizer="two moments, as Adam keeps" if tx is None else "the state of `tx`",
        undivided=tuple(line for path, part in places.items() for line in _undivided(path, part, adapter[path])),
        refused=tuple(_refused(refusals)),
    )


_NEVER = "never used"


class _Facts(NamedTuple):
    """What is known of the leaves, by path: see `Row`."""

    uses: Mapping[str, Sequence[Use]]
    prepared: Mapping[str, int]
    kinds: Mapping[str, str | None]
    traced: Mapping[str, str]


def _row(path: str, part: Adapter, leaf: Any, facts: _Facts, places: Adapter | None) -> Row:
    variant, uses = part.variant, facts.uses.get(path, ())
    return Row(
        path,
        tuple(leaf.shape),
        part.axes,
        type(variant).__name__,
        rank=getattr(variant, "rank", None),
        scale=variant.scale if isinstance(variant, LowRank) else None,
        used=_used(uses, whole=not variant.needs_axes),
        parameters=sum(math.prod(array.shape) for array in part.arrays.values()),
        flops=facts.prepared[path] + sum(use.flops for use in uses),
        placed="" if places is None else _placed(part, places),
        kind=facts.kinds[path],
        traced=facts.traced.get(path, ""),
    )


def _prepared(adapter: Adapters, leaves: Mapping[str, Any]) -> dict[str, int]:
    """The operations before any use: the norms of DoRA, the random numbers of VeRA; traced once for equal leaves."""
    counts: dict[Any, int] = {}
    prepared = {}
    for path, part in adapter.items():
        shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), (leaves[path], part.arrays))
        alike = part.variant, part.axes, *jax.tree.leaves(shapes)
        if alike not in counts:
            apply = functools.partial(part.variant.apply, axes=part.axes, path=path)
            counts[alike] = flops(jax.make_jaxpr(apply)(*shapes))
        prepared[path] = counts[alike]
    return prepared


def _traced(program: Program, adapter: Adapters, uses: Mapping[str, Sequence[Use]]) -> dict[str, str]:
    """The roles that the model gives the axes of leaves, where they are others; looked at where a use is otherwise."""
    doubtful = [path for path, part in adapter.items() if any(_is_otherwise(use, part) for use in uses.get(path, ()))]
    found = find_kernels(program, doubtful) if doubtful else {}
    return {
        path: kernel.axes
        for path, kernel in found.items()
        if kernel.axes is not None and not roles_agree(adapter[path].axes, kernel.axes, kernel.shape)
    }


def _is_otherwise(use: Use, part: Adapter) -> bool:
    """Whether a use gives an axis another role than the adapter, or does not say, or has lost an axis to a loop."""
    if not part.variant.needs_axes:
        return False
    axes = use.axes or ()
    left = [label for label, _ in axes if label != "b"]
    return any(label != role for label, role in axes) or sorted(left) != sorted(part.axes.replace("b", ""))


def _placed(part: Adapter, places: Adapter) -> str:
    """Such as `a 64@fsdp×8, b 8×32@model`."""
    return ", ".join(
        f"{name} {'×'.join(map(_cut, array.shape, places.arrays[name].names))}" for name, array in part.arrays.items()
    )


def _cut(size: int, names: Sequence[str]) -> str:
    """As JAX writes it in a type."""
    along = f"({','.join(names)})" if len(names) > 1 else "".join(names)
    return f"{size}@{along}" if along else str(size)


def _undivided(path: str, places: Adapter, part: Adapter) -> Iterator[str]:
    for name, place in places.arrays.items():
        for axis, names in place.undivided.items():
            yield (
                f"{name} of {path!r} is whole along its axis of {part.arrays[name].shape[axis]}, "
                f"which the devices along {', '.join(map(repr, names))} do not divide"
            )


def _refused(refusals: Sequence[Refusal]) -> Iterator[str]:
    """Such as `lora` raises for 2 kernels; to materialize them: materialize=['a', 'b']."""
    listed = materializable_paths(refusals)
    strict = [path for refusal in refusals if not refusal.allowable for path in refusal.paths]
    if listed:
        yield f"`lora` raises an error for {len(listed)} leaves; to materialize them there: materialize={listed}"
    if strict:
        yield f"`lora` raises an error for {list(dict.fromkeys(strict))}: leave them out of the spec"


def _used(uses: Sequence[Use], *, whole: bool) -> str:
    """Such as `factored dot_general ×24, materialized mul ×1`."""
    times: dict[str, int] = {}
    for use in uses:
        name = f"{'whole' if whole else use.kind} {use.primitive}"
        times[name] = times.get(name, 0) + use.times
    return ", ".join(f"{name} ×{count}" for name, count in times.items()) or _NEVER


def _flops_of(program: Program) -> int | None:
    try:
        return flops(program.jaxpr)
    except NotImplementedError:
        return None


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
