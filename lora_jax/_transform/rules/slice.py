"""Slices of a kernel, and axes taken away: the same of each factor that has the axis.

What is left of a kernel without an input or an output axis is a look-up's result, and is formed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..._compat import primitives
from ..._core.axes import RANK
from ..._core.kernel import AdaptedKernel
from ..interpreter import NoRule, Site, Value
from ..registry import rule

Axes = tuple[int, ...]


@rule(primitives.squeeze_p, "moved")
def _squeeze(site: Site, kernel: AdaptedKernel, *, dimensions: Axes) -> Value:
    """The factors are squeezed; a row or column that is left alone is formed."""

    def move(factor: Array, before: Axes, after: Axes) -> Array:
        del after
        return lax.squeeze(factor, [before.index(axis) for axis in dimensions if axis in before])

    roles = [role for axis, role in enumerate(kernel.roles) if axis not in dimensions]
    return site.left(kernel.moved(lax.squeeze(kernel.w, dimensions), roles, move))


@rule(primitives.slice_p, "moved")
def _slice(
    site: Site, kernel: AdaptedKernel, *, start_indices: Axes, limit_indices: Axes, strides: Axes | None
) -> AdaptedKernel:
    """The same slice of each factor that has the axis."""
    del site
    steps = strides or (1,) * kernel.w.ndim

    def move(factor: Array, before: Axes, after: Axes) -> Array:
        del after
        bounds = [
            (0, factor.shape[place], 1) if axis == RANK else (start_indices[axis], limit_indices[axis], steps[axis])
            for place, axis in enumerate(before)
        ]
        if bounds == [(0, size, 1) for size in factor.shape]:
            return factor  # itself, by which pieces of one kernel know each other
        return lax.slice(factor, *zip(*bounds, strict=True))

    return kernel.moved(lax.slice(kernel.w, start_indices, limit_indices, strides), kernel.roles, move)


@rule("unstack", "moved")
def _unstack(site: Site, kernel: AdaptedKernel, *, axis: int) -> list[Value]:
    """Each part is such a slice, squeezed."""
    shape = kernel.w.shape

    def part(number: int) -> Value:
        starts = [number if at == axis else 0 for at in range(len(shape))]
        ends = [number + 1 if at == axis else size for at, size in enumerate(shape)]
        piece = _slice(site, kernel, start_indices=tuple(starts), limit_indices=tuple(ends), strides=None)
        return _squeeze(site, piece, dimensions=(axis,))

    return [part(number) for number in range(shape[axis])]


@rule("split", "moved")
def _split(site: Site, kernel: AdaptedKernel, *, sizes: Sequence[int], axis: int) -> list[AdaptedKernel]:
    """Each part is such a slice."""
    del site
    parts = lax.split(kernel.w, sizes, axis)
    ends = list(itertools.accumulate(sizes))

    def cut(number: int) -> AdaptedKernel:
        def move(factor: Array, before: Axes, after: Axes) -> Array:
            del after
            if axis not in before:
                return factor
            return lax.slice_in_dim(factor, ends[number] - sizes[number], ends[number], axis=before.index(axis))

        return kernel.moved(parts[number], kernel.roles, move)

    return [cut(number) for number in range(len(sizes))]


@rule(primitives.dynamic_slice_p, "moved")
def _dynamic_slice(site: Site, kernel: Value, *starts: Value, slice_sizes: Axes) -> AdaptedKernel:
    """As `slice`, from a traced place."""
    del site
    if not isinstance(kernel, AdaptedKernel) or any(isinstance(start, AdaptedKernel) for start in starts):
        raise NoRule("the adapted kernel is an index")

    def cut(x: Array, first: Sequence[Any], sizes: Sequence[int]) -> Array:
        # The public function would count a negative start from the end, as the model's own call did already.
        return lax.dynamic_slice(x, first, sizes, allow_negative_indices=False)

    def move(factor: Array, before: Axes, after: Axes) -> Array:
        del after
        first = [jnp.zeros_like(starts[0]) if axis == RANK else starts[axis] for axis in before]
        sizes = [factor.shape[place] if axis == RANK else slice_sizes[axis] for place, axis in enumerate(before)]
        return cut(factor, first, sizes)

    # Each device may take another slice, of the factors that have the axis.
    cuts = {axis for axis, start in enumerate(starts) if isinstance(start, Array)}
    moving = {axis for axis in cuts if slice_sizes[axis] != kernel.w.shape[axis]}
    differ = [name for name, (_, layout) in kernel.factors.items() if moving.intersection(layout(kernel.roles))]
    moved = kernel.moved(cut(kernel.w, starts, slice_sizes), kernel.roles, move)
    return moved.with_replicated(dict.fromkeys(differ, ()))
