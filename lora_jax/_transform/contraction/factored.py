"""The low-rank term `((x·A)·s)·B`.

The axes of a kernel are labeled by their numbers, so `axes_of_a` and `axes_of_b` are the labels of its factors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from ..._core.axes import RANK, axes_of_a, axes_of_b
from ..._core.contract import Labeled, Labels, computable, contract, is_narrow, widest
from ..._core.kernel import AdaptedKernel
from ..._core.placement import names_of
from ..._core.sizes import smallest
from .costs import Costs, Form, Passes, added_flops
from .operation import LowRankTerm
from .routing import weigh


class Product(NamedTuple):
    """A low-rank product and its FLOPs."""

    array: Array
    flops: int


def labeled_factors(kernel: AdaptedKernel) -> tuple[Labeled, Labeled]:
    """Returns `a` and `b` with labels, in the dtype in which the model uses the kernel, or bfloat16 if it is narrow."""
    dtype = computable(kernel.w.dtype)
    return (
        Labeled(kernel.a.astype(dtype), axes_of_a(kernel.roles)),
        Labeled(kernel.b.astype(dtype), axes_of_b(kernel.roles)),
    )


def thin_dtype(x: Any, w: Any, y: Any) -> Any:
    """Returns the dtype of the product of rank r, whose range is at least that of the result."""
    dtype = widest(x, w)
    return dtype if jnp.finfo(dtype).maxexp >= jnp.finfo(y).maxexp else widest(dtype, y)


def precision_of_factors(precision: Any, x: Any, w: Any, y: Any) -> Any:
    """Returns the precision of the products with factors, given that of `x·w` and the dtypes of `x`, `w` and `y`.

    It is the same, except for an algorithm whose operands are narrow or have a narrower range than the result.
    """
    if isinstance(precision, lax.DotAlgorithm):
        types: tuple[Any, ...] = (precision.lhs_precision_type, precision.rhs_precision_type)
    elif isinstance(precision, lax.DotAlgorithmPreset):
        if precision == lax.DotAlgorithmPreset.DEFAULT:
            return precision
        # Presets without operand types accept any 8-bit dtype.
        types = (*(precision.supported_lhs_types or [x]), *(precision.supported_rhs_types or [w]))
    else:
        return precision
    fits = all(not is_narrow(dtype) and jnp.finfo(dtype).maxexp >= jnp.finfo(y).maxexp for dtype in types)
    return precision if fits and not is_narrow(x) and not is_narrow(w) else None


def low_rank_product(
    kernel: AdaptedKernel, x: Labeled, out: Labels, *, kernel_first: bool, precision: Any, like: Any
) -> tuple[LowRankTerm, Costs]:
    """Returns a function that multiplies `x` with `scale·a·b` by its factors, in the order that needs fewer FLOPs.

    Args:
      kernel: the adapted kernel.
      x: the operand; an axis with the label of a kernel's axis is contracted, unless `out` has that label.
      out: the labels of the result, in order.
      kernel_first: whether the kernel, and so each factor, is the left operand.
      precision: as in `dot_general`.
      like: the type of the result; if that is narrow, the product is in bfloat16.

    Returns:
      `multiply(x, a, b, weights)`, which closes over no array, and the costs of the whole contraction.
    """
    kernel, x_labels, x_size = kernel.abstract, x.labels, x.array.size
    sizes = dict(zip(x_labels, x.array.shape, strict=True)) | dict(enumerate(kernel.w.shape))
    sizes[RANK] = kernel.a.shape[-1]
    axes, labels_of_a, labels_of_b = set(range(kernel.w.ndim)), axes_of_a(kernel.roles), axes_of_b(kernel.roles)

    def size(labels: Collection[int]) -> int:
        return math.prod(sizes[label] for label in labels)

    def costs(first: Labels, second: Labels) -> Costs:
        thin = {*x_labels, *first} & {*second, *out}
        return Costs(
            base=Passes.equal(2 * size({*x_labels, *axes})),
            first=Passes.equal(2 * size({*x_labels, *first})),
            second=Passes.equal(2 * size({*thin, *second})),
            delta=2 * size({*axes, RANK}),
            x=x_size,
            y=size(out),
            thin=size(thin),
            adding=kernel.a.size + kernel.w.size,
        )

    orders = {True: costs(labels_of_a, labels_of_b), False: costs(labels_of_b, labels_of_a)}
    a_first = smallest([*orders], key=lambda order: orders[order].first.forward + orders[order].second.forward)

    def multiply(array: Array, a: Array, b: Array, weights: Labeled | None = None, /) -> Array:
        factors = labeled_factors(dataclasses.replace(kernel, a=a, b=b))
        first, second = factors if a_first else factors[::-1]
        x = Labeled(array.astype(computable(array.dtype)), x_labels)
        left, right = (first, x) if kernel_first else (x, first)
        dtype = thin_dtype(array.dtype, kernel.w.dtype, like.dtype)
        thin = contract(left, right, keep={*second.labels, *out}, precision=precision, dtype=dtype)
        thin = thin if weights is None else weigh(thin, weights)
        return multiply_second(kernel, thin, second, out, kernel_first=kernel_first, precision=precision, like=like)

    return multiply, orders[a_first]


def product_with_a(kernel: AdaptedKernel, x_labels: Labels, out: Labels) -> Callable[[Array, Array], Labeled]:
    """Returns a function that multiplies `x` with `a` only, where the product with `b` would have the labels `out`."""
    labels, keep = axes_of_a(kernel.roles), {*axes_of_b(kernel.roles), *out}

    def multiply(x: Array, a: Array) -> Labeled:
        return contract(Labeled(x, x_labels), Labeled(a, labels), keep=keep, precision=lax.Precision.HIGHEST)

    return multiply


def multiply_low_rank(
    kernel: AdaptedKernel, x: Labeled, out: Labels, *, kernel_first: bool, precision: Any, like: Any
) -> Product:
    """Multiplies `x` with `scale·a·b` by its factors."""
    product, costs = low_rank_product(kernel, x, out, kernel_first=kernel_first, precision=precision, like=like)
    return Product(product(x.array, kernel.a, kernel.b), added_flops(Form.FACTORED, costs))


def multiply_second(
    kernel: AdaptedKernel,
    thin: Labeled,
    factor: Labeled,
    out: Labels,
    *,
    kernel_first: bool,
    precision: Any,
    like: Any,
) -> Array:
    """Scales the product of rank r and multiplies it with the second factor.

    The result has the axes `out` and the type `like`, or bfloat16 if that is narrow.
    """
    # The product of rank r is the smallest array, so scaling it needs the fewest FLOPs.
    scaled = thin._replace(array=thin.array * kernel.scale)
    left, right = (factor, scaled) if kernel_first else (scaled, factor)
    names = names_of(out, like)
    dtype = computable(like.dtype)
    return contract(left, right, keep=out, precision=precision, dtype=dtype, names=names).in_order(out)
