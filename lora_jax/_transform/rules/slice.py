"""Slices of a kernel and removed axes: each factor that has the axis is sliced in the same way.

A kernel that loses its last input or output axis is the result of a lookup, and is materialized.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..._compat import primitives
from ..._core.axes import RANK
from ..._core.kernel import AdaptedKernel, TrackedKernel
from ..._core.stored import Change
from ..interpreter import NoRule, Site, Value
from ..registry import rule

Axes = tuple[int, ...]


@rule(primitives.squeeze_p, "moved")
def _squeeze(site: Site, kernel: TrackedKernel, *, dimensions: Axes) -> Value:
    """The factors are squeezed; a single row or column is materialized."""

    def move(factor: Array, before: Axes, after: Axes) -> Array:
        del after
        return lax.squeeze(factor, [before.index(axis) for axis in dimensions if axis in before])

    roles = [role for axis, role in enumerate(kernel.roles) if axis not in dimensions]
    return site.materialize_row(kernel.moved(Change(lax.squeeze, (tuple(dimensions),), selects=True), roles, move))


@rule(primitives.slice_p, "moved")
def _slice(
    site: Site, kernel: TrackedKernel, *, start_indices: Axes, limit_indices: Axes, strides: Axes | None
) -> TrackedKernel:
    """Each factor that has the axis is sliced in the same way."""
    del site
    steps = strides or (1,) * kernel.w.ndim

    def move(factor: Array, before: Axes, after: Axes) -> Array:
        del after
        bounds = [
            (0, factor.shape[place], 1) if axis == RANK else (start_indices[axis], limit_indices[axis], steps[axis])
            for place, axis in enumerate(before)
        ]
        return lax.slice(factor, *zip(*bounds, strict=True))

    selects = set(steps) <= {1}
    return kernel.moved(Change(lax.slice, (start_indices, limit_indices, strides), selects=selects), kernel.roles, move)


@rule("unstack", "moved")
def _unstack(site: Site, kernel: TrackedKernel, *, axis: int) -> list[Value]:
    """Each part is a slice, squeezed."""
    shape = kernel.w.shape

    def part(number: int) -> Value:
        starts = [number if at == axis else 0 for at in range(len(shape))]
        ends = [number + 1 if at == axis else size for at, size in enumerate(shape)]
        piece = _slice(site, kernel, start_indices=tuple(starts), limit_indices=tuple(ends), strides=None)
        return _squeeze(site, piece, dimensions=(axis,))

    return [part(number) for number in range(shape[axis])]


@rule("split", "moved")
def _split(site: Site, kernel: TrackedKernel, *, sizes: Sequence[int], axis: int) -> list[TrackedKernel]:
    """Each part is a slice."""
    del site
    ends = list(itertools.accumulate(sizes))

    def part(number: int) -> TrackedKernel:
        def move(factor: Array, before: Axes, after: Axes) -> Array:
            del after
            if axis not in before:
                return factor
            return lax.slice_in_dim(factor, *bounds, axis=before.index(axis))

        bounds = ends[number] - sizes[number], ends[number]
        return kernel.moved(Change(lax.slice_in_dim, (*bounds, 1, axis), selects=True), kernel.roles, move)

    return [part(number) for number in range(len(sizes))]


@rule(primitives.dynamic_slice_p, "moved")
def _dynamic_slice(site: Site, kernel: Value, *starts: Value, slice_sizes: Axes) -> TrackedKernel:
    """As `slice`, with traced start indices."""
    del site
    if not isinstance(kernel, TrackedKernel) or any(isinstance(start, TrackedKernel) for start in starts):
        raise NoRule("the adapted kernel is an index")

    def move(factor: Array, before: Axes, after: Axes) -> Array:
        del after
        first = [jnp.zeros_like(starts[0]) if axis == RANK else starts[axis] for axis in before]
        sizes = [factor.shape[place] if axis == RANK else slice_sizes[axis] for place, axis in enumerate(before)]
        return _dynamic_slice_array(factor, *first, tuple(sizes))

    # The slices of the factors that have the axis may differ between devices.
    traced = {axis for axis, start in enumerate(starts) if isinstance(start, Array)}
    sliced = {axis for axis in traced if slice_sizes[axis] != kernel.w.shape[axis]}
    differ = [name for name, (_, layout) in kernel.factors.items() if sliced.intersection(layout(kernel.roles))]
    change = Change(_dynamic_slice_array, (tuple(slice_sizes),), selects=True)
    moved = kernel.moved(change, kernel.roles, move, *starts)
    return moved.with_replicated(dict.fromkeys(differ, ())) if isinstance(moved, AdaptedKernel) else moved


def _dynamic_slice_array(x: Array, *starts_and_sizes: Any) -> Array:
    *starts, sizes = starts_and_sizes
    # JAX has already converted negative starts of the model's call.
    return lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False)
