"""A kernel times a number, or times an array that is constant along its inputs or along its outputs.

    c·(w + s·a·b) = c·w + s·(c·a)·b = c·w + s·a·(c·b)

A number joins the scale; an array joins the smaller of the factors that have all the axes along which it varies.
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
from ..._core.base import Change
from ..._core.contract import widest
from ..._core.kernel import AdaptedKernel, PlainKernel, TrackedKernel
from ..._core.sizes import may_exceed, smallest
from ..interpreter import NoRule, Site, Value, base_of
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
    """A number joins the scale; an array that varies along inputs or outputs alone joins a factor."""
    if out_dtype is not None:
        raise NoRule("a product that changes the dtype")
    kernel = smallest((x, y), key=_precedence)
    c = y if kernel is x else x
    return _scaled(site, kernel, c, operator.mul)


@rule(primitives.div_p, "moved")
def _div(site: Site, x: Value, y: Value) -> TrackedKernel:
    """As `mul`; a quotient by the kernel is refused."""
    if not isinstance(x, TrackedKernel):
        raise NoRule("something is divided by the kernel")
    return _scaled(site, x, y, operator.truediv)


def _precedence(x: Value) -> tuple[bool, bool, int]:
    """Orders two operands of a product: the adapted one is the kernel and comes first; of two, the larger."""
    return not isinstance(x, AdaptedKernel), not isinstance(x, TrackedKernel), -math.prod(np.shape(base_of(x)))


def _scaled(site: Site, kernel: Any, c: Value, times: Callable[..., Any]) -> TrackedKernel:
    """`times` is the product or the quotient."""
    sizes = np.shape(base_of(c)) or (1,) * kernel.w.ndim
    varying = {axis for axis, size in enumerate(sizes) if may_exceed(size, 1)}
    shape = lax.broadcast_shapes(kernel.w.shape, sizes)
    if not isinstance(kernel, AdaptedKernel):
        _check_plain(kernel, shape, varying)
        return kernel.with_base(Change(times), site.array(c, ""))
    axes = {"a": axes_of_a(kernel.roles), "b": axes_of_b(kernel.roles)}
    takers = [name for name, its in axes.items() if varying <= set(its)]
    if not takers:
        raise NoRule("a product with an array that varies along inputs and outputs")
    c = site.array(c, "another kernel is multiplied with it")
    if np.ndim(c) == 0 and not isinstance(c, Array) and c:
        scaled = kernel.with_base(Change(times, (c,), elementwise=True))
        return dataclasses.replace(scaled, scale=times(kernel.scale, float(c)))

    def repeat(factor: Array, before: Axes, after: Axes) -> Array:
        rank = factor.shape[before.index(RANK)]
        return jnp.broadcast_to(factor, [rank if axis == RANK else shape[axis] for axis in after])

    kernel = kernel.moved(Change(times), kernel.roles, repeat, c)  # where c is longer than an axis of size 1
    taker = smallest(takers, key=lambda name: getattr(kernel, name).size)
    factor, c = getattr(kernel, taker), _along(jnp.asarray(c), axes[taker])
    dtype = widest(factor.dtype, c.dtype)
    scaled = dataclasses.replace(kernel, **{taker: times(factor.astype(dtype), c.astype(dtype))})
    return scaled.with_replicated({taker: ()})  # c may be another on each device


def _along(c: Array, axes: Axes) -> Array:
    """Gives `c`, which has an axis for each of the kernel's or none, the axes of a factor; the others have size 1."""
    if c.ndim == 0:
        return c
    kept = [axis for axis in axes if axis != RANK]
    dropped = [axis for axis in range(c.ndim) if axis not in kept]
    return c.transpose(*kept, *dropped).reshape([1 if axis == RANK else c.shape[axis] for axis in axes])


def _check_plain(kernel: PlainKernel, shape: Axes, varying: set[int]) -> None:
    """Tells by the shapes whether a leaf is a kernel that is scaled; if not, it is read, as the scale of a norm is."""
    own = {axis for axis, label in enumerate(kernel.roles) if label and may_exceed(kernel.w.shape[axis], 1)}
    repeated = {axis for axis, size in enumerate(shape) if len(shape) == kernel.w.ndim and size != kernel.w.shape[axis]}
    if len(shape) != kernel.w.ndim or own <= varying or any(kernel.roles[axis] for axis in repeated):
        raise NoRule("it is multiplied element by element")
