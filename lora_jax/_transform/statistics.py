"""Sums over the activations that are multiplied with a kernel, returned as the gradient of its factor `a`.

A gradient is a sum over activations: reverse mode adds it over tokens, uses, loop iterations and devices, and keeps
the layers of a stack apart. Kernels are adapted with *taps*, whose factors do not contribute to the result. Each column
of `a` receives one sum; concatenated kernels keep their columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._compat import varying
from .._core.axes import axes_of_a, axes_of_b, axes_with, sizes, width
from .._core.contract import Labeled, widest
from .._core.kernel import AdaptedKernel
from .contraction.routing import weigh

Operation = Callable[..., Array]
Product = Callable[..., Labeled]


def tap(w: Array, axes: str, path: str) -> AdaptedKernel:
    """Returns a kernel with d inputs whose factor `a` has one column for each sum over the rows x of its activations.

    The first d columns are the identity and receive Σ xᵀx. The next one is zero and receives Σ xᵀ; it is marked by the
    only row of `b` that is not zero. The last one is 1 and receives Σ 1, the number of rows.
    """
    dtype, d_in = widest(w.dtype, jnp.float32), width(axes, w.shape, "i")
    shape_a, shape_b = (sizes(layout(axes), w.shape, d_in + 2) for layout in (axes_of_a, axes_of_b))
    columns = jnp.concatenate([jnp.eye(d_in, d_in + 1, dtype=dtype), jnp.ones((d_in, 1), dtype)], 1)
    a = jnp.broadcast_to(columns.reshape(shape_a[axes.count("b") :]), shape_a)
    row = jnp.zeros(d_in + 2, dtype).at[d_in].set(1)
    b = jnp.broadcast_to(lax.expand_dims(row, range(1, 1 + len(axes_with(axes, "o")))), shape_b)
    return AdaptedKernel(w, a, b, scale=1.0, roles=tuple(axes), paths=(path,))


def sum_activations(
    kernel: AdaptedKernel, x: Array, base: Operation, x_times_a: Product, *others: Array, weights: Labeled | None = None
) -> Array:
    """Evaluates the base's operation such that the gradient of `a` is the sums, whatever the cotangent.

    Args:
      kernel: adapted with a tap.
      x: the activation.
      base: `base(x, w, *others)`, the operation.
      x_times_a: `x_times_a(x, a, *others)`, the product with `a` only.
      *others: further operands of the operation.
      weights: the weights of the tokens for each column of `a`, if they have some.
    """
    wide, scale, batch = widest(x.dtype, kernel.w.dtype, jnp.float32), kernel.scale, kernel.roles.count("b")
    is_total = jnp.any(kernel.b != 0, range(batch + 1, kernel.b.ndim))  # (batch…, rank)
    of_total, of_a = varying(jax.typeof(is_total)), varying(jax.typeof(kernel.a))
    if axes := of_total - of_a:  # in a `shard_map`, the axes along which `b` is sharded
        is_total = lax.pmax(is_total.astype(jnp.int8), tuple(axes)) > 0
    is_total = lax.expand_dims(is_total, range(batch, kernel.a.ndim - 1))
    # The backward pass must not close over an array, which may be one of the trace of the forward pass.
    array, labels = (None, None) if weights is None else weights

    def forward(x: Array, w: Array, a: Array, is_total: Array, array: Any, *others: Array) -> tuple[Array, Any]:
        return base(x, w, *others), (x, a, is_total, array, *others)

    def backward(residuals: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
        del cotangent
        x, a, is_total, array, *others = residuals
        own = None if labels is None else Labeled(array, labels)
        # (x·s)·w = x·(s·w): the leaf w is multiplied with x·s.
        sums = _sums(x.astype(wide) * scale, a.astype(wide), is_total, lambda x, a: x_times_a(x, a, *others), own)
        # An array of zeros and not a symbolic zero, so that the backward pass continues to the layers below.
        back = jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else None
        return back, None, sums.astype(a.dtype), None, None, *(None for _ in others)

    function = jax.custom_vjp(lambda x, w, a, is_total, array, *others: base(x, w, *others))
    function.defvjp(forward, backward)
    return function(x, kernel.w, kernel.a, is_total, array, *others)


def _sums(x: Array, a: Array, is_total: Array, x_times_a: Product, weights: Labeled | None) -> Array:
    """Computes the sum of each column of `a` with the transpose of the product `x·a`, whose rows are weighted."""

    def weighted(x: Array, a: Array) -> Array:
        product = x_times_a(x, a)
        return (product if weights is None else weigh(product, weights)).array

    def total(x: Array) -> Array:
        y, transposed = jax.vjp(lambda columns: weighted(x, columns), jnp.ones_like(a[..., :different]))
        return transposed(jnp.ones_like(y))[0]

    different = 1 if weights is None else weights.array.shape[-1]  # 1 if all columns have the same weights
    y, transposed = jax.vjp(lambda a: weighted(x, a), a)
    (gram,) = transposed(y if weights is None else x_times_a(x, a).array)
    is_count = jnp.roll(is_total, 1, -1)
    # An array that scales the kernel may have scaled `a`, but must not change the number of rows.
    count = total(jnp.ones_like(x)) / jnp.where(is_count & (a != 0), a, 1)
    return jnp.where(is_total, total(x), jnp.where(is_count, count, gram))
