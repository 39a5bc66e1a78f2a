"""Loops around adapted kernels, rebuilt by calling `lax.scan` and `lax.while_loop` again.

Kernels that a loop carries and no turn changes are its constants. Of a stack of layers each turn gets its own, factors
and all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..._compat import ClosedJaxpr, Jaxpr, JaxprEqn, normal_parameters, primitives
from ..._core.base import Recorded
from ..._core.kernel import AdaptedKernel, TrackedKernel
from ..._core.sizes import is_known
from ..cache import cached
from ..interpreter import Site, Value
from ..registry import rule

_ENDS = "the kernel decides when a loop ends"


@rule(primitives.while_p, "rebuilt")
@cached
def _while(
    site: Site,
    *operands: Value,
    cond_nconsts: int,
    cond_jaxpr: ClosedJaxpr,
    body_nconsts: int,
    body_jaxpr: ClosedJaxpr,
) -> list[Value]:
    """`lax.while_loop`; a kernel that no turn changes is a constant, one that changes is refused."""
    cond_consts, body_consts, start = _split(operands, cond_nconsts, body_nconsts)
    carry = _Carry.of(site, body_jaxpr, body_nconsts, start)

    def going(state: tuple[list[Any], Any]) -> Array:
        return site.array(site.interpret(cond_jaxpr, [*cond_consts, *carry.whole(state[0])])[0], _ENDS)

    def step(state: tuple[list[Any], Any]) -> tuple[list[Any], Any]:
        moving, turn = state
        operands = _in_turn([*body_consts, *carry.whole(moving)], turn)
        return carry.moving(site.interpret(body_jaxpr, operands)), None if turn is None else turn + 1

    def step_each(state: tuple[list[Any], Any]) -> tuple[list[Any], Any]:
        still = going(state)

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(lax.expand_dims(still, range(still.ndim, new.ndim)), new, old)

        moved, turn = step(state)
        return jax.tree.map(choose, moved, state[0]), turn

    begin = (carry.moving(start), jnp.int32(0) if _drops(operands) else None)
    if not cond_jaxpr.out_avals[0].shape:
        end = lax.while_loop(going, step, begin)
    else:  # the vmap of a loop whose end depends on the example: it turns until the last is done, and the others stay
        end = lax.while_loop(lambda state: going(state).any(), step_each, begin)
    return carry.whole(end[0])


@rule(primitives.scan_p, "rebuilt")
@cached
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
    """`lax.scan`; of stacked layers each turn gets its own factors."""
    consts, start, stacked = _split(operands, num_consts, num_carry)
    carry = _Carry.of(site, jaxpr, num_consts, start)
    slices, turns = [_slices(x) for x in stacked], site.in_turn(length)

    def step(moving: list[Any], xs: tuple[list[Any], Any]) -> tuple[list[Any], list[Value]]:
        pieces, turn = xs
        layer = [rebuild(turns, x) for (_, rebuild), x in zip(slices, pieces, strict=True)]
        out = turns.interpret(jaxpr, _in_turn([*consts, *carry.whole(moving), *layer], turn))
        return carry.moving(out[:num_carry]), list(map(_sliceable, out[num_carry:]))

    xs = [x for x, _ in slices], jnp.arange(length) if _drops(operands) else None
    known = length if is_known(length) else None  # `lax.scan` takes a symbolic length from what it slices alone
    end, ys = lax.scan(step, carry.moving(start), xs, known, reverse=reverse, unroll=unroll)
    return [*carry.whole(end), *(_stacked(y) for y in ys)]


def _drops(operands: Sequence[Value]) -> bool:
    return any(isinstance(x, AdaptedKernel) and x.dropout is not None for x in operands)


def _in_turn(operands: Sequence[Value], turn: Any) -> list[Value]:
    """The operands of one turn of a loop: kernels drop anew in each."""
    return [x.for_use(turn) if isinstance(x, TrackedKernel) else x for x in operands]


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
    fixed: tuple[TrackedKernel | None, ...]

    @classmethod
    def of(cls, site: Site, body: ClosedJaxpr, num_consts: int, start: Sequence[Value]) -> _Carry:
        """Tells by the body's own variables which parts it returns as they came."""
        parts = zip(start, body.jaxpr.invars[num_consts:], body.jaxpr.outvars, strict=False)
        return cls(
            site,
            tuple(
                x if isinstance(x, TrackedKernel) and _origin(body.jaxpr, out) is var else None for x, var, out in parts
            ),
        )

    def moving(self, carry: Sequence[Value]) -> list[Any]:
        """The part that turns: arrays, and None where a kernel stays."""
        reason = "a loop carries it and changes it"
        return [
            self.site.array(x, reason) if kernel is None else None for kernel, x in zip(self.fixed, carry, strict=True)
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
    params = normal_parameters(eqn)
    if eqn.primitive in (primitives.jit_p, primitives.remat_p):
        inner = params["jaxpr"].jaxpr
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


def _slices(x: Value) -> tuple[Any, Callable[[Site, Any], Value]]:
    """What `scan` slices of a stacked operand, and how in a turn its operand is rebuilt from a slice.

    Of a kernel it slices `w`, and each factor that has the stacked axis: both, if it is a batch of layers.
    """
    if not isinstance(x, TrackedKernel):
        return x, lambda turn, piece: piece
    x = _sliceable(x)
    placed = {name: (factor, layout(x.roles)) for name, (factor, layout) in x.factors.items()}
    sliced = {name: _in_front(factor, axes.index(0)) for name, (factor, axes) in placed.items() if 0 in axes}

    def rebuild(turn: Site, piece: Any) -> Value:
        return turn.left(dataclasses.replace(x, **piece, roles=x.roles[1:]))

    return {"w": x.w, **sliced}, rebuild


def _in_front(x: Array, axis: int) -> Array:
    return x if axis == 0 else jnp.moveaxis(x, axis, 0)


def _stacked(y: Value) -> Value:
    """What `scan` stacked: layers of a kernel are a kernel with one more batch axis, in front."""
    if not isinstance(y, TrackedKernel):
        return y
    y = dataclasses.replace(y, roles=(y.role_of_new_axis("b"), *y.roles))  # type: ignore[type-var]
    if not isinstance(y, AdaptedKernel):
        return y
    # Of what is the same in every iteration one was stacked for each.
    dropout, active = jax.tree.map(lambda x: x[0], (y.dropout, y.active))
    return dataclasses.replace(y, dropout=dropout, active=active)


def _sliceable(x: Value) -> Value:
    """A kernel that a loop may slice or stack; a stored leaf that was reshaped before is dense there."""
    return x.with_array() if isinstance(x, TrackedKernel) and isinstance(x.w, Recorded) and not x.w.is_sliceable else x
