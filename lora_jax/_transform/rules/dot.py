"""Contractions with an adapted kernel: the base's own, and beside it the thin product of the factors.

    y = x·W0 + ((x·A)·s)·B

whichever axes are summed: inputs, outputs (`x @ w.T`, a tied embedding), batch axes, with the kernel on either side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array, lax

from ..._compat import primitives
from ..._core.base import apply_to_base, as_array
from ..._core.contract import Labelled, Labels, is_narrow
from ..._core.kernel import AdaptedKernel, PlainKernel, TrackedKernel
from ..contraction.factored import low_rank, precision_of_factors, product_with_a
from ..contraction.forms import Contraction, Sum, add_pending
from ..contraction.pair import through
from ..interpreter import NO_RULE, NoRule, Site, Value, base_of, on_all_tokens
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
    """`x·W0 + ((x·A)·s)·B`, any dimension numbers, the kernel on either side; of two kernels neither is formed."""
    if isinstance(lhs, AdaptedKernel) and isinstance(rhs, AdaptedKernel):
        if lhs.gain is not None or rhs.gain is not None:
            raise NoRule("a product of two kernels, of which one has a gain")
        on_all_tokens(lhs)
        on_all_tokens(rhs)
        params = dict(dimension_numbers=dimension_numbers, precision=precision, out_sharding=out_sharding)
        rhs = dataclasses.replace(rhs, dropout=None)  # what it meets is no activation
        base = add_pending(
            _dot_general(site, as_array(lhs.w), rhs, preferred_element_type=preferred_element_type, **params)
        )
        labels = _labels(dimension_numbers, 1, rhs.w.ndim, lhs.w.ndim)
        own = precision_of_factors(precision, lhs.w.dtype, rhs.w.dtype, base.dtype)
        array, flops = through(lhs, rhs, *labels, precision=own, like=jax.typeof(base))
        its = _roles(lhs, *(axes[0] for axes in dimension_numbers))
        site.used(lhs, "factored", roles=its, flops=flops)
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
        for x, its in zip((lhs, rhs), roles, strict=True):
            if isinstance(x, PlainKernel):
                site.used(x, "factored", roles=its)
        if isinstance(lhs, PlainKernel):
            return apply_to_base(product, lhs.w, as_array(base_of(rhs)))
        return apply_to_base(lambda right, left: product(left, right), base_of(rhs), lhs)
    side = 0 if isinstance(lhs, AdaptedKernel) else 1
    kernel, x = (lhs, site.plain(rhs, roles[1])) if side == 0 else (rhs, site.plain(lhs, roles[0]))
    y: Any = site.eqn.outvars[0].aval
    x_labels, out = _labels(dimension_numbers, side, kernel.w.ndim, x.ndim)
    dtypes = base_of(lhs).dtype, base_of(rhs).dtype, y.dtype
    own = precision_of_factors(precision, *dtypes)
    multiply, costs = low_rank(
        kernel,
        Labelled(x, x_labels),
        out,
        kernel_first=side == 0,
        precision=own,
        like=y,
    )
    its_base = (lambda x, w: product(w, x)) if side == 0 else product
    thin = product_with_a(kernel, x_labels, out)
    narrow = any(map(is_narrow, dtypes))
    contraction = Contraction(its_base, multiply, thin, costs, own, x_labels, out, narrow)
    return site.contract(kernel, x, contraction, roles=roles[side])


@rule(primitives.add_p, "low-rank")
def _add(site: Site, x: Value, y: Value) -> Array:
    """A bias is added to the base's result before the low-rank term; a kernel itself is refused."""
    del site
    if isinstance(x, TrackedKernel) or isinstance(y, TrackedKernel):
        raise NoRule(NO_RULE)
    if not isinstance(x, Sum):
        x, y = y, x
    return x.plus(add_pending(y))


def _roles(x: Value, summed: Sequence[int], batch: Sequence[int]) -> str:
    """The role that the product gives to each axis of an operand."""
    ndim = base_of(x).ndim
    return "".join("i" if axis in summed else "b" if axis in batch else "o" for axis in range(ndim))


def _labels(dimension_numbers: Any, side: int, w_ndim: int, x_ndim: int) -> tuple[Labels, Labels]:
    """The labels of the axes of x and of the product, where the kernel is the operand `side`.

    A kernel's axis is its own label; an axis of x has that of the kernel's axis it meets, or one beyond them.
    """
    summed, batch = dimension_numbers
    theirs, ours = ((*summed[operand], *batch[operand]) for operand in (1 - side, side))
    met = dict(zip(theirs, ours, strict=True))
    x_labels = tuple(met.get(axis, w_ndim + axis) for axis in range(x_ndim))
    w_rest = [axis for axis in range(w_ndim) if axis not in ours]
    x_rest = [w_ndim + axis for axis in range(x_ndim) if axis not in theirs]
    return x_labels, (*batch[side], *((*w_rest, *x_rest) if side == 0 else (*x_rest, *w_rest)))
