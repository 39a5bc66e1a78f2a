"""Slices of a kernel, and axes taken away: the same of each factor that has the axis.

What is left of a kernel without an input or an output axis is a lookup's result, and is formed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..._compat import primitives
from ..._core.axes import RANK
from ..._core.base import Change
from ..._core.kernel import AdaptedKernel, TrackedKernel
from ..interpreter import NoRule, Site, Value
from ..registry import rule

Axes = tuple[int, ...]


@rule(primitives.squeeze_p, "moved")
def _squeeze(site: Site, kernel: TrackedKernel, *, dimensions: Axes) -> Value:
    """The factors are squeezed; a row or column that is left alone is formed."""

    def move(factor: Array, before: Axes, after: Axes) -> Array:
        del after
        return lax.squeeze(factor, [before.index(axis) for axis in dimensions if axis in before])

    roles = [role for axis, role in enumerate(kernel.roles) if axis not in dimensions]
    return site.left(kernel.moved(Change(lax.squeeze, (tuple(dimensions),)), roles, move))


@rule(primitives.slice_p, "moved")
def _slice(
    site: Site, kernel: TrackedKernel, *, start_indices: Axes, limit_indices: Axes, strides: Axes | None
) -> TrackedKernel:
    """The same slice of each factor that has the axis."""
    del site
    steps = strides or (1,) * kernel.w.ndim

    def move(factor: Array, before: Axes, after: Axes) -> Array:
        del after
        bounds = [
            (0, factor.shape[place], 1) if axis == RANK else (start_indices[axis], limit_indices[axis], steps[axis])
            for place, axis in enumerate(before)
        ]
        return lax.slice(factor, *zip(*bounds, strict=True))

    return kernel.moved(Change(lax.slice, (start_indices, limit_indices, strides)), kernel.roles, move)


@rule("unstack", "moved")
def _unstack(site: Site, kernel: TrackedKernel, *, axis: int) -> list[Value]:
    """Each part is such a slice, squeezed."""
    shape = kernel.w.shape

    def part(number: int) -> Value:
        starts = [number if at == axis else 0 for at in range(len(shape))]
        ends = [number + 1 if at == axis else size for at, size in enumerate(shape)]
        piece = _slice(site, kernel, start_indices=tuple(starts), limit_indices=tuple(ends), strides=None)
        return _squeeze(site, piece, dimensions=(axis,))

    return [part(number) for number in range(shape[axis])]


@rule("split", "moved")
def _split(site: Site, kernel: TrackedKernel, *, sizes: Sequence[int], axis: int) -> list[TrackedKernel]:
    """Each part is such a slice."""
    del site
    ends = list(itertools.accumulate(sizes))

    def cut(number: int) -> TrackedKernel:
        def move(factor: Array, before: Axes, after: Axes) -> Array:
            del after
            if axis not in before:
                return factor
            return lax.slice_in_dim(factor, *bounds, axis=before.index(axis))

        bounds = ends[number] - sizes[number], ends[number]
        return kernel.moved(Change(lax.slice_in_dim, (*bounds, 1, axis)), kernel.roles, move)

    return [cut(number) for number in range(len(sizes))]


@rule(primitives.dynamic_slice_p, "moved")
def _dynamic_slice(site: Site, kernel: Value, *starts: Value, slice_sizes: Axes) -> TrackedKernel:
    """As `slice`, from a traced place."""
    del site
    if not isinstance(kernel, TrackedKernel) or any(isinstance(start, TrackedKernel) for start in starts):
        raise NoRule("the adapted kernel is an index")

    def move(factor: Array, before: Axes, after: Axes) -> Array:
        del after
        first = [jnp.zeros_like(starts[0]) if axis == RANK else starts[axis] for axis in before]
        sizes = [factor.shape[place] if axis == RANK else slice_sizes[axis] for place, axis in enumerate(before)]
        return _dynamic(factor, *first, tuple(sizes))

    # Each device may take another slice, of the factors that have the axis.
    cuts = {axis for axis, start in enumerate(starts) if isinstance(start, Array)}
    moving = {axis for axis in cuts if slice_sizes[axis] != kernel.w.shape[axis]}
    differ = [name for name, (_, layout) in kernel.factors.items() if moving.intersection(layout(kernel.roles))]
    moved = kernel.moved(Change(_dynamic, (tuple(slice_sizes),)), kernel.roles, move, *starts)
    return moved.with_replicated(dict.fromkeys(differ, ())) if isinstance(moved, AdaptedKernel) else moved


def _dynamic(x: Array, *starts_and_sizes: Any) -> Array:
    *starts, sizes = starts_and_sizes
    # The public function would count a negative start from the end, as the model's own call did already.
    return lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False)
