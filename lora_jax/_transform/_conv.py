"""Convolutions with an adapted kernel: the base's own, and beside it one by factors."""

from __future__ import annotations

from typing import Any

from jax import Array, lax

from .._adapter import AdaptedKernel
from .._compat import primitives
from .._contract import is_narrow
from ._conv_steps import Move, Steps
from ._forms import Contraction
from ._interpreter import NoRule, Site, Value, rule


@rule(primitives.conv_general_dilated_p, "low-rank")
def _conv_general_dilated(
    site: Site,
    lhs: Value,
    rhs: Value,
    *,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any,
    rhs_dilation: Any,
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
    precision: Any,
    preferred_element_type: Any,
    out_sharding: Any,
) -> Value:
    """The window with one factor, each position with the other; any layout, stride, dilation and feature groups."""
    if not isinstance(rhs, AdaptedKernel) or (isinstance(lhs, AdaptedKernel) and not lhs.is_probe):
        raise NoRule("the adapted kernel is what is convolved")
    if batch_group_count != 1:
        raise NoRule("a convolution in groups of the batch")
    kernel = rhs
    w_out, w_in, *windows = dimension_numbers.rhs_spec
    roles = "".join("o" if axis == w_out else "i" for axis in range(kernel.w.ndim))
    its = "".join(kernel.roles)
    if not kernel.is_probe and ("b" in its or its[w_in] == its[w_out]):
        raise NoRule(f"the axes of the kernel there are {roles!r}, the adapter's are {its!r}")
    lhs = site.dense(lhs, "it is convolved")  # a probe: noted

    def convolve(x: Array, w: Array) -> Array:
        return lax.conv_general_dilated(
            x,
            w,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )

    if kernel.is_probe:
        site.used(kernel, "factored", roles=roles)
        return convolve(lhs, kernel.w)
    y: Any = site.eqn.outvars[0].aval
    moves = map(Move, window_strides, padding, lhs_dilation, rhs_dilation)
    steps = Steps(
        kernel.outline,
        dict(zip(windows, moves, strict=True)),
        dimension_numbers,
        feature_group_count,
        precision,
        y,
    )
    narrow = is_narrow(kernel.w.dtype) or is_narrow(y.dtype)
    costs = steps.costs(lhs.shape, y.shape)
    contraction = Contraction(convolve, steps.low_rank, steps.thin, costs, precision, *steps.labels, narrow)
    return site.contract(kernel, lhs, contraction, roles=roles)
