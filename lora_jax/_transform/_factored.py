"""The low-rank product by itself: `((x·A)·s)·B`, thin side first.

The axes of a kernel are labelled by their numbers, so `axes_of_a` and `axes_of_b` are the labels of its factors.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

from jax import Array

from .._adapter import AdaptedKernel
from .._axes import RANK, axes_of_a, axes_of_b
from .._contract import Labelled, Labels, contract, widest


class Product(NamedTuple):
    """A low-rank product, and the floating-point operations that it takes."""

    array: Array
    operations: int


def factors(kernel: AdaptedKernel) -> tuple[Labelled, Labelled]:
    """`a` and `b`, labelled, in the dtype in which the model uses the kernel."""
    dtype = kernel.w.dtype
    return (
        Labelled(kernel.a.astype(dtype), axes_of_a(kernel.roles)),
        Labelled(kernel.b.astype(dtype), axes_of_b(kernel.roles)),
    )


def multiply(
    kernel: AdaptedKernel, x: Labelled, out: Labels, *, kernel_first: bool, precision: Any, dtype: Any
) -> Product:
    """Multiplies `x` with `scale·a·b`, which is not formed, in the cheaper of the two orders.

    Args:
      kernel: the adapted kernel.
      x: what it is multiplied with; an axis that has the label of a kernel's axis is summed, unless `out` has it too.
      out: the labels of the result, in order.
      kernel_first: whether the kernel is the left operand; its factors are then, too.
      precision: as in `dot_general`.
      dtype: of the result.
    """
    a, b = factors(kernel)
    sizes = (
        dict(zip(x.labels, x.array.shape, strict=True)) | dict(enumerate(kernel.w.shape)) | {RANK: a.array.shape[-1]}
    )

    def count(labels: Collection[int]) -> int:
        return 2 * math.prod(sizes[label] for label in labels)

    def cost(order: tuple[Labelled, Labelled]) -> int:
        one, other = order
        thin = {*x.labels, *one.labels} & {*other.labels, *out}
        return count({*x.labels, *one.labels}) + count({*thin, *other.labels})

    one, other = min(((a, b), (b, a)), key=cost)
    left, right = (one, x) if kernel_first else (x, one)
    thin_dtype = widest(x.array.dtype, kernel.w.dtype)
    thin = contract(left, right, keep={*other.labels, *out}, precision=precision, dtype=thin_dtype)
    array = expand(kernel, thin, other, out, kernel_first=kernel_first, precision=precision, dtype=dtype)
    # Beside the two products: the scale on the thin one, and the sum with the base's.
    return Product(array, cost((one, other)) + thin.array.size + array.size)


def expand(
    kernel: AdaptedKernel,
    thin: Labelled,
    factor: Labelled,
    out: Labels,
    *,
    kernel_first: bool,
    precision: Any,
    dtype: Any,
) -> Array:
    """Scales the product of rank r and multiplies it with the second factor; the axes of the result are `out`.

    The scale goes here, on the smallest array there is, and not on the output.
    """
    scaled = thin._replace(array=thin.array * kernel.scale)
    left, right = (factor, scaled) if kernel_first else (scaled, factor)
    return contract(left, right, keep=out, precision=precision, dtype=dtype).in_order(out)
