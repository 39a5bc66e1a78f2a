"""The axes of Qwix's arrays, and how they become those of an adapter's factors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from .._core.axes import RANK, axes_with

Group = tuple[int, ...]  # the axes of a kernel, or `RANK`, that one axis of Qwix's array is the product of


class Layout(NamedTuple):
    """The axes of Qwix's arrays. Layers or experts along a batch axis that `b` lacks share it."""

    a: tuple[Group, ...]
    b: tuple[Group, ...]


class MisfitError(Exception):
    """Why one kernel cannot be read or written; the public functions list all."""


def find(axes: str, sizes: Mapping[int, int], a: Any, b: Any) -> Layout:
    """Returns the layout of arrays of these shapes. Axes of size 1 have no order, and may have any role."""
    fitting, expected = {}, dict[str, None]()
    for layout in _layouts(axes):
        shapes = [tuple(math.prod(sizes[axis] for axis in group) for group in groups) for groups in layout]
        expected[f"a {shapes[0]} and b {shapes[1]}"] = None
        if [_without_ones(shape) for shape in shapes] == [_without_ones(a.shape), _without_ones(b.shape)]:
            order = tuple(tuple(axis for axis in sum(groups, ()) if sizes[axis] > 1) for groups in layout)
            fitting[order] = layout
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    shape = tuple(sizes[axis] for axis in range(len(axes)))
    got = f"a {tuple(a.shape)} and b {tuple(b.shape)}"
    if fitting:
        raise MisfitError(f"{got} fit a kernel of shape {shape} with axes {axes!r} in {len(fitting)} ways")
    raise MisfitError(f"a kernel of shape {shape} with axes {axes!r} has {' or '.join(expected)}; got {got}")


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _layouts(axes: str) -> Iterator[Layout]:
    """Yields the layouts that a kernel can have: by operation, and by which of its batch axes are stacks of layers."""
    inputs, outputs = axes_with(axes, "i"), axes_with(axes, "o")
    batch = axes_with(axes, "b")
    for stacked in itertools.chain.from_iterable(itertools.combinations(batch, n) for n in range(len(batch) + 1)):
        own: list[Group] = [(axis,) for axis in batch if axis not in stacked]
        kept: list[Group] = [(axis,) for axis in range(len(axes)) if axes[axis] != "o" and axis not in stacked]
        split: list[Group] = [(axis,) for axis in outputs]
        for a, b in [
            ([*own, inputs, (RANK,)], [*own, (RANK,), outputs]),  # dot_general
            ([*kept, (RANK,)], [(RANK,), *split]),  # einsum, conv_general_dilated
        ]:
            for axis in stacked:  # in the order of the kernel's axes, so that each gets the place that it has there
                a.insert(axis, (axis,))
                b.insert(axis, (axis,))
            yield Layout(tuple(a), tuple(b))


def read(array: Any, groups: Sequence[Group], own: Sequence[int], sizes: Mapping[int, int]) -> Array:
    """Returns an array of Qwix with the axes `own`. Those that it lacks are repeated."""
    order = sum(groups, ())
    split = jnp.reshape(array, [sizes[axis] for axis in order])
    moved = jnp.transpose(split, [order.index(axis) for axis in own if axis in order])
    missing = [index for index, axis in enumerate(own) if axis not in order]
    return jnp.broadcast_to(jnp.expand_dims(moved, missing), [sizes[axis] for axis in own])


def write(array: Any, groups: Sequence[Group], own: Sequence[int]) -> Array:
    """Returns an array with Qwix's axes, not yet joined."""
    order = sum(groups, ())
    missing = [index for index, axis in enumerate(own) if axis not in order]
    first = jnp.expand_dims(array[tuple(0 if at in missing else slice(None) for at in range(len(own)))], missing)
    if missing and not bool(jnp.all(array == first)):
        raise MisfitError("Qwix has one `b` for all batch axes of an `einsum`, and those of the adapter differ")
    return jnp.transpose(jnp.squeeze(first, missing), [[axis for axis in own if axis in order].index(a) for a in order])
