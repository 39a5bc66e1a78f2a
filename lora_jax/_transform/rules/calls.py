"""Calls and branches with adapted kernels, rebuilt by calling the public function again.

`jax.jit`, `jax.checkpoint`, `lax.switch` and others count operands and propagate gradients themselves, so no parameter
of an equation is edited here. A kernel is an argument, and may be a result, as a pytree.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax import Array, lax

from ..._compat import ClosedJaxpr, compute_on, is_unspecified, primitives
from ..._core.kernel import TrackedKernel
from ..cache import cached
from ..interpreter import NoRule, Site, Value, interpret
from ..placement import value_shardings
from ..registry import rule


@rule(primitives.jit_p, "rebuilt")
def _jit(
    site: Site,
    *operands: Value,
    jaxpr: ClosedJaxpr,
    in_shardings: Sequence[Any],
    out_shardings: Sequence[Any],
    in_layouts: Sequence[Any],
    out_layouts: Sequence[Any],
    donated_invars: Sequence[bool],
    ctx_mesh: Any,
    name: str,
    keep_unused: bool,
    inline: bool,
    compiler_options_kvs: Sequence[tuple[str, Any]],
) -> list[Value]:
    """`jax.jit`, with shardings for the factors; a kernel is not donated."""
    del ctx_mesh  # set by the context of the equation
    if any(layout is not None for layout in (*in_layouts, *out_layouts)):
        raise NoRule("a jit with layouts")
    specified = [None if is_unspecified(sharding) else sharding for sharding in (*in_shardings, *out_shardings)]
    of_operands, of_results = specified[: len(operands)], specified[len(operands) :]
    if any(of_results):
        unlogged = dataclasses.replace(site.settings, log=None)
        results = jax.eval_shape(lambda *operands: interpret(unlogged, jaxpr.jaxpr, jaxpr.consts, operands), *operands)
        of_results = list(map(value_shardings, results, of_results))

    options: dict[str, Any] = dict(
        in_shardings=_or_none(map(value_shardings, operands, of_operands)),
        out_shardings=_or_none(of_results),
        # The base and the adapter belong to the caller, who uses them again.
        donate_argnums=tuple(
            number
            for number, (x, donated) in enumerate(zip(operands, donated_invars, strict=True))
            if donated and not isinstance(x, TrackedKernel)
        ),
        keep_unused=keep_unused,
        inline=inline,
    )

    def run(*operands: Value) -> tuple[Value, ...]:
        # A tuple, because the results must have the tree structure of the shardings.
        return tuple(site.interpret(jaxpr, operands))

    def build() -> Callable[..., Any]:
        run.__name__ = run.__qualname__ = name  # profiles show the model's name
        return jax.jit(run, compiler_options=dict(compiler_options_kvs) or None, **options)

    key = (jaxpr, name, tuple(compiler_options_kvs), *options.items())
    function = site.settings.cached_function(key, build) or build()
    return list(function(*operands))


def _or_none(shardings: Iterable[Any]) -> tuple[Any, ...] | None:
    """Returns the shardings, or None if none is specified."""
    shardings = tuple(shardings)
    return None if all(sharding is None for sharding in shardings) else shardings


@rule(primitives.remat_p, "rebuilt")
def _remat(
    site: Site, *operands: Value, jaxpr: ClosedJaxpr, prevent_cse: Any, differentiated: bool, policy: Any
) -> list[Value]:
    """`jax.checkpoint` with its policy."""

    def run(*operands: Value) -> list[Value]:
        if differentiated and prevent_cse:
            # The recomputation in a gradient inside the model, which must not be merged with the first evaluation.
            operands = lax.optimization_barrier(operands)
        return site.interpret(jaxpr, operands)

    return jax.checkpoint(run, prevent_cse=prevent_cse, policy=policy)(*operands)


@rule(primitives.closed_call_p, "rebuilt")
def _closed_call(site: Site, *operands: Value, call_jaxpr: ClosedJaxpr) -> list[Value]:
    """The called function."""
    return site.interpret(call_jaxpr, operands)


@rule("compute_on", "rebuilt")
def _compute_on(
    site: Site,
    *operands: Value,
    jaxpr: ClosedJaxpr,
    compute_type: str,
    out_memory_spaces: Sequence[Any],
    compiler_options_json: str | None,
) -> list[Value]:
    """`compute_on`, also for the products of the factors; a kernel as its result is refused."""

    def run(*operands: Value) -> tuple[Array, ...]:
        return tuple(site.to_array(out, "`compute_on` returns the kernel") for out in site.interpret(jaxpr, operands))

    options = None if compiler_options_json is None else json.loads(compiler_options_json)
    call = compute_on(
        run, compute_type=compute_type, out_memory_spaces=tuple(out_memory_spaces), compiler_options=options
    )
    return list(call(*operands))


@rule(primitives.cond_p, "rebuilt")
@cached
def _cond(
    site: Site, index: Value, *operands: Value, branches: Sequence[ClosedJaxpr], branches_platforms: Any
) -> list[Value]:
    """`lax.switch` or `lax.platform_dependent`; a kernel as the result of a branch is refused."""

    def run(branch: ClosedJaxpr, *operands: Value) -> list[Array]:
        # Branches must return the same types, and another branch may return an array here.
        return [site.to_array(out, "a branch returns the kernel itself") for out in site.interpret(branch, operands)]

    calls = [functools.partial(run, branch) for branch in branches]
    if branches_platforms is None:
        return lax.switch(site.to_array(index, "the kernel chooses the branch"), calls, *operands)
    # `lax.platform_dependent` chooses the branch when the program is compiled.
    default = [call for call, platforms in zip(calls, branches_platforms, strict=True) if platforms is None]
    named = {
        platform: call
        for call, platforms in zip(calls, branches_platforms, strict=True)
        for platform in platforms or ()
    }
    return lax.platform_dependent(*operands, default=default[0] if default else None, **named)
