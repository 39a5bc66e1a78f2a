"""What a `gather` selects from a kernel and from each of its factors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .._core.axes import RANK
from .._core.base import Base, Recorded, apply_to_base
from .._core.contract import Labeled, Labels
from .._core.stored import Change
from .interpreter import NoRule

# With these modes, an index along an axis that is taken completely has no effect.
_CLAMPING_MODES = (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)


class Hints(NamedTuple):
    """What a model promises of the indices of a `gather`."""

    unique_indices: bool = False
    indices_are_sorted: bool = False


def _look_up(w: Array, indices: Array, numbers: Any, sizes: Any, mode: Any, fill_value: Any, *hints: bool) -> Array:
    return lax.gather(w, indices, numbers, sizes, mode=mode, fill_value=fill_value, **Hints(*hints)._asdict())


@dataclasses.dataclass(frozen=True)
class Lookup:
    """What a `gather` selects from an array of `shape`, and from its factors.

    An axis of the array is labeled by its number. An axis of the indices is labeled by a number after these, or by that
    of the array's batching axis that it corresponds to (the `vmap` of a lookup).
    """

    shape: tuple[int, ...]
    numbers: Any
    slice_sizes: tuple[int, ...]
    mode: Any
    fill_value: Any
    hints: Hints

    @property
    def change(self) -> Change:
        """The lookup in an array of `shape`."""
        return Change(_look_up, (self.numbers, self.slice_sizes, self.mode, self.fill_value, *self.hints))

    @property
    def fills(self) -> bool:
        """Whether an index out of range gives the fill value."""
        return bool(self.mode == lax.GatherScatterMode.FILL_OR_DROP)

    def clipped(self) -> Lookup:
        """Returns the lookup that reads the nearest position inside the array for an index out of range."""
        return dataclasses.replace(self, mode=lax.GatherScatterMode.CLIP, fill_value=None, hints=Hints())

    @property
    def columns(self) -> tuple[int, ...]:
        """The columns of the indices that select a position; the other columns belong to axes taken completely.

        All columns, if none selects a position, as for an axis of size 1.
        """
        axes, collapsed = self.numbers.start_index_map, self.numbers.collapsed_slice_dims
        selecting = tuple(
            column
            for column, axis in enumerate(axes)
            if self.mode not in _CLAMPING_MODES or self.slice_sizes[axis] != self.shape[axis] or axis in collapsed
        )
        return selecting or tuple(range(len(axes)))

    @property
    def selected(self) -> tuple[int, ...]:
        """The axis of each of the columns."""
        return tuple(self.numbers.start_index_map[column] for column in self.columns)

    @property
    def remaining(self) -> tuple[int, ...]:
        """The axes of the array that the result still has."""
        gone = [axis for axis in self.selected if self.slice_sizes[axis] == 1]
        return tuple(
            axis for axis in range(len(self.shape)) if axis not in (*gone, *self.numbers.operand_batching_dims)
        )

    @property
    def roles(self) -> str:
        """The roles of the axes in a lookup of rows: the axis of the rows is an input."""
        batch = "b" if set(self.remaining) - set(self.selected) else "o"
        return "".join(
            "i" if axis in self.selected else batch if axis in self.numbers.operand_batching_dims else "o"
            for axis in range(len(self.shape))
        )

    def check(self) -> None:
        """Raises if nothing is selected, or if an axis without an index is taken only in part."""
        indexed = {*self.selected, *self.numbers.operand_batching_dims}
        complete = all(self.slice_sizes[axis] == size for axis, size in enumerate(self.shape) if axis not in indexed)
        if not self.selected or not complete or not set(self.numbers.collapsed_slice_dims) <= indexed:
            raise NoRule("a lookup without an index, or of part of an axis without an index")

    def labels(self, ndim: int) -> Labels:
        """Returns the labels of the result."""
        numbers = self.numbers
        kept = iter(self._kept(range(len(self.shape))))
        index = iter(self._index_labels(ndim - len(numbers.offset_dims)))
        return tuple(next(kept) if axis in numbers.offset_dims else next(index) for axis in range(ndim))

    def apply(self, w: Base, indices: Array) -> Array:
        """Looks up in the base; of a stored leaf that is looked up by rows, only these rows are dequantized."""
        if not isinstance(w, Recorded) or not self._selects_rows:
            return apply_to_base(self.change, w, indices)
        size = self.shape[0]
        if self.mode in _CLAMPING_MODES:
            indices = jnp.clip(indices, 0, size - 1)
        flat = indices.reshape(-1)
        outside = (flat < 0) | (flat >= size)
        if (rows := w.take(jnp.where(outside, 0, flat))) is None:
            return apply_to_base(self.change, w, indices)
        # Each index looks up its own row; one that was out of range still is.
        own = jnp.where(outside, flat.size, jnp.arange(flat.size, dtype=indices.dtype)).reshape(indices.shape)
        return apply_to_base(self.change, rows, own)

    @property
    def _selects_rows(self) -> bool:
        numbers = self.numbers
        return numbers.start_index_map == (0,) and self.slice_sizes[0] == 1 and not numbers.operand_batching_dims

    def inside(self, indices: Array) -> Labeled:
        """Returns for each index whether all that it selects is inside the array."""
        numbers = self.numbers
        inside = [
            (index >= 0) & (index <= self.shape[axis] - self.slice_sizes[axis])
            for axis, index in zip(numbers.start_index_map, jnp.moveaxis(indices, -1, 0), strict=True)
        ]
        return Labeled(functools.reduce(jnp.logical_and, inside), self._index_labels(indices.ndim - 1))

    def take(self, factor: Labeled, indices: Array) -> Labeled:
        """Applies the lookup to a factor; returns it as it is if no column selects along its axes."""
        numbers, position = self.numbers, factor.labels.index
        columns = [column for column in self.columns if numbers.start_index_map[column] in factor.labels]
        if not columns:
            return factor
        batching = sorted(
            (position(axis), at)
            for axis, at in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
            if axis in factor.labels
        )
        complete = len(columns) == len(numbers.start_index_map) and len(batching) == len(numbers.operand_batching_dims)
        index_labels, kept = self._index_labels(indices.ndim - 1), self._kept(factor.labels)
        array = lax.gather(
            factor.array,
            indices if len(columns) == indices.shape[-1] else indices[..., np.array(columns)],
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(len(index_labels), len(index_labels) + len(kept))),
                collapsed_slice_dims=tuple(
                    sorted(position(axis) for axis in numbers.collapsed_slice_dims if axis in factor.labels)
                ),
                start_index_map=tuple(position(numbers.start_index_map[column]) for column in columns),
                operand_batching_dims=tuple(at for at, _ in batching),
                start_indices_batching_dims=tuple(at for _, at in batching),
            ),
            tuple(
                size if axis == RANK else self.slice_sizes[axis]
                for axis, size in zip(factor.labels, factor.array.shape, strict=True)
            ),
            mode=self.mode,
            fill_value=0,  # beyond the end, the result is the fill value of the base
            **(self.hints if complete else Hints())._asdict(),  # fewer columns need not be sorted or unique
        )
        return Labeled(array, (*index_labels, *kept))

    def _kept(self, axes: Sequence[int]) -> tuple[int, ...]:
        gone = (*self.numbers.collapsed_slice_dims, *self.numbers.operand_batching_dims)
        return tuple(axis for axis in axes if axis not in gone)

    def _index_labels(self, count: int) -> tuple[int, ...]:
        numbers = self.numbers
        along = dict(zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True))
        return tuple(along.get(at, len(self.shape) + at) for at in range(count))
