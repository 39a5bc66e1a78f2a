"""A product of two adapted kernels, neither of which is formed:

    (W1 + s1·A1·B1)·K2 = W1·K2 + s1·A1·(B1·K2)

The first term is that of a plain array with an adapted kernel; this file has the second, for any dimension numbers.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import jax

from ..._core.axes import RANK
from ..._core.base import as_array
from ..._core.contract import Labelled, Labels, computable, contract
from ..._core.kernel import AdaptedKernel
from ..._core.placement import names_of
from ..._core.sizes import smallest
from .factored import Product, factors, multiply, thin_dtype


def through(
    first: AdaptedKernel, second: AdaptedKernel, labels: Labels, out: Labels, *, precision: Any, like: Any
) -> Product:
    """Multiplies `s1·a1·b1` with the second kernel, by the factor that makes the thinner product first.

    Args:
      first: the left operand.
      second: the right operand; its axes are labelled by their numbers.
      labels: of the axes of `first`: an axis that meets one of `second` has its label.
      out: the labels of the result, in order.
      precision: as in `dot_general`.
      like: the type of the result.
    """
    rank = max((*labels, *out, second.w.ndim)) + 1  # a label for the first's rank; the second's has RANK
    one_and_other = [
        factor._replace(labels=tuple(rank if axis == RANK else labels[axis] for axis in factor.labels))
        for factor in factors(first)
    ]
    sizes = dict(zip(labels, first.w.shape, strict=True)) | dict(enumerate(second.w.shape)) | {rank: first.a.shape[-1]}

    def thin_labels(one: Labelled, other: Labelled) -> Labels:
        return tuple(
            label for label in dict.fromkeys((*one.labels, *range(second.w.ndim))) if label in (*other.labels, *out)
        )

    def count(labels: Collection[int]) -> int:
        return 2 * math.prod(sizes[label] for label in {*labels})

    def cost(order: tuple[Labelled, Labelled]) -> int:
        one, other = order
        return count((*one.labels, *range(second.w.ndim))) + count((*thin_labels(one, other), *other.labels))

    a, b = one_and_other
    one, other = smallest(((a, b), (b, a)), key=cost)
    dtype = thin_dtype(first.w.dtype, second.w.dtype, like.dtype)
    keep = thin_labels(one, other)
    plain_second = Labelled(as_array(second.w).astype(computable(second.w.dtype)), tuple(range(second.w.ndim)))
    base = contract(one, plain_second, keep=keep, precision=precision, dtype=dtype)
    plain = base.in_order(keep)
    low_rank = multiply(second, one, keep, kernel_first=False, precision=precision, like=jax.typeof(plain))
    thin = Labelled((plain + low_rank.array) * first.scale, keep)
    names = names_of(out, like)
    product = contract(other, thin, keep=out, precision=precision, dtype=computable(like.dtype), names=names)
    array = product.in_order(out)
    flops = cost((one, other)) + low_rank.flops + 2 * thin.array.size + array.size
    return Product(array, flops)
