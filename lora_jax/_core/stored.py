"""A parameter that is stored in another form than as an array, and operations on the array it represents."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec


class StoredLeaf(abc.ABC):
    """A parameter that is stored in another form than as an array.

    A `StoredLeaf` is one leaf of the parameter tree, and a registered pytree of the stored arrays. `shape` must be
    derived from these arrays, so that it is right for slices of them.

    Attributes:
      dtype: the dtype of the represented array.
    """

    dtype: Any

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the represented array."""

    @abc.abstractmethod
    def dequantize(self) -> Array:
        """Returns the represented array."""

    def fetched(self) -> StoredLeaf:
        """Returns the leaf where it is dequantized: gathered from other devices, if it is to be."""
        return self

    def changed(self, change: Change, *arrays: Array) -> StoredLeaf | None:
        """Returns a leaf that represents the changed array; None to dequantize before the change."""
        del change, arrays  # in general, a part of the array is no part of what is stored
        return None

    def shards(self, spec: PartitionSpec, mesh: Any) -> tuple[StoredLeaf, Any] | None:
        """Returns a leaf for the same array, and the spec of each stored array, so that shards represent shards.

        None if no sharding of what is stored shards the array as the spec says.
        """
        del spec, mesh
        return None

    def plus(self, change: Array) -> StoredLeaf | None:
        """Returns a leaf that represents a sum; None if the format cannot.

        Args:
          change: has as many axes as the array. Each element is for a tile, which the sizes of the axes divide.
        """
        del change
        return None

    @property
    @abc.abstractmethod
    def sliceable(self) -> bool:
        """Whether a slice of each stored array along its leading axis is the same slice of the represented array."""

    @property
    def storage(self) -> str:
        """How the array is stored, for errors and checkpoints."""
        return type(self).__name__

    def take(self, rows: Array) -> StoredLeaf | None:
        """Returns the leaf of `array[rows]`, for `rows` with one axis; None if that needs the whole array."""
        return jax.tree.map(lambda x: x[rows], self) if self.sliceable else None

    @property
    def ndim(self) -> int:
        """The number of axes of the represented array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements of the represented array."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Change:
    """An operation of a program on an array: `function(w, *arrays, *static)`.

    Attributes:
      function: the same object for the same operation, so that changes compare by value.
      static: hashable arguments after the arrays.
      elementwise: whether the operation also applies to a slice of the array.
      selects: whether the operation returns a contiguous part of the array.
      places: whether the operation is `function(w, sharding)`, which changes nothing but the sharding.
      gathers: whether the operation is `function(w, axis)`, which concatenates the shards of all devices.
    """

    function: Callable[..., Array]
    static: tuple[Any, ...] = ()
    elementwise: bool = False
    selects: bool = False
    places: bool = False
    gathers: bool = False

    def __call__(self, w: Array, *arrays: Array) -> Array:
        """Applies the change."""
        return self.function(w, *arrays, *self.static)


def stored_among(leaves: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """Returns a line for an error for each of the paths whose leaf is stored, such as quantized."""
    found = {path: leaves[path] for path in paths}
    return [
        f"{path!r} of shape {leaf.shape}: {leaf.storage}"
        for path, leaf in found.items()
        if isinstance(leaf, StoredLeaf)
    ]
