"""Convolutions with an adapted kernel: the base's own, and beside it one to r channels and a product over them.

The window stays with `a`, (window…, in, r); `b`, (r, out), acts on each position by itself.
"""

from __future__ import annotations

import math
from typing import Any

from jax import Array, lax

from .._adapter import AdaptedKernel
from .._axes import RANK
from .._compat import primitives
from .._contract import Labelled
from ._factored import expand, factors
from ._interpreter import NoRule, Site, Value, rule


@rule(primitives.conv_general_dilated_p)
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
) -> Array:
    if not isinstance(rhs, AdaptedKernel) or (isinstance(lhs, AdaptedKernel) and not lhs.is_probe):
        raise NoRule("the adapted kernel is what is convolved")
    lhs = site.dense(lhs, "it is convolved")  # a probe: noted
    if feature_group_count != 1 or batch_group_count != 1:
        raise NoRule("a grouped convolution")
    kernel = rhs
    roles = ["i"] * kernel.w.ndim
    roles[dimension_numbers.rhs_spec[0]] = "o"
    if not kernel.is_probe and list(kernel.roles) != roles:
        raise NoRule(
            f"the axes of the kernel there are {''.join(roles)!r}, the adapter's are {''.join(kernel.roles)!r}"
        )

    def convolve(w: Array, rhs_spec: tuple[int, ...], *, dtype: Any = None, sharding: Any = None) -> Array:
        return lax.conv_general_dilated(
            lhs,
            w,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers._replace(rhs_spec=rhs_spec),
            precision=precision,
            preferred_element_type=dtype,
            out_sharding=sharding,
        )

    y = convolve(kernel.w, dimension_numbers.rhs_spec, dtype=preferred_element_type, sharding=out_sharding)
    if kernel.is_probe:
        site.used(kernel, "factored", roles=roles)
        return y
    a, b = factors(kernel)
    # (out, in, window…): the rank axis is a's output channel.
    a_spec = tuple(a.labels.index(RANK if roles[axis] == "o" else axis) for axis in dimension_numbers.rhs_spec)
    thin = convolve(a.array, a_spec)
    # Positions are labelled beyond the kernel's axes; the channel is the rank, and then the kernel's output.
    channel, w_out = dimension_numbers.out_spec[1], roles.index("o")
    labels = [kernel.w.ndim + axis for axis in range(y.ndim)]
    thin_labels, out = (
        tuple(mine if axis == channel else label for axis, label in enumerate(labels)) for mine in (RANK, w_out)
    )
    low_rank = expand(
        kernel, Labelled(thin, thin_labels), b, out, kernel_first=False, precision=precision, dtype=y.dtype
    )
    window = math.prod(size for axis, size in enumerate(kernel.w.shape) if axis != w_out)
    site.used(
        kernel, "factored", roles=roles, operations=thin.size * (2 * window + 2 * kernel.w.shape[w_out] + 1) + y.size
    )
    return y + low_rank
