"""Sums over the activations that meet a kernel, sent back in place of the gradient of its factor `a`.

A gradient is a sum over activations too: reverse mode adds it up over tokens, uses, iterations of loops and devices,
and gives each layer of a stack its own. The kernels are adapted by *taps*, whose product is zero, so that the model is
what it is. Their ranks say which sum each column of `a` is for; kernels that are put side by side keep that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._compat import varying
from .._core.axes import axes_of_a, axes_of_b, axes_with, sizes, width
from .._core.contract import widest
from .._core.kernel import AdaptedKernel

Operation = Callable[..., Array]


def tap(w: Array, axes: str, path: str) -> AdaptedKernel:
    """A kernel of d inputs whose factor `a` has a column for each sum over the rows x of all activations that meet it.

    The first d columns are the identity: they get Σ xᵀx. The next one is zero, and alone has a row of `b` that is not:
    it gets Σ xᵀ. The last one is 1, and gets Σ 1.
    """
    dtype, d_in = widest(w.dtype, jnp.float32), width(axes, w.shape, "i")
    shape_a, shape_b = (sizes(its, w.shape, d_in + 2) for its in (axes_of_a(axes), axes_of_b(axes)))
    columns = jnp.concatenate([jnp.eye(d_in, d_in + 1, dtype=dtype), jnp.ones((d_in, 1), dtype)], 1)
    a = jnp.broadcast_to(columns.reshape(shape_a[axes.count("b") :]), shape_a)
    row = jnp.zeros(d_in + 2, dtype).at[d_in].set(1)
    b = jnp.broadcast_to(lax.expand_dims(row, range(1, 1 + len(axes_with(axes, "o")))), shape_b)
    return AdaptedKernel(w, a, b, scale=1.0, roles=tuple(axes), paths=(path,))


def observed(kernel: AdaptedKernel, x: Array, base: Operation, thin: Operation, *others: Array) -> Array:
    """The base's operation, of which the gradient of `a` is the sums, whatever the cotangent is.

    Args:
      kernel: adapted by a tap.
      x: what it meets.
      base: `base(x, w, *others)`.
      thin: `thin(x, a, *others)`: the same with `a` only, a row for each of X.
      *others: what else the operation takes.
    """
    wide, scale, batch = widest(x.dtype, kernel.w.dtype, jnp.float32), kernel.scale, kernel.roles.count("b")
    of_total = jnp.any(kernel.b != 0, range(batch + 1, kernel.b.ndim))  # (batch…, rank)
    if axes := varying(of_total) - varying(kernel.a):  # in a `shard_map`, over those along which `b` is sharded
        of_total = lax.pmax(of_total.astype(jnp.int8), tuple(axes)) > 0
    of_total = lax.expand_dims(of_total, range(batch, kernel.a.ndim - 1))

    def forward(x: Array, w: Array, a: Array, of_total: Array, *others: Array) -> tuple[Array, tuple[Array, ...]]:
        return base(x, w, *others), (x, a, of_total, *others)

    def backward(kept: tuple[Array, ...], cotangent: Array) -> tuple[Any, ...]:
        del cotangent
        x, a, of_total, *others = kept
        # What scales the kernel scales x as the leaf sees it.
        sums = _sums(x.astype(wide) * scale, a.astype(wide), of_total, lambda x, a: thin(x, a, *others))
        # Zero, but an array, to be carried on: the layers below are to be reached too.
        back = jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else None
        return back, None, sums.astype(a.dtype), None, *(None for _ in others)

    function = jax.custom_vjp(lambda x, w, a, of_total, *others: base(x, w, *others))
    function.defvjp(forward, backward)
    return function(x, kernel.w, kernel.a, of_total, *others)


def _sums(x: Array, a: Array, of_total: Array, thin: Operation) -> Array:
    """What each column of `a` is for, by the transpose of the product `x·a`."""

    def total(x: Array) -> Array:
        y, transposed = jax.vjp(lambda column: thin(x, column), jnp.ones_like(a[..., :1]))
        return transposed(jnp.ones_like(y))[0]

    y, transposed = jax.vjp(lambda a: thin(x, a), a)
    (gram,) = transposed(y)
    of_count = jnp.roll(of_total, 1, -1)
    # An array that scales the kernel may have scaled `a`; how many rows there are it leaves alone.
    count = total(jnp.ones_like(x)) / jnp.where(of_count & (a != 0), a, 1)
    return jnp.where(of_total, total(x), jnp.where(of_count, count, gram))
