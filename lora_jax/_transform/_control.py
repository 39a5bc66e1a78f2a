"""Control flow around adapted kernels, rebuilt by calling the public function again.

`jax.jit`, `jax.checkpoint`, `lax.scan` and the others count operands and carry gradients themselves, so no parameter of
an equation is edited here. A kernel goes in, and may come out, as the pytree that it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._adapter import AdaptedKernel
from .._axes import axes_of_a, axes_of_b
from .._compat import ClosedJaxpr, Jaxpr, JaxprEqn, is_unspecified, primitives
from ._interpreter import NoRule, Settings, Site, Value, interpret, rule

_ENDS = "the kernel decides when a loop ends"


@rule(primitives.jit_p)
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
    del ctx_mesh  # the equation's own context brings the mesh back
    if any(layout is not None for layout in (*in_layouts, *out_layouts)):
        raise NoRule("a jit that asks for layouts")
    for operand, sharding, donated in zip(operands, in_shardings, donated_invars, strict=True):
        if isinstance(operand, AdaptedKernel) and (donated or not is_unspecified(sharding)):
            raise NoRule("a jit that donates the kernel or gives it a sharding")
    if not all(map(is_unspecified, out_shardings)):
        unwatched = dataclasses.replace(site.settings, log=None)
        results = jax.eval_shape(lambda *operands: interpret(unwatched, jaxpr.jaxpr, jaxpr.consts, operands), *operands)
        for result, sharding in zip(results, out_shardings, strict=True):
            if isinstance(result, AdaptedKernel) and not is_unspecified(sharding):
                raise NoRule("a jit that returns the kernel with a sharding")

    # A watched body has to be traced each time, or the log would miss it.
    build = _jitted if site.settings.log is None else _jitted.__wrapped__
    return build(
        site.settings,
        site.times,
        jaxpr,
        name,
        in_shardings=_shardings(in_shardings),
        out_shardings=_shardings(out_shardings),
        donate_argnums=tuple(number for number, donated in enumerate(donated_invars) if donated),
        keep_unused=keep_unused,
        inline=inline,
        compiler_options=tuple(compiler_options_kvs),
    )(*operands)


@functools.lru_cache(maxsize=1024)
def _jitted(
    settings: Settings, times: int, jaxpr: ClosedJaxpr, name: str, *, compiler_options: Any, **options: Any
) -> Callable[..., Any]:
    """The rebuilt function, one for each jaxpr: outside `jit`, a second call would compile a new one again."""

    def run(*operands: Value) -> tuple[Value, ...]:
        # A tuple, as the shardings are: they must have the same structure.
        return tuple(interpret(settings, jaxpr.jaxpr, jaxpr.consts, operands, times=times))

    run.__name__ = run.__qualname__ = name  # profiles show the model's name
    return jax.jit(run, compiler_options=dict(compiler_options) or None, **options)


def _shardings(shardings: Sequence[Any]) -> tuple[Any, ...] | None:
    if all(is_unspecified(sharding) for sharding in shardings):
        return None
    return tuple(None if is_unspecified(sharding) else sharding for sharding in shardings)


@rule(primitives.remat_p)
def _remat(
    site: Site, *operands: Value, jaxpr: Jaxpr, prevent_cse: Any, differentiated: bool, policy: Any
) -> list[Value]:
    def run(*operands: Value) -> list[Value]:
        if differentiated and prevent_cse:
            # A gradient taken inside the model: this is the second evaluation, which must not merge with the first.
            operands = lax.optimization_barrier(operands)
        return site.interpret(ClosedJaxpr(jaxpr, ()), operands)

    return jax.checkpoint(run, prevent_cse=prevent_cse, policy=policy)(*operands)


@rule(primitives.closed_call_p)
def _closed_call(site: Site, *operands: Value, call_jaxpr: ClosedJaxpr) -> list[Value]:
    return site.interpret(call_jaxpr, operands)


@rule(primitives.cond_p)
def _cond(
    site: Site, index: Value, *operands: Value, branches: Sequence[ClosedJaxpr], branches_platforms: Any = None
) -> list[Value]:
    if branches_platforms is not None:  # there only if `lax.platform_dependent` asked
        raise NoRule("the platform chooses the branch")

    def run(branch: ClosedJaxpr, *operands: Value) -> list[Array]:
        # Branches agree on what they return; only one of them may have an adapted kernel there.
        return [site.dense(out, "a branch returns the kernel itself") for out in site.interpret(branch, operands)]

    index = site.dense(index, "the kernel chooses the branch")
    return lax.switch(index, [functools.partial(run, branch) for branch in branches], *operands)


@rule(primitives.while_p)
def _while(
    site: Site,
    *operands: Value,
    cond_nconsts: int,
    cond_jaxpr: ClosedJaxpr,
    body_nconsts: int,
    body_jaxpr: ClosedJaxpr,
) -> list[Value]:
    cond_consts, body_consts, start = _split(operands, cond_nconsts, body_nconsts)
    carry = _Carry.of(site, body_jaxpr, body_nconsts, start)

    def keep_going(moving: Sequence[Any]) -> Value:
        return site.dense(site.interpret(cond_jaxpr, [*cond_consts, *carry.whole(moving)])[0], _ENDS)

    def step(moving: Sequence[Any]) -> Sequence[Any]:
        return carry.moving(site.interpret(body_jaxpr, [*body_consts, *carry.whole(moving)]))

    return carry.whole(lax.while_loop(keep_going, step, carry.moving(start)))


@rule(primitives.scan_p)
def _scan(
    site: Site,
    *operands: Value,
    reverse: bool,
    length: int,
    jaxpr: ClosedJaxpr,
    num_consts: int,
    num_carry: int,
    unroll: int,
) -> list[Value]:
    consts, start, stacked = _split(operands, num_consts, num_carry)
    carry = _Carry.of(site, jaxpr, num_consts, start)
    slices = [_slices(x) for x in stacked]

    def step(moving: list[Any], xs: list[Any]) -> tuple[list[Any], list[Value]]:
        layer = [rebuild(x) for (_, rebuild), x in zip(slices, xs, strict=True)]
        out = site.interpret(jaxpr, [*consts, *carry.whole(moving), *layer], times=length)
        return carry.moving(out[:num_carry]), out[num_carry:]

    end, ys = lax.scan(step, carry.moving(start), [x for x, _ in slices], length, reverse=reverse, unroll=unroll)
    return [*carry.whole(end), *(_stacked(y) for y in ys)]


def _split(operands: Sequence[Value], *counts: int) -> tuple[list[Value], ...]:
    """Cuts operands into runs of the given lengths, and the rest."""
    rest = list(operands)
    runs = []
    for count in counts:
        runs.append(rest[:count])
        rest = rest[count:]
    return (*runs, rest)


@dataclasses.dataclass(frozen=True)
class _Carry:
    """The carry of a loop, in which kernels that no turn changes are constants and do not turn with it.

    Attributes:
      site: the loop.
      fixed: for each part of the carry the kernel that it is in every turn, or None.
    """

    site: Site
    fixed: tuple[AdaptedKernel | None, ...]

    @classmethod
    def of(cls, site: Site, body: ClosedJaxpr, num_consts: int, start: Sequence[Value]) -> _Carry:
        """Tells by the body's own variables which parts it returns as they came."""
        parts = zip(start, body.jaxpr.invars[num_consts:], body.jaxpr.outvars, strict=False)
        return cls(
            site,
            tuple(
                x if isinstance(x, AdaptedKernel) and _origin(body.jaxpr, out) is var else None for x, var, out in parts
            ),
        )

    def moving(self, carry: Sequence[Value]) -> list[Any]:
        """The part that turns: arrays, and None where a kernel stays."""
        reason = "a loop carries it and changes it"
        return [
            self.site.dense(x, reason) if kernel is None else None for kernel, x in zip(self.fixed, carry, strict=True)
        ]

    def whole(self, moving: Sequence[Any]) -> list[Value]:
        """The carry as the body knows it."""
        return [x if kernel is None else kernel for kernel, x in zip(self.fixed, moving, strict=True)]


def _origin(jaxpr: Jaxpr, var: Any) -> Any:
    """The variable that a variable of a jaxpr equals because calls return it as it came to them; or itself."""
    for eqn in jaxpr.eqns:
        for position, made in enumerate(eqn.outvars):
            if made is var:
                operand = _returned(eqn, position)
                return var if operand is None else _origin(jaxpr, operand)
    return var


def _returned(eqn: JaxprEqn, position: int) -> Any:
    """The operand that a call, or a loop that carries it, returns at a position as it came; None if there is none."""
    params = eqn.params
    if eqn.primitive in (primitives.jit_p, primitives.remat_p):
        inner = params["jaxpr"]
        inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
        origin = _origin(inner, inner.outvars[position])
        return next((given for given, its in zip(eqn.invars, inner.invars, strict=True) if its is origin), None)
    if eqn.primitive is primitives.scan_p and position < params["num_carry"]:
        body, place, given = params["jaxpr"].jaxpr, params["num_consts"] + position, eqn.invars
    elif eqn.primitive is primitives.while_p:
        body, place = params["body_jaxpr"].jaxpr, params["body_nconsts"] + position
        given = eqn.invars[params["cond_nconsts"] :]
    else:
        return None
    return given[place] if _origin(body, body.outvars[position]) is body.invars[place] else None


def _slices(x: Value) -> tuple[Any, Callable[[Any], Value]]:
    """What `scan` slices of a stacked operand, and how a turn's operand is rebuilt from a slice.

    Of a kernel it slices `w`, and each factor that has the stacked axis: both, if it is a batch of layers.
    """
    if not isinstance(x, AdaptedKernel):
        return x, lambda piece: piece
    axes = (axes_of_a(x.roles), axes_of_b(x.roles))
    factors = [
        jnp.moveaxis(factor, its.index(0), 0) if 0 in its else None
        for factor, its in zip((x.a, x.b), axes, strict=True)
    ]

    def rebuild(piece: Any) -> AdaptedKernel:
        w, a, b = piece
        return dataclasses.replace(x, w=w, a=x.a if a is None else a, b=x.b if b is None else b, roles=x.roles[1:])

    return (x.w, *factors), rebuild


def _stacked(y: Value) -> Value:
    """What `scan` stacked: layers of a kernel are a kernel with one more batch axis, in front."""
    if not isinstance(y, AdaptedKernel):
        return y
    return dataclasses.replace(y, roles=("" if y.is_probe else "b", *y.roles))
