"""What the activations that meet a kernel are like, sent back in place of the gradient of its factor `a`.

A statistic is a sum over activations, and so is a gradient: reverse mode adds it up over tokens, uses, turns of loops
and devices, and gives each layer of a stack its own. The kernels are adapted by *taps*: `b` is zero, so that the model
is what it is, and the columns of `a` are what the statistic is asked for.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._core.contract import widest
from .._core.kernel import AdaptedKernel

Operation = Callable[..., Array]


class Statistic(enum.Enum):
    """A sum over the rows x of X, all activations that meet a kernel, for each column of `a`."""

    GRAM = "Σ xᵀ·(x·a)"
    TOTAL = "Σ xᵀ"
    COUNT = "Σ 1, where `a` is 1"


def observed(
    kernel: AdaptedKernel, x: Array, base: Operation, thin: Operation, *others: Array, statistic: Statistic
) -> Array:
    """The base's operation, of which the gradient of `a` is the statistic, whatever the cotangent is.

    Args:
      kernel: adapted by a tap.
      x: what it meets.
      base: `base(x, w, *others)`.
      thin: `thin(x, a, *others)`: the same with `a` alone, a row for each of X.
      *others: what else the operation takes.
      statistic: of `x`.
    """
    wide, scale = widest(x.dtype, kernel.w.dtype, jnp.float32), kernel.scale

    def forward(x: Array, w: Array, a: Array, *others: Array) -> tuple[Array, tuple[Array, ...]]:
        return base(x, w, *others), (x, a, *others)

    def backward(kept: tuple[Array, ...], cotangent: Array) -> tuple[Any, ...]:
        del cotangent
        x, a, *others = kept
        # What scales the kernel scales x as the leaf sees it.
        its = _sum(x.astype(wide) * scale, a.astype(wide), lambda x, a: thin(x, a, *others), statistic)
        # Zero, but an array, to be carried on: the layers below are to be reached too.
        back = jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else None
        return back, None, its.astype(a.dtype), *(None for _ in others)

    function = jax.custom_vjp(lambda x, w, a, *others: base(x, w, *others))
    function.defvjp(forward, backward)
    return function(x, kernel.w, kernel.a, *others)


def _sum(x: Array, a: Array, thin: Operation, statistic: Statistic) -> Array:
    """The statistic for each column of `a`, by the transpose of the product `x·a`."""
    if statistic is Statistic.COUNT:
        x = jnp.ones_like(x)
    y, transposed = jax.vjp(lambda a: thin(x, a), a)
    (its,) = transposed(y if statistic is Statistic.GRAM else jnp.ones_like(y))
    # An array that scales the kernel may have scaled `a`; how many rows there are it leaves alone.
    return its / a if statistic is Statistic.COUNT else its
