"""The low-rank product by itself: `((x·A)·s)·B`, thin side first.

The axes of a kernel are labelled by their numbers, so `axes_of_a` and `axes_of_b` are the labels of its factors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from ..._core.axes import RANK, axes_of_a, axes_of_b
from ..._core.contract import Labelled, Labels, computable, contract, is_narrow, widest
from ..._core.kernel import AdaptedKernel
from ..._core.placement import names_of
from ..._core.sizes import smallest
from .costs import Costs, Form, Passes, added


class Product(NamedTuple):
    """A low-rank product, and the floating-point operations that it takes."""

    array: Array
    flops: int


def factors(kernel: AdaptedKernel) -> tuple[Labelled, Labelled]:
    """`a` and `b`, labelled, in the dtype in which the model uses the kernel, of 16 bits at least."""
    dtype = computable(kernel.w.dtype)
    return (
        Labelled(kernel.a.astype(dtype), axes_of_a(kernel.roles)),
        Labelled(kernel.b.astype(dtype), axes_of_b(kernel.roles)),
    )


def thin_dtype(x: Any, w: Any, y: Any) -> Any:
    """The dtype of a product of rank r, by those of `x`, the kernel and the result: of the result's range at least."""
    dtype = widest(x, w)
    return dtype if jnp.finfo(dtype).maxexp >= jnp.finfo(y).maxexp else widest(dtype, y)


def precision_of_factors(precision: Any, x: Any, w: Any, y: Any) -> Any:
    """The precision of the products with factors, by that of the product `x·w` with the result `y` and their dtypes.

    It is the same, but for an algorithm that is made for operands which are narrow, or of a narrower range than `y`.
    """
    if isinstance(precision, lax.DotAlgorithm):
        types: tuple[Any, ...] = (precision.lhs_precision_type, precision.rhs_precision_type)
    elif isinstance(precision, lax.DotAlgorithmPreset):
        if precision == lax.DotAlgorithmPreset.DEFAULT:
            return precision
        # Those that say nothing of the operands' types take any in 8 bits.
        types = (*(precision.supported_lhs_types or [x]), *(precision.supported_rhs_types or [w]))
    else:
        return precision
    fits = all(not is_narrow(its) and jnp.finfo(its).maxexp >= jnp.finfo(y).maxexp for its in types)
    return precision if fits and not is_narrow(x) and not is_narrow(w) else None


def low_rank(
    kernel: AdaptedKernel, x: Labelled, out: Labels, *, kernel_first: bool, precision: Any, like: Any
) -> tuple[Callable[[Array, Array, Array], Array], Costs]:
    """The product of `x` with `scale·a·b`, which is not formed, in the cheaper of the two orders.

    Args:
      kernel: the adapted kernel.
      x: what it is multiplied with; an axis that has the label of a kernel's axis is summed, unless `out` has it too.
      out: the labels of the result, in order.
      kernel_first: whether the kernel is the left operand; its factors are then, too.
      precision: as in `dot_general`.
      like: the type of the result; where that is narrow, the product is in bfloat16.

    Returns:
      `multiply(x, a, b)`, which holds no array, and the operations of the contraction that it is a part of.
    """
    kernel, x_labels, x_size = kernel.abstract, x.labels, x.array.size
    sizes = dict(zip(x_labels, x.array.shape, strict=True)) | dict(enumerate(kernel.w.shape))
    sizes[RANK] = kernel.a.shape[-1]
    axes, labels_of_a, labels_of_b = set(range(kernel.w.ndim)), axes_of_a(kernel.roles), axes_of_b(kernel.roles)

    def size(labels: Collection[int]) -> int:
        return math.prod(sizes[label] for label in labels)

    def costs(one: Labels, other: Labels) -> Costs:
        thin = {*x_labels, *one} & {*other, *out}
        return Costs(
            base=Passes.alike(2 * size({*x_labels, *axes})),
            first=Passes.alike(2 * size({*x_labels, *one})),
            second=Passes.alike(2 * size({*thin, *other})),
            formed=2 * size({*axes, RANK}),
            x=x_size,
            y=size(out),
            thin=size(thin),
            sums=kernel.a.size + kernel.w.size,
        )

    orders = {True: costs(labels_of_a, labels_of_b), False: costs(labels_of_b, labels_of_a)}
    a_first = smallest([*orders], key=lambda order: orders[order].first.forward + orders[order].second.forward)

    def multiply(array: Array, a: Array, b: Array) -> Array:
        both = factors(dataclasses.replace(kernel, a=a, b=b))
        one, other = both if a_first else both[::-1]
        given = Labelled(array.astype(computable(array.dtype)), x_labels)
        left, right = (one, given) if kernel_first else (given, one)
        dtype = thin_dtype(array.dtype, kernel.w.dtype, like.dtype)
        thin = contract(left, right, keep={*other.labels, *out}, precision=precision, dtype=dtype)
        return expand(kernel, thin, other, out, kernel_first=kernel_first, precision=precision, like=like)

    return multiply, orders[a_first]


def product_with_a(kernel: AdaptedKernel, x_labels: Labels, out: Labels) -> Callable[[Array, Array], Array]:
    """The product of `x` with `a` alone; from there `b` would go to the labels of `out`."""
    labels, keep = axes_of_a(kernel.roles), {*axes_of_b(kernel.roles), *out}

    def multiply(x: Array, a: Array) -> Array:
        return contract(Labelled(x, x_labels), Labelled(a, labels), keep=keep, precision=lax.Precision.HIGHEST).array

    return multiply


def multiply(
    kernel: AdaptedKernel, x: Labelled, out: Labels, *, kernel_first: bool, precision: Any, like: Any
) -> Product:
    """`low_rank`, made at once."""
    product, costs = low_rank(kernel, x, out, kernel_first=kernel_first, precision=precision, like=like)
    return Product(product(x.array, kernel.a, kernel.b), added(Form.FACTORED, costs))


def expand(
    kernel: AdaptedKernel,
    thin: Labelled,
    factor: Labelled,
    out: Labels,
    *,
    kernel_first: bool,
    precision: Any,
    like: Any,
) -> Array:
    """Scales the product of rank r and multiplies it with the second factor.

    The axes of the result are `out`, its type is `like`, but bfloat16 where that is narrow.

    The scale goes here, on the smallest array there is, and not on the output.
    """
    scaled = thin._replace(array=thin.array * kernel.scale)
    left, right = (factor, scaled) if kernel_first else (scaled, factor)
    names = names_of(out, like)
    dtype = computable(like.dtype)
    return contract(left, right, keep=out, precision=precision, dtype=dtype, names=names).in_order(out)
