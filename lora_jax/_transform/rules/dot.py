"""Products with an adapted kernel: the base's product plus the low-rank term.

    y = x·W0 + ((x·A)·s)·B

Any axes can be contracted: inputs, outputs (`x @ w.T`, a tied embedding) or batch axes, with the kernel on either side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array, lax

from ..._compat import primitives
from ..._core.base import apply_to_base, as_array
from ..._core.contract import Labeled, Labels, is_narrow
from ..._core.kernel import AdaptedKernel, PlainKernel, TrackedKernel
from ..contraction.factored import low_rank_product, precision_of_factors, product_with_a
from ..contraction.forms import Sum, add_pending
from ..contraction.operation import Contraction
from ..contraction.pair import multiply_kernels
from ..interpreter import NO_RULE, NoRule, Site, Value, base_value, check_unrouted
from ..registry import rule


@rule(primitives.dot_general_p, "low-rank")
def _dot_general(
    site: Site,
    lhs: Value,
    rhs: Value,
    *,
    dimension_numbers: Any,
    precision: Any,
    preferred_element_type: Any,
    out_sharding: Any,
) -> Value:
    """`x·W0 + ((x·A)·s)·B` for any dimension numbers; in a product of two kernels, neither is materialized."""
    if isinstance(lhs, AdaptedKernel) and isinstance(rhs, AdaptedKernel):
        if lhs.gain is not None or rhs.gain is not None:
            raise NoRule("a product of two kernels, of which one has a gain")
        check_unrouted(lhs)
        check_unrouted(rhs)
        params = dict(dimension_numbers=dimension_numbers, precision=precision, out_sharding=out_sharding)
        rhs = dataclasses.replace(rhs, dropout=None)  # the other operand is not an activation
        base = add_pending(
            _dot_general(site, as_array(lhs.w), rhs, preferred_element_type=preferred_element_type, **params)
        )
        labels = _labels(dimension_numbers, 1, rhs.w.ndim, lhs.w.ndim)
        factor_precision = precision_of_factors(precision, lhs.w.dtype, rhs.w.dtype, base.dtype)
        array, flops = multiply_kernels(lhs, rhs, *labels, precision=factor_precision, like=jax.typeof(base))
        lhs_roles = _roles(lhs, *(axes[0] for axes in dimension_numbers))
        site.log_use(lhs, "factored", roles=lhs_roles, flops=flops)
        return Sum(base, array)
    roles = [_roles(x, summed, batch) for x, summed, batch in zip((lhs, rhs), *dimension_numbers, strict=True)]

    def product(left: Array, right: Array) -> Array:
        return lax.dot_general(
            left,
            right,
            dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )

    if not isinstance(lhs, AdaptedKernel) and not isinstance(rhs, AdaptedKernel):
        for x, x_roles in zip((lhs, rhs), roles, strict=True):
            if isinstance(x, PlainKernel):
                site.log_use(x, "factored", roles=x_roles)
        if isinstance(lhs, PlainKernel):
            return apply_to_base(product, lhs.w, as_array(base_value(rhs)))
        return apply_to_base(lambda right, left: product(left, right), base_value(rhs), lhs)
    side = 0 if isinstance(lhs, AdaptedKernel) else 1
    kernel, x = (lhs, site.other_operand(rhs, roles[1])) if side == 0 else (rhs, site.other_operand(lhs, roles[0]))
    y: Any = site.eqn.outvars[0].aval
    x_labels, out = _labels(dimension_numbers, side, kernel.w.ndim, x.ndim)
    dtypes = base_value(lhs).dtype, base_value(rhs).dtype, y.dtype
    factor_precision = precision_of_factors(precision, *dtypes)
    low_rank, costs = low_rank_product(
        kernel,
        Labeled(x, x_labels),
        out,
        kernel_first=side == 0,
        precision=factor_precision,
        like=y,
    )
    base_product = (lambda x, w: product(w, x)) if side == 0 else product
    x_times_a = product_with_a(kernel, x_labels, out)
    contraction = Contraction(
        base_product,
        low_rank,
        x_times_a,
        costs,
        factor_precision,
        x_labels,
        out,
        contracted=frozenset(dimension_numbers[0][side]),
        narrow=any(map(is_narrow, dtypes)),
    )
    return site.contract(kernel, x, contraction, roles=roles[side])


@rule(primitives.add_p, "low-rank")
def _add(site: Site, x: Value, y: Value) -> Array:
    """A bias is added to the base's result before the low-rank term; a kernel as an operand is refused."""
    del site
    if isinstance(x, TrackedKernel) or isinstance(y, TrackedKernel):
        raise NoRule(NO_RULE)
    if not isinstance(x, Sum):
        x, y = y, x
    return x.add(add_pending(y))


def _roles(x: Value, summed: Sequence[int], batch: Sequence[int]) -> str:
    """Returns the role of each axis of an operand in the product."""
    ndim = base_value(x).ndim
    return "".join("i" if axis in summed else "b" if axis in batch else "o" for axis in range(ndim))


def _labels(dimension_numbers: Any, side: int, w_ndim: int, x_ndim: int) -> tuple[Labels, Labels]:
    """Returns the labels of the axes of x and of the product, where the kernel is the operand `side`.

    An axis of x has the number of the kernel's axis that it is multiplied with, or else a number after these.
    """
    summed, batch = dimension_numbers
    x_axes, w_axes = ((*summed[operand], *batch[operand]) for operand in (1 - side, side))
    w_axis_of = dict(zip(x_axes, w_axes, strict=True))
    x_labels = tuple(w_axis_of.get(axis, w_ndim + axis) for axis in range(x_ndim))
    w_rest = [axis for axis in range(w_ndim) if axis not in w_axes]
    x_rest = [w_ndim + axis for axis in range(x_ndim) if axis not in x_axes]
    return x_labels, (*batch[side], *((*w_rest, *x_rest) if side == 0 else (*x_rest, *w_rest)))
