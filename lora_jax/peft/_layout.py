"""Arranges the axes of a leaf and its factors as matrices `(in, out)` whose outputs are in torch's order, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .._core.axes import RANK, axes_of_a, axes_of_b, axes_with, width
from ._row import Part, Row

Values = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of one leaf: their roles, sizes, and the order that torch has them in.

    Matrices keep the batch axes, in front. The rank is one axis.
    """

    row: Row
    axes: str
    shape: tuple[int, ...]
    experts: int | None = None  # their number, if one torch parameter has all; their axis is the last batch axis

    @property
    def inputs(self) -> tuple[int, ...]:
        """The input axes, in torch's order."""
        return _ordered(axes_with(self.axes, "i"), self.row.inputs)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The output axes, in torch's order."""
        return _ordered(axes_with(self.axes, "o"), self.row.outputs)

    @property
    def d_in(self) -> int:
        """The number of inputs."""
        return width(self.axes, self.shape, "i")

    @property
    def d_out(self) -> int:
        """The number of outputs."""
        return width(self.axes, self.shape, "o")

    @property
    def batch(self) -> tuple[int, ...]:
        """The sizes of the batch axes."""
        return tuple(self.shape[axis] for axis in self._batch_axes)

    @property
    def _batch_axes(self) -> tuple[int, ...]:
        axes = axes_with(self.axes, "b")
        return (*axes[1:], axes[0]) if self.row.experts_first and self.experts else axes

    def labels(self, name: str) -> tuple[int, ...]:
        """Returns the kernel axis of each axis of an array: of `a`, `b`, a `vector` of outputs, or the `kernel`."""
        outputs = (*axes_with(self.axes, "b"), *axes_with(self.axes, "o"))
        labels = {"a": axes_of_a(self.axes), "b": axes_of_b(self.axes), "vector": outputs}
        return labels.get(name, tuple(range(len(self.axes))))

    def to_matrix(self, name: str, array: Values) -> Values:
        """Returns `a` as (batch…, in, rank), `b` as (batch…, rank, out), a vector as (batch…, out), the kernel."""
        groups, order = self._order(name)
        array = np.transpose(array, order)
        return np.ascontiguousarray(array.reshape((*self.batch, *self._flat(groups, array))))

    def from_matrix(self, name: str, matrix: Values) -> Values:
        """Inverts `to_matrix`."""
        groups, order = self._order(name)
        rank = matrix.shape[len(self.batch) + groups.index((RANK,))] if (RANK,) in groups else 0
        labels = self.labels(name)
        sizes = [rank if labels[axis] == RANK else self.shape[labels[axis]] for axis in order]
        return np.asarray(np.transpose(matrix.reshape(sizes), np.argsort(order)), order="C")  # also if it has no axes

    def _order(self, name: str) -> tuple[list[tuple[int, ...]], list[int]]:
        """Returns the groups of axes that become one, and the order of the array's axes in which they are adjacent."""
        groups = {
            "a": [self.inputs, (RANK,)],
            "b": [(RANK,), self.outputs],
            "vector": [self.outputs],
            "kernel": [self.inputs, self.outputs],
        }[name]
        labels = self.labels(name)
        wanted = (*self._batch_axes, *(axis for group in groups for axis in group))
        return groups, [labels.index(axis) for axis in wanted]

    def _flat(self, groups: Sequence[tuple[int, ...]], array: Values) -> list[int]:
        """Returns the sizes of the groups of a transposed array."""
        sizes, at = [], len(self.batch)
        for group in groups:
            sizes.append(math.prod(array.shape[at : at + len(group)]))
            at += len(group)
        return sizes


def default_axes(row: Row, ndim: int, batch: int) -> str | None:
    """Returns the roles of a leaf's axes that its row states or implies; None if the row must state them."""
    core = ndim - batch
    implied = {
        "linear": "io" if core == 2 else None,
        "embedding": "io" if core == 2 else None,
        "conv": "i" * (core - 1) + "o" if core >= 3 else None,
        "vector": "o" * core if core >= 1 or row.keep_shape else None,
        "parameter": {2: "io", 3: "bio"}.get(core),
    }[row.kind.removeprefix("swapped ")]
    axes = row.axes if row.axes is not None else None if implied is None else "b" * batch + implied
    batches = (batch, batch + 1) if row.is_parameter else (batch,)
    return axes if axes is not None and len(axes) == ndim and axes.count("b") in batches else None


def bounds(parts: Sequence[Part], d_out: int) -> list[tuple[int, int]] | None:
    """Returns the first output of each part and the one after its last; None if the sizes do not add up."""
    known = [part.size for part in parts if part.size is not None]
    if len(known) == len(parts):
        sizes = known
    elif known or d_out % len(parts):
        return None
    else:
        sizes = [d_out // len(parts)] * len(parts)
    if sum(sizes) != d_out:
        return None
    ends = np.cumsum(sizes).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def outputs_to_torch(array: Values, part: Part) -> Values:
    """Returns the outputs of one part, the last axis, in torch's order and scale."""
    if part.interleaved is not None:
        pairs = array.reshape(*array.shape[:-1], -1, part.interleaved // 2, 2)
        array = pairs.swapaxes(-1, -2).reshape(array.shape)
    return array if part.factor == 1 else (_wide(array) / part.factor).astype(array.dtype)


def outputs_from_torch(array: Values, part: Part) -> Values:
    """Inverts `outputs_to_torch`."""
    if part.interleaved is not None:
        pairs = array.reshape(*array.shape[:-1], -1, 2, part.interleaved // 2)
        array = pairs.swapaxes(-1, -2).reshape(array.shape)
    return scaled(array, part.factor)


def scaled(array: Values, factor: float) -> Values:
    """Returns an array times a number, in its dtype. The number is not rounded to a narrow dtype."""
    return array if factor == 1 else (_wide(array) * factor).astype(array.dtype)


def _wide(array: Values) -> Values:
    return array.astype(np.promote_types(array.dtype, np.float32))


def _ordered(axes: tuple[int, ...], order: tuple[int, ...] | None) -> tuple[int, ...]:
    return axes if order is None else tuple(axes[i] for i in order)
