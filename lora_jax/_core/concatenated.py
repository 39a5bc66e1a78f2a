"""Concatenations of bases, some of which are stored leaves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

from .base import Base, Recorded, as_array
from .stored import StoredLeaf


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["axis"])
@dataclasses.dataclass(frozen=True, eq=False)
class Concatenated(StoredLeaf):
    """The concatenation of bases, at least one of which is a stored leaf.

    Attributes:
      parts: the bases.
      axis: the axis of the concatenation, negative.
    """

    parts: tuple[Base, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the concatenation."""
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> Any:
        """The dtype of all parts."""
        return self.parts[0].dtype

    @property
    def sliceable(self) -> bool:
        """Whether all parts are, and another axis is concatenated than the leading one."""
        sliceable = all(not isinstance(part, Recorded) or part.is_sliceable for part in self.parts)
        return sliceable and self.axis > -self.ndim

    def dequantize(self) -> Array:
        """Returns the concatenation as an array."""
        return jax.lax.concatenate([as_array(part) for part in self.parts], self.axis + self.ndim)


def concatenate(parts: Sequence[Base], axis: int) -> Base:
    """Concatenates bases along an axis."""
    if any(isinstance(part, Recorded) for part in parts):
        return Recorded(Concatenated(tuple(parts), axis - parts[0].ndim))
    return jax.lax.concatenate(parts, axis)
