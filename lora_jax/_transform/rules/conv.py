"""Convolutions with an adapted kernel: the base's own, and beside it one by factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax import Array, lax

from ..._compat import primitives
from ..._core.base import apply_to_base
from ..._core.contract import is_narrow
from ..._core.kernel import AdaptedKernel, TrackedKernel
from ..._core.sizes import is_known
from ..contraction.conv import Move, Steps
from ..contraction.forms import Contraction
from ..interpreter import NoRule, Site, Value
from ..registry import rule


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
    if not isinstance(rhs, TrackedKernel) or isinstance(lhs, AdaptedKernel):
        raise NoRule("the adapted kernel is what is convolved")
    if batch_group_count != 1:
        raise NoRule("a convolution in groups of the batch")
    w_out, w_in, *windows = dimension_numbers.rhs_spec
    roles = "".join("o" if axis == w_out else "i" for axis in range(rhs.w.ndim))
    lhs = site.array(lhs, "it is convolved")  # a leaf without factors: noted
    sizes = [lhs.shape[axis] for axis in dimension_numbers.lhs_spec[2:]]
    given = _as_given(padding, sizes, [rhs.w.shape[axis] for axis in windows], window_strides, rhs_dilation)

    def convolve(x: Array, w: Array) -> Array:
        return lax.conv_general_dilated(
            x,
            w,
            window_strides,
            given,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )

    if not isinstance(rhs, AdaptedKernel):
        site.used(rhs, "factored", roles=roles)
        return apply_to_base(lambda w, x: convolve(x, w), rhs.w, lhs)
    kernel = rhs.with_roles(_fitting(rhs, w_out, w_in))
    its = "".join(kernel.roles)
    if "b" in its or its[w_in] == its[w_out]:
        raise NoRule(f"the axes of the kernel there are {roles!r}, the adapter's are {its!r}")
    y: Any = site.eqn.outvars[0].aval
    moves = map(Move, window_strides, padding, lhs_dilation, rhs_dilation)
    steps = Steps(
        kernel.abstract,
        dict(zip(windows, moves, strict=True)),
        dimension_numbers,
        feature_group_count,
        precision,
        y,
        given if isinstance(given, str) else None,
    )
    narrow = is_narrow(kernel.w.dtype) or is_narrow(y.dtype)
    costs = steps.costs(lhs.shape, y.shape)
    contraction = Contraction(convolve, steps.low_rank, steps.thin, costs, precision, *steps.labels, narrow)
    return site.contract(kernel, lhs, contraction, roles=roles)


def _fitting(kernel: AdaptedKernel, w_out: int, w_in: int) -> list[str]:
    """The roles of a kernel's axes; where one has size 1 such that the two of the channels are in different factors."""
    shape = kernel.w.shape
    roles = ["i" if role == "b" and shape[axis] == 1 else role for axis, role in enumerate(kernel.roles)]
    if roles[w_out] == roles[w_in] and 1 in (shape[w_out], shape[w_in]):
        small = w_in if shape[w_in] == 1 else w_out
        roles[small] = "o" if roles[small] == "i" else "i"
    return roles


def _as_given(
    padding: Sequence[Any], sizes: Sequence[Any], window: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> Any:
    """The padding as the public function takes it: numbers, or the name by which symbolic sizes were computed."""
    if all(is_known(side) for sides in padding for side in sides):
        return padding
    spans = [step * (size - 1) + 1 for size, step in zip(window, dilation, strict=True)]
    for name in ("SAME", "SAME_LOWER"):
        if list(lax.padtype_to_pads(sizes, spans, strides, name)) == list(padding):
            return name
    raise NoRule("a padding of symbolic size")
