"""The product of a kernel and a scalar, or an array that is constant along the inputs or along the outputs.

    c·(w + s·a·b) = c·w + s·(c·a)·b = c·w + s·a·(c·b)

A scalar is multiplied into the scale, an array into the smaller factor that has all axes along which it varies.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..._compat import primitives
from ..._core.axes import RANK, axes_of_a, axes_of_b
from ..._core.contract import widest
from ..._core.kernel import AdaptedKernel, PlainKernel, TrackedKernel
from ..._core.sizes import may_exceed, smallest
from ..._core.stored import Change
from ..interpreter import NoRule, Site, Value, base_value
from ..registry import rule

Axes = tuple[int, ...]


@rule(primitives.neg_p, "moved")
def _neg(site: Site, kernel: TrackedKernel) -> TrackedKernel:
    """The scale is negated."""
    del site
    moved = kernel.with_base(Change(operator.neg, elementwise=True))
    return dataclasses.replace(moved, scale=-moved.scale) if isinstance(moved, AdaptedKernel) else moved


@rule(primitives.mul_p, "moved")
def _mul(site: Site, x: Value, y: Value, *, out_dtype: Any) -> TrackedKernel:
    """The scale is multiplied by a scalar, a factor by an array that varies only along inputs or only along outputs."""
    if out_dtype is not None:
        raise NoRule("a product that changes the dtype")
    kernel = smallest((x, y), key=_precedence)
    c = y if kernel is x else x
    return _scale_kernel(site, kernel, c, operator.mul)


@rule(primitives.div_p, "moved")
def _div(site: Site, x: Value, y: Value) -> TrackedKernel:
    """As `mul`; a division by the kernel is refused."""
    if not isinstance(x, TrackedKernel):
        raise NoRule("the kernel is the divisor")
    return _scale_kernel(site, x, y, operator.truediv)


def _precedence(x: Value) -> tuple[bool, bool, int]:
    """A sort key for the operands of a product, whose first is the kernel: adapted kernels, kernels, larger ones."""
    return not isinstance(x, AdaptedKernel), not isinstance(x, TrackedKernel), -math.prod(np.shape(base_value(x)))


def _scale_kernel(site: Site, kernel: Any, c: Value, operation: Callable[..., Any]) -> TrackedKernel:
    """Multiplies or divides a kernel by `c`, as `operation` does."""
    sizes = np.shape(base_value(c)) or (1,) * kernel.w.ndim
    varying = {axis for axis, size in enumerate(sizes) if may_exceed(size, 1)}
    shape = lax.broadcast_shapes(kernel.w.shape, sizes)
    if not isinstance(kernel, AdaptedKernel):
        _check_plain(kernel, shape, varying)
        return kernel.with_base(Change(operation), site.to_array(c, ""))
    axes = {"a": axes_of_a(kernel.roles), "b": axes_of_b(kernel.roles)}
    names = [name for name, factor_axes in axes.items() if varying <= set(factor_axes)]
    if not names:
        raise NoRule("a product with an array that varies along inputs and outputs")
    c = site.to_array(c, "a product of two kernels, element by element")
    if np.ndim(c) == 0 and not isinstance(c, Array) and c:
        scaled = kernel.with_base(Change(operation, (c,), elementwise=True))
        return dataclasses.replace(scaled, scale=operation(kernel.scale, float(c)))

    def repeat(factor: Array, before: Axes, after: Axes) -> Array:
        rank = factor.shape[before.index(RANK)]
        return jnp.broadcast_to(factor, [rank if axis == RANK else shape[axis] for axis in after])

    kernel = kernel.moved(Change(operation), kernel.roles, repeat, c)  # c can broadcast axes of size 1
    name = smallest(names, key=lambda name: getattr(kernel, name).size)
    factor, c = getattr(kernel, name), _broadcastable(jnp.asarray(c), axes[name])
    dtype = widest(factor.dtype, c.dtype)
    scaled = dataclasses.replace(kernel, **{name: operation(factor.astype(dtype), c.astype(dtype))})
    return scaled.with_replicated({name: ()})  # c may differ between devices


def _broadcastable(c: Array, axes: Axes) -> Array:
    """Reshapes `c`, which has the axes of the kernel or none, so that it broadcasts against a factor."""
    if c.ndim == 0:
        return c
    kept = [axis for axis in axes if axis != RANK]
    dropped = [axis for axis in range(c.ndim) if axis not in kept]
    return c.transpose(*kept, *dropped).reshape([1 if axis == RANK else c.shape[axis] for axis in axes])


def _check_plain(kernel: PlainKernel, shape: Axes, varying: set[int]) -> None:
    """Raises if by its shape a leaf is not a kernel that is scaled, but for example the scale of a norm."""
    leaf_axes = {axis for axis, label in enumerate(kernel.roles) if label and may_exceed(kernel.w.shape[axis], 1)}
    repeated = {axis for axis, size in enumerate(shape) if len(shape) == kernel.w.ndim and size != kernel.w.shape[axis]}
    if len(shape) != kernel.w.ndim or leaf_axes <= varying or any(kernel.roles[axis] for axis in repeated):
        raise NoRule("an elementwise product")
