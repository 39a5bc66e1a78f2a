"""The product of two adapted kernels, neither of which is materialized:

    (W1 + s1·A1·B1)·K2 = W1·K2 + s1·A1·(B1·K2)

The first term is the product of an array and an adapted kernel. This file computes the second.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import jax

from ..._core.axes import RANK
from ..._core.base import as_array
from ..._core.contract import Labeled, Labels, computable, contract
from ..._core.kernel import AdaptedKernel
from ..._core.placement import names_of
from ..._core.sizes import smallest
from .factored import Product, labeled_factors, multiply_low_rank, thin_dtype


def multiply_kernels(
    left: AdaptedKernel, right: AdaptedKernel, labels: Labels, out: Labels, *, precision: Any, like: Any
) -> Product:
    """Multiplies `s1·a1·b1` with the right kernel, in the order of the two factors that needs fewer FLOPs.

    Args:
      left: the left operand.
      right: the right operand; its axes are labeled by their numbers.
      labels: of the axes of `left`; an axis that is multiplied with an axis of `right` has its label.
      out: the labels of the result, in order.
      precision: as in `dot_general`.
      like: the type of the result.
    """
    left_rank = max((*labels, *out, right.w.ndim)) + 1  # the label of the left rank axis; the right one is RANK
    a, b = (
        factor._replace(labels=tuple(left_rank if axis == RANK else labels[axis] for axis in factor.labels))
        for factor in labeled_factors(left)
    )
    right_labels = tuple(range(right.w.ndim))
    sizes = dict(zip(labels, left.w.shape, strict=True)) | dict(enumerate(right.w.shape))
    sizes[left_rank] = left.a.shape[-1]

    def thin_labels(first: Labeled, second: Labeled) -> Labels:
        return tuple(
            label for label in dict.fromkeys((*first.labels, *right_labels)) if label in (*second.labels, *out)
        )

    def product_flops(labels: Collection[int]) -> int:
        return 2 * math.prod(sizes[label] for label in {*labels})

    def order_flops(order: tuple[Labeled, Labeled]) -> int:
        products = (*order[0].labels, *right_labels), (*thin_labels(*order), *order[1].labels)
        return sum(map(product_flops, products))

    first, second = smallest(((a, b), (b, a)), key=order_flops)
    dtype = thin_dtype(left.w.dtype, right.w.dtype, like.dtype)
    keep = thin_labels(first, second)
    right_base = Labeled(as_array(right.w).astype(computable(right.w.dtype)), right_labels)
    base = contract(first, right_base, keep=keep, precision=precision, dtype=dtype)
    plain = base.in_order(keep)
    low_rank = multiply_low_rank(right, first, keep, kernel_first=False, precision=precision, like=jax.typeof(plain))
    thin = Labeled((plain + low_rank.array) * left.scale, keep)
    names = names_of(out, like)
    product = contract(second, thin, keep=out, precision=precision, dtype=computable(like.dtype), names=names)
    array = product.in_order(out)
    return Product(array, order_flops((first, second)) + low_rank.flops + 2 * thin.array.size + array.size)
