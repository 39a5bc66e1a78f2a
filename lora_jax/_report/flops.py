"""Counts the FLOPs of a jaxpr; the body of a `scan` counts once per iteration.

The compiler's count includes the body of a loop only once, which is too little for a scanned model. This one does not
depend on what the compiler fuses or removes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from .._compat import ClosedJaxpr, Jaxpr, JaxprEqn

Count = Callable[[JaxprEqn], int]


def flops(jaxpr: Jaxpr | ClosedJaxpr) -> int:
    """Counts the FLOPs of one evaluation of a jaxpr.

    A contraction counts 2·M·N·K, a convolution 2·out·window·in/groups (including the zeros of padding and dilation), a
    reduction one per input element, and other arithmetic, including `exp` and `tanh`, one per output element. Moving,
    selecting and casting values counts nothing, nor does integer arithmetic other than contractions.

    The body of a `scan` counts `length` times, that of a `while` once, because its trip count is unknown. Of a `cond`
    the most expensive branch counts. A `shard_map` counts on all its devices. `jit`, `remat`, `custom_jvp`,
    `custom_vjp` and other primitives with a jaxpr count as that jaxpr.

    >>> import jax, jax.numpy as jnp
    >>> x, w = jnp.ones((2, 8)), jnp.ones((8, 8))
    >>> flops(jax.make_jaxpr(lambda x: jnp.tanh(x @ w))(x))
    272
    >>> flops(jax.make_jaxpr(lambda x: jax.lax.scan(lambda x, _: (x @ w, None), x, length=10))(x))
    2560

    Args:
      jaxpr: from `jax.make_jaxpr`; closed or not.

    Raises:
      NotImplementedError: for a primitive whose FLOPs do not follow from its shapes: matrix decompositions, Fourier
        transforms, hand-written kernels, callbacks.
    """
    return sum(_equation(eqn) for eqn in jaxpr.eqns)


def bodies(eqn: JaxprEqn) -> Iterator[Jaxpr | ClosedJaxpr]:
    """Returns the jaxprs in the parameters of an equation, such as the body of a loop or the branches of a `cond`."""
    for value in eqn.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, (Jaxpr, ClosedJaxpr)):
                yield part


def _equation(eqn: JaxprEqn) -> int:
    name = eqn.primitive.name
    if name in _UNKNOWN:
        raise NotImplementedError(
            f"Expected primitives whose FLOPs follow from their shapes; got `{name}`.\n  Count the function without it."
        )
    if name in _MOVES:
        return 0
    if name in _COUNTS:
        return _COUNTS[name](eqn)
    inner = list(bodies(eqn))
    return sum(map(flops, inner)) if inner else sum(_elements(var) for var in eqn.outvars)


def _elements(var: Any) -> int:
    """Returns the number of elements of a variable or literal; 0 if they are not floating-point."""
    dtype = getattr(var.aval, "dtype", None)  # a token has none
    return math.prod(var.aval.shape) if dtype is not None and jnp.issubdtype(dtype, jnp.inexact) else 0


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(var.aval.shape)


def _scan(eqn: JaxprEqn) -> int:
    length: int = eqn.params["length"]
    return length * flops(eqn.params["jaxpr"])


def _cond(eqn: JaxprEqn) -> int:
    counts: Iterator[int] = map(flops, eqn.params["branches"])
    return functools.reduce(jax.core.max_dim, counts)  # sizes may be symbolic


def _shard_map(eqn: JaxprEqn) -> int:
    axes = eqn.params["mesh"].shape
    devices = math.prod(axes[name] for name in eqn.params["newly_manual_axes"])
    return devices * flops(eqn.params["jaxpr"])


def _linear_solve(eqn: JaxprEqn) -> int:
    return flops(eqn.params["jaxprs"].solve)


def _dot_general(eqn: JaxprEqn) -> int:
    return _contraction(eqn, eqn.params["dimension_numbers"])


def _ragged_dot_general(eqn: JaxprEqn) -> int:
    # Each row is multiplied with the kernel of one group, so the group axis does not count.
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    return _contraction(eqn, numbers.dot_dimension_numbers, groups=numbers.rhs_group_dimensions)


def _contraction(eqn: JaxprEqn, numbers: Any, groups: tuple[int, ...] = ()) -> int:
    (_, rhs_summed), (_, rhs_batch) = numbers
    lhs, rhs = map(_shape, eqn.invars[:2])
    shared = {*rhs_summed, *rhs_batch, *groups}
    return 2 * math.prod(lhs) * math.prod(size for axis, size in enumerate(rhs) if axis not in shared)


def _convolution(eqn: JaxprEqn) -> int:
    kernel = _shape(eqn.invars[1])
    # The kernel has in/groups input channels; all of its axes but the output axis are summed over.
    axis = eqn.params["dimension_numbers"].rhs_spec[0]
    return 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(kernel) // kernel[axis]


def _reduction(eqn: JaxprEqn) -> int:
    return sum(map(_elements, eqn.invars))


def _general_reduction(eqn: JaxprEqn) -> int:
    # The second half of the operands are the initial values.
    elements = math.prod(_shape(eqn.invars[0]))
    return elements * flops(eqn.params["jaxpr"])


def _window_reduction(eqn: JaxprEqn) -> int:
    return _elements(eqn.outvars[0]) * math.prod(eqn.params["window_dimensions"])


def _general_window_reduction(eqn: JaxprEqn) -> int:
    positions = math.prod(_shape(eqn.outvars[0]))
    return positions * math.prod(eqn.params["window_dimensions"]) * flops(eqn.params["jaxpr"])


def _select_and_scatter_add(eqn: JaxprEqn) -> int:
    # For each element of the cotangent: a search of its window, and an addition.
    return _elements(eqn.invars[0]) * (math.prod(eqn.params["window_dimensions"]) + 1)


def _scatter(eqn: JaxprEqn) -> int:
    return _elements(eqn.invars[2])  # operand, indices, updates


def _one_minus_square(eqn: JaxprEqn) -> int:
    return 2 * _elements(eqn.outvars[0])


def _polynomial(eqn: JaxprEqn) -> int:
    # A multiplication and an addition for each coefficient but the first.
    return 2 * _elements(eqn.outvars[0]) * (len(eqn.invars) - 2)


_REDUCTIONS = ("reduce_sum", "reduce_prod", "reduce_max", "reduce_min", "argmax", "argmin")
_WINDOWS = ("reduce_window_sum", "reduce_window_max", "reduce_window_min")
_SCATTERS = ("scatter-add", "scatter-sub", "scatter-mul", "scatter-max", "scatter-min")

_COUNTS: dict[str, Count] = {
    "scan": _scan,
    "cond": _cond,
    "shard_map": _shard_map,
    "custom_linear_solve": _linear_solve,
    "one_minus_square": _one_minus_square,
    "polynomial": _polynomial,
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot_general,
    "conv_general_dilated": _convolution,
    "reduce": _general_reduction,
    "reduce_window": _general_window_reduction,
    "select_and_scatter_add": _select_and_scatter_add,
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_WINDOWS, _window_reduction),
    **dict.fromkeys(_SCATTERS, _scatter),
}

_MOVES = frozenset(
    """
    all_gather all_gather_invariant all_to_all bitcast_convert_type broadcast_in_dim broadcast_to complex
    concatenate conj convert_element_type copy device_put dynamic_slice dynamic_update_slice empty empty2 freeze
    gather get imag iota layout_constraint name new_ref optimization_barrier pad pbroadcast ppermute pvary
    ragged_all_to_all real reduce_precision reshape reshard rev scatter select_and_gather_add select_n
    sharding_constraint slice sort split squeeze stack stop_gradient swap tie tile top_k transpose unstack
    with_memory_space_constraint zeros_like
    """.split()
)

_UNKNOWN = frozenset(
    """
    approx_top_k cholesky cholesky_update eig eigh ffi_call fft geqp3 geqrf hessenberg householder_product
    io_callback lu ormqr pallas_call pure_callback qr random_gamma scaled_dot schur svd symmetric_product
    triangular_solve tridiagonal tridiagonal_solve
    """.split()
)
