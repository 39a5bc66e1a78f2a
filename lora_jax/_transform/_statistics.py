"""What the activations that meet a kernel are like, sent back in place of the gradient of its factor `a`.

A statistic is a sum over activations, and so is a gradient: reverse mode adds it up over tokens, uses, turns of loops
and devices, and gives each layer of a stack its own. The kernels are adapted by *taps*: `b` is zero, so that the model
is what it is, and the columns of `a` are what the statistic is asked for.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._adapter import AdaptedKernel
from .._axes import axes_of_b
from .._contract import widest
from ._forms import Contraction


class Statistic(enum.Enum):
    """A sum over the rows x of X, all activations that meet a kernel, for each column of `a`."""

    GRAM = "Σ xᵀ·(x·a)"
    TOTAL = "Σ xᵀ"
    COUNT = "Σ 1, where `a` is 1"


def observed(
    kernel: AdaptedKernel, x: Array, contraction: Contraction, statistic: Statistic, *, roles: Sequence[str]
) -> Array:
    """The contraction with the base, of which the gradient of `a` is the statistic, whatever the cotangent is.

    Args:
      kernel: adapted by a tap.
      x: what it meets.
      contraction: of the two.
      statistic: of `x`.
      roles: the role of each axis of the kernel in this use; its inputs are the adapter's.
    """
    # In the product `x·a` the outputs are one, or one for each group.
    ones = {
        axis: size if "b" in both else contraction.groups
        for axis, (size, *both) in enumerate(zip(kernel.w.shape, kernel.roles, roles, strict=True))
    }
    b = [ones.get(axis, 1) for axis in axes_of_b(kernel.roles)]
    scale = kernel.scale
    wide = widest(x.dtype, kernel.w.dtype, jnp.float32)

    def forward(x: Array, w: Array, a: Array) -> tuple[Array, tuple[Array, Array]]:
        return contraction.base(x, w), (x, a)

    def backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Any, None, Array]:
        del cotangent
        x, a = kept
        # A zero that is an array: what JAX knows to be zero it does not carry back to the layers below.
        back = jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else None
        columns = jnp.moveaxis(a.astype(wide), -1, 0)
        with jax.default_matmul_precision("highest"):
            its = _sum(x.astype(wide), columns, contraction, statistic, jnp.ones(b, wide))
        if (
            statistic is Statistic.COUNT
        ):  # what scales the kernel scales x as the leaf sees it, but not how many there are
            its = its / (scale * columns)
        return back, None, jnp.moveaxis(its, 0, -1).astype(a.dtype)

    function = jax.custom_vjp(lambda x, w, a: contraction.base(x, w))
    function.defvjp(forward, backward)
    return function(x, kernel.w, kernel.a)


def _sum(x: Array, columns: Array, contraction: Contraction, statistic: Statistic, b: Array) -> Array:
    """The statistic for each column, by the transpose of the product `x·column`."""
    if statistic is Statistic.COUNT:
        x = jnp.ones_like(x)
    product = jax.vmap(lambda column: contraction.low_rank(x, column[..., None], b, x.dtype))
    y, transposed = jax.vjp(product, columns)
    return transposed(y if statistic is Statistic.GRAM else jnp.ones_like(y))[0]
