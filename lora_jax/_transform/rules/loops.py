"""Loops with adapted kernels, rebuilt by calling `lax.scan` and `lax.while_loop` again.

A kernel in the carry that no iteration changes is a constant of the loop. Stacked factors are sliced as their kernel.
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

_CONDITION = "the condition of the loop is the kernel"


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
    """`lax.while_loop`; a kernel that no iteration changes is a constant, one that changes is refused."""
    cond_consts, body_consts, initial = _split(operands, cond_nconsts, body_nconsts)
    carry = _Carry.of(site, body_jaxpr, body_nconsts, initial)

    def condition(state: tuple[list[Any], Any]) -> Array:
        result = site.interpret(cond_jaxpr, [*cond_consts, *carry.with_constants(state[0])])[0]
        return site.to_array(result, _CONDITION)

    def step(state: tuple[list[Any], Any]) -> tuple[list[Any], Any]:
        variable, iteration = state
        operands = _fold_iteration([*body_consts, *carry.with_constants(variable)], iteration)
        results = site.interpret(body_jaxpr, operands)
        return carry.variable_part(results), None if iteration is None else iteration + 1

    def step_unfinished(state: tuple[list[Any], Any]) -> tuple[list[Any], Any]:
        unfinished = condition(state)

        def select(new: Array, old: Array) -> Array:
            return jnp.where(lax.expand_dims(unfinished, range(unfinished.ndim, new.ndim)), new, old)

        variable, iteration = step(state)
        return jax.tree.map(select, variable, state[0]), iteration

    state = (carry.variable_part(initial), jnp.int32(0) if _have_dropout(operands) else None)
    if not cond_jaxpr.out_avals[0].shape:
        state = lax.while_loop(condition, step, state)
    else:  # the vmap of a loop whose condition depends on the example
        state = lax.while_loop(lambda state: condition(state).any(), step_unfinished, state)
    return carry.with_constants(state[0])


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
    """`lax.scan`; the factors of stacked layers are sliced with the kernel."""
    consts, initial, stacked = _split(operands, num_consts, num_carry)
    carry = _Carry.of(site, jaxpr, num_consts, initial)
    scanned, body_site = [_scan_input(x) for x in stacked], site.repeated(length)

    def step(variable: list[Any], xs: tuple[list[Any], Any]) -> tuple[list[Any], list[Value]]:
        slices, iteration = xs
        layer = [rebuild(body_site, x) for (_, rebuild), x in zip(scanned, slices, strict=True)]
        operands = _fold_iteration([*consts, *carry.with_constants(variable), *layer], iteration)
        out = body_site.interpret(jaxpr, operands)
        return carry.variable_part(out[:num_carry]), list(map(_sliceable, out[num_carry:]))

    xs = [x for x, _ in scanned], jnp.arange(length) if _have_dropout(operands) else None
    known = length if is_known(length) else None  # `lax.scan` infers a symbolic length from `xs`
    variable, ys = lax.scan(step, carry.variable_part(initial), xs, known, reverse=reverse, unroll=unroll)
    return [*carry.with_constants(variable), *(_stacked(y) for y in ys)]


def _have_dropout(operands: Sequence[Value]) -> bool:
    return any(isinstance(x, AdaptedKernel) and x.dropout is not None for x in operands)


def _fold_iteration(operands: Sequence[Value], iteration: Any) -> list[Value]:
    """Folds the iteration into the dropout keys of kernels."""
    return [x.for_use(iteration) if isinstance(x, TrackedKernel) else x for x in operands]


def _split(operands: Sequence[Value], *counts: int) -> tuple[list[Value], ...]:
    """Splits operands into runs of the given lengths, and the rest."""
    rest = list(operands)
    runs = []
    for count in counts:
        runs.append(rest[:count])
        rest = rest[count:]
    return (*runs, rest)


@dataclasses.dataclass(frozen=True)
class _Carry:
    """The carry of a loop, in which kernels that no iteration changes are constants.

    Attributes:
      site: the loop.
      constants: for each element of the carry, the kernel that it is in every iteration, or None.
    """

    site: Site
    constants: tuple[TrackedKernel | None, ...]

    @classmethod
    def of(cls, site: Site, body: ClosedJaxpr, num_consts: int, initial: Sequence[Value]) -> _Carry:
        """Finds the kernels that the body returns unchanged."""
        elements = zip(initial, body.jaxpr.invars[num_consts:], body.jaxpr.outvars, strict=False)
        constants = [
            x if isinstance(x, TrackedKernel) and _origin(body.jaxpr, out) is var else None for x, var, out in elements
        ]
        return cls(site, tuple(constants))

    def variable_part(self, carry: Sequence[Value]) -> list[Any]:
        """Returns the carry of the rebuilt loop: arrays, and None in place of a constant kernel."""
        reason = "the carry of a loop, which changes it"
        return [
            self.site.to_array(x, reason) if kernel is None else None
            for kernel, x in zip(self.constants, carry, strict=True)
        ]

    def with_constants(self, variable: Sequence[Any]) -> list[Value]:
        """Returns the carry of the original body."""
        return [x if kernel is None else kernel for kernel, x in zip(self.constants, variable, strict=True)]


def _origin(jaxpr: Jaxpr, var: Any) -> Any:
    """Returns the variable that calls pass through unchanged to a variable of a jaxpr, or the variable itself."""
    for eqn in jaxpr.eqns:
        for position, result in enumerate(eqn.outvars):
            if result is var:
                operand = _passed_through(eqn, position)
                return var if operand is None else _origin(jaxpr, operand)
    return var


def _passed_through(eqn: JaxprEqn, position: int) -> Any:
    """Returns the operand that a call or loop returns unchanged at a position, or None."""
    params = normal_parameters(eqn)
    if eqn.primitive in (primitives.jit_p, primitives.remat_p):
        inner = params["jaxpr"].jaxpr
        origin = _origin(inner, inner.outvars[position])
        return next((operand for operand, var in zip(eqn.invars, inner.invars, strict=True) if var is origin), None)
    if eqn.primitive is primitives.scan_p and position < params["num_carry"]:
        body, index, operands = params["jaxpr"].jaxpr, params["num_consts"] + position, eqn.invars
    elif eqn.primitive is primitives.while_p:
        body, index = params["body_jaxpr"].jaxpr, params["body_nconsts"] + position
        operands = eqn.invars[params["cond_nconsts"] :]
    else:
        return None
    return operands[index] if _origin(body, body.outvars[position]) is body.invars[index] else None


def _scan_input(x: Value) -> tuple[Any, Callable[[Site, Any], Value]]:
    """Returns the arrays of an operand that `scan` slices, and a function that rebuilds the operand from a slice.

    Of a kernel, these are `w` and each factor that has the leading axis.
    """
    if not isinstance(x, TrackedKernel):
        return x, lambda site, arrays: arrays
    x = _sliceable(x)
    factors = {name: (factor, layout(x.roles)) for name, (factor, layout) in x.factors.items()}
    sliced = {name: _move_to_front(factor, axes.index(0)) for name, (factor, axes) in factors.items() if 0 in axes}

    def rebuild(site: Site, arrays: Any) -> Value:
        return site.materialize_row(dataclasses.replace(x, **arrays, roles=x.roles[1:]))

    return {"w": x.w, **sliced}, rebuild


def _move_to_front(x: Array, axis: int) -> Array:
    return x if axis == 0 else jnp.moveaxis(x, axis, 0)


def _stacked(y: Value) -> Value:
    """Returns a stacked result of `scan`; a stacked kernel has one more batch axis, the leading one."""
    if not isinstance(y, TrackedKernel):
        return y
    y = dataclasses.replace(y, roles=(y.role_of_new_axis("b"), *y.roles))  # type: ignore[type-var]
    if not isinstance(y, AdaptedKernel):
        return y
    # These do not differ between iterations, but `scan` has stacked them.
    dropout, given = jax.tree.map(lambda x: x[0], (y.dropout, None if y.given_per_layer else y.given))
    return dataclasses.replace(y, dropout=dropout, given=y.given if y.given_per_layer else given)


def _sliceable(x: Value) -> Value:
    """Returns a kernel that a loop can slice or stack; dequantizes a stored leaf that was reshaped before."""
    if not isinstance(x, TrackedKernel) or not isinstance(x.w, Recorded):
        return x
    x = dataclasses.replace(x, w=x.w.settled())  # type: ignore[type-var]
    return x if x.w.is_sliceable else x.with_array()
