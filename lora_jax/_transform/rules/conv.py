"""Convolutions with an adapted kernel: the base's convolution plus one with the factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax import Array, lax

from ..._compat import primitives
from ..._core.base import apply_to_base
from ..._core.contract import is_narrow
from ..._core.kernel import AdaptedKernel, TrackedKernel
from ..._core.sizes import is_known
from ..contraction.conv import FactoredConv, WindowAxis
from ..contraction.operation import Contraction
from ..contraction.routing import NO_TOKENS
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
    """A convolution with one factor, then with the other; any layout, stride, dilation and feature groups."""
    if not isinstance(rhs, TrackedKernel) or isinstance(lhs, AdaptedKernel):
        raise NoRule("the adapted kernel is the input of the convolution")
    if batch_group_count != 1:
        raise NoRule("a convolution with batch groups")
    w_out, w_in, *windows = dimension_numbers.rhs_spec
    roles = "".join("o" if axis == w_out else "i" for axis in range(rhs.w.ndim))
    lhs = site.to_array(lhs, "the input of a convolution")  # logs a leaf without factors
    sizes = [lhs.shape[axis] for axis in dimension_numbers.lhs_spec[2:]]
    pads = _padding_argument(padding, sizes, [rhs.w.shape[axis] for axis in windows], window_strides, rhs_dilation)

    def convolve(x: Array, w: Array) -> Array:
        return lax.conv_general_dilated(
            x,
            w,
            window_strides,
            pads,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )

    if not isinstance(rhs, AdaptedKernel):
        site.log_use(rhs, "factored", roles=roles)
        return apply_to_base(lambda w, x: convolve(x, w), rhs.w, lhs)
    kernel = rhs.with_roles(_separate_channels(rhs, w_out, w_in))
    adapter_roles = "".join(kernel.roles)
    if "b" in adapter_roles or adapter_roles[w_in] == adapter_roles[w_out]:
        raise NoRule(f"the convolution has the axes {roles!r}, the adapter {adapter_roles!r}")
    y: Any = site.eqn.outvars[0].aval
    parameters = map(WindowAxis, window_strides, padding, lhs_dilation, rhs_dilation)
    conv = FactoredConv(
        kernel.abstract,
        dict(zip(windows, parameters, strict=True)),
        dimension_numbers,
        feature_group_count,
        precision,
        y,
        pads if isinstance(pads, str) else None,
    )
    narrow = is_narrow(kernel.w.dtype) or is_narrow(y.dtype)
    costs = conv.costs(lhs.shape, y.shape)
    contracted = frozenset({w_in, *windows})
    if kernel.p is not None and feature_group_count != 1:
        raise NoRule("a convolution in groups, of a kernel whose router reads the activation")
    if kernel.is_routed and any(kernel.roles[axis] != "i" for axis in contracted):
        raise NoRule(NO_TOKENS)
    contraction = Contraction(
        convolve, conv.low_rank, conv.x_times_a, costs, precision, *conv.labels, contracted=contracted, narrow=narrow
    )
    return site.contract(kernel, lhs, contraction, roles=roles)


def _separate_channels(kernel: AdaptedKernel, w_out: int, w_in: int) -> list[str]:
    """Changes roles of axes of size 1 so that the input and the output channels are in different factors."""
    shape = kernel.w.shape
    roles = ["i" if role == "b" and shape[axis] == 1 else role for axis, role in enumerate(kernel.roles)]
    if roles[w_out] == roles[w_in] and 1 in (shape[w_out], shape[w_in]):
        small = w_in if shape[w_in] == 1 else w_out
        roles[small] = "o" if roles[small] == "i" else "i"
    return roles


def _padding_argument(
    padding: Sequence[Any], sizes: Sequence[Any], window: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> Any:
    """Returns the padding argument of the public function: numbers, or a name if sizes are symbolic."""
    if all(is_known(side) for sides in padding for side in sides):
        return padding
    spans = [step * (size - 1) + 1 for size, step in zip(window, dilation, strict=True)]
    for name in ("SAME", "SAME_LOWER"):
        if list(lax.padtype_to_pads(sizes, spans, strides, name)) == list(padding):
            return name
    raise NoRule("a convolution with padding of symbolic size")
