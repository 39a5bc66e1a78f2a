"""Contractions with an adapted kernel: the base's own, and beside it the thin product of the factors.

    y = x·W0 + ((x·A)·s)·B

whichever axes are summed: inputs, outputs (`x @ w.T`, a tied embedding), batch axes, with the kernel on either side.
"""

from __future__ import annotations

from typing import Any

from jax import Array, lax

from .._adapter import AdaptedKernel
from .._compat import primitives
from .._contract import Labelled
from ._factored import multiply
from ._interpreter import NoRule, Site, Value, rule


@rule(primitives.dot_general_p)
def _dot_general(
    site: Site,
    lhs: Value,
    rhs: Value,
    *,
    dimension_numbers: Any,
    precision: Any,
    preferred_element_type: Any,
    out_sharding: Any,
) -> Array:
    kernel_first = isinstance(lhs, AdaptedKernel)
    if kernel_first and isinstance(rhs, AdaptedKernel):
        raise NoRule("both operands of the product are adapted kernels")
    kernel, x = (lhs, rhs) if kernel_first else (rhs, lhs)
    left, right = (kernel.w, x) if kernel_first else (x, kernel.w)
    y = lax.dot_general(
        left,
        right,
        dimension_numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    side, other = (0, 1) if kernel_first else (1, 0)
    summed, batch = (numbers[side] for numbers in dimension_numbers)
    roles = ["i" if axis in summed else "b" if axis in batch else "o" for axis in range(kernel.w.ndim)]
    if kernel.is_probe:
        site.used(kernel, "factored", roles=roles)
        return y
    # A kernel's axis is its own label; an axis of x has that of the kernel's axis it meets, or one of its own.
    met = {
        theirs: ours
        for numbers in dimension_numbers
        for ours, theirs in zip(numbers[side], numbers[other], strict=True)
    }
    x_labels = tuple(met.get(axis, kernel.w.ndim + axis) for axis in range(x.ndim))
    w_rest = [axis for axis in range(kernel.w.ndim) if roles[axis] == "o"]
    x_rest = [kernel.w.ndim + axis for axis in range(x.ndim) if axis not in met]
    out = (*batch, *w_rest, *x_rest) if kernel_first else (*batch, *x_rest, *w_rest)
    low_rank = multiply(
        kernel, Labelled(x, x_labels), out, kernel_first=kernel_first, precision=precision, dtype=y.dtype
    )
    site.used(kernel, "factored", roles=roles, operations=low_rank.operations)
    return y + low_rank.array
