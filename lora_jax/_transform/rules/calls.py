"""Calls and branches around adapted kernels, rebuilt by calling the public function again.

`jax.jit`, `jax.checkpoint`, `lax.switch` and the others count operands and carry gradients themselves, so no parameter
of an equation is edited here. A kernel goes in, and may come out, as the pytree that it is.
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
from ..placement import shardings
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
    """`jax.jit`, its shardings for the factors too; a kernel is not donated."""
    del ctx_mesh  # the equation's own context brings the mesh back
    if any(layout is not None for layout in (*in_layouts, *out_layouts)):
        raise NoRule("a jit that asks for layouts")
    asked = [None if is_unspecified(sharding) else sharding for sharding in (*in_shardings, *out_shardings)]
    into, out = asked[: len(operands)], asked[len(operands) :]
    if any(out):
        unwatched = dataclasses.replace(site.settings, log=None)
        results = jax.eval_shape(lambda *operands: interpret(unwatched, jaxpr.jaxpr, jaxpr.consts, operands), *operands)
        out = list(map(shardings, results, out))

    options: dict[str, Any] = dict(
        in_shardings=_or_none(map(shardings, operands, into)),
        out_shardings=_or_none(out),
        # What is adapted is the caller's, to be used again: a kernel is not given away, nor are its factors.
        donate_argnums=tuple(
            number
            for number, (x, donated) in enumerate(zip(operands, donated_invars, strict=True))
            if donated and not isinstance(x, TrackedKernel)
        ),
        keep_unused=keep_unused,
        inline=inline,
    )

    def run(*operands: Value) -> tuple[Value, ...]:
        # A tuple, as the shardings are: they must have the same structure.
        return tuple(site.interpret(jaxpr, operands))

    def build() -> Callable[..., Any]:
        run.__name__ = run.__qualname__ = name  # profiles show the model's name
        return jax.jit(run, compiler_options=dict(compiler_options_kvs) or None, **options)

    function = site.settings.rebuilt((jaxpr, name, tuple(compiler_options_kvs), *options.items()), build) or build()
    return list(function(*operands))


def _or_none(asked: Iterable[Any]) -> tuple[Any, ...] | None:
    """None, if no sharding is asked for."""
    every = tuple(asked)
    return None if all(sharding is None for sharding in every) else every


@rule(primitives.remat_p, "rebuilt")
def _remat(
    site: Site, *operands: Value, jaxpr: ClosedJaxpr, prevent_cse: Any, differentiated: bool, policy: Any
) -> list[Value]:
    """`jax.checkpoint` with its policy."""

    def run(*operands: Value) -> list[Value]:
        if differentiated and prevent_cse:
            # A gradient taken inside the model: this is the second evaluation, which must not merge with the first.
            operands = lax.optimization_barrier(operands)
        return site.interpret(jaxpr, operands)

    return jax.checkpoint(run, prevent_cse=prevent_cse, policy=policy)(*operands)


@rule(primitives.closed_call_p, "rebuilt")
def _closed_call(site: Site, *operands: Value, call_jaxpr: ClosedJaxpr) -> list[Value]:
    """The function in the call."""
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
    """`compute_on`: the factors' products are computed there too; a kernel that it returns is refused."""

    def run(*operands: Value) -> tuple[Array, ...]:
        return tuple(site.array(out, "`compute_on` returns the kernel") for out in site.interpret(jaxpr, operands))

    options = None if compiler_options_json is None else json.loads(compiler_options_json)
    where = compute_on(
        run, compute_type=compute_type, out_memory_spaces=tuple(out_memory_spaces), compiler_options=options
    )
    return list(where(*operands))


@rule(primitives.cond_p, "rebuilt")
@cached
def _cond(
    site: Site, index: Value, *operands: Value, branches: Sequence[ClosedJaxpr], branches_platforms: Any
) -> list[Value]:
    """`lax.switch` or `lax.platform_dependent`; a branch that returns the kernel is refused."""

    def run(branch: ClosedJaxpr, *operands: Value) -> list[Array]:
        # Branches agree on what they return; only one of them may have an adapted kernel there.
        return [site.array(out, "a branch returns the kernel itself") for out in site.interpret(branch, operands)]

    calls = [functools.partial(run, branch) for branch in branches]
    if branches_platforms is None:
        return lax.switch(site.array(index, "the kernel chooses the branch"), calls, *operands)
    # `lax.platform_dependent`: the platform chooses, when the program is compiled for it.
    default = [call for call, platforms in zip(calls, branches_platforms, strict=True) if platforms is None]
    named = {
        platform: call
        for call, platforms in zip(calls, branches_platforms, strict=True)
        for platform in platforms or ()
    }
    return lax.platform_dependent(*operands, default=default[0] if default else None, **named)
