"""The base of a kernel: an array, or a leaf that stands for one and is stored in another form, such as quantized.

A stored leaf is dequantized where a program uses it, and not before. What a program does to it until then (a cast, a
transpose) is recorded, and done again for each use. A use is evaluated under `jax.checkpoint`, so that what is kept for
the backward pass is what is stored.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
from jax import Array


class StoredLeaf(abc.ABC):
    """A parameter that is stored in another form than as an array.

    It is one leaf of the parameter tree, and a registered pytree of its own arrays. `shape` has to follow from these
    arrays: where the leaf is a stack of layers, a slice of each of them along the leading axis is a leaf again.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that it stands for."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """The dtype of the array that it stands for."""

    @abc.abstractmethod
    def dequantize(self) -> Array:
        """The array that it stands for."""

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements of the array that it stands for."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Change:
    """What a program does to an array: `function(w, *arrays, *static)`.

    Attributes:
      function: defined once, so that changes compare by value.
      static: what it takes besides arrays; hashable.
      elementwise: whether it acts on each element by itself, so that it may act on a slice as well.
    """

    function: Callable[..., Array]
    static: tuple[Any, ...] = ()
    elementwise: bool = False

    def __call__(self, w: Array, *arrays: Array) -> Array:
        """Makes the change."""
        return self.function(w, *arrays, *self.static)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["leaf", "arrays"], meta_fields=["changes"])
@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """A stored leaf and what a program has done to the array that it stands for.

    Attributes:
      leaf: what is stored.
      arrays: for each change the arrays that it takes.
      changes: in their order.
    """

    leaf: StoredLeaf
    arrays: tuple[tuple[Array, ...], ...] = ()
    changes: tuple[Change, ...] = ()

    def then(self, change: Change, *arrays: Array) -> Self:
        """The base after one more change."""
        return dataclasses.replace(self, arrays=(*self.arrays, arrays), changes=(*self.changes, change))

    def array(self) -> Array:
        """The array, dequantized and changed."""
        w = self.leaf.dequantize()
        for change, arrays in zip(self.changes, self.arrays, strict=True):
            w = change(w, *arrays)
        return w

    @functools.cached_property
    def type(self) -> Any:
        """The type of the array: its shape, its dtype, and its sharding, where that is part of it."""
        return jax.make_jaxpr(self.array)().out_avals[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.type.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the array."""
        return self.type.dtype

    @property
    def ndim(self) -> int:
        """The number of the array's axes."""
        return self.type.ndim

    @property
    def size(self) -> int:
        """The number of the array's elements."""
        return self.type.size

    @property
    def is_sliceable(self) -> bool:
        """Whether a slice of what is stored stands for the same slice of the array."""
        return all(change.elementwise for change in self.changes) and not any(self.arrays)


Base = Any  # an Array or a Recorded; an array may be abstract


def base_of(leaf: Any) -> Base:
    """The base that a leaf of a parameter tree is."""
    return Recorded(leaf) if isinstance(leaf, StoredLeaf) else leaf


def changed(w: Base, change: Change, *arrays: Array) -> Base:
    """The base after a change: made at once of an array, recorded of a stored leaf."""
    return w.then(change, *arrays) if isinstance(w, Recorded) else change(w, *arrays)


def as_array(w: Base) -> Array:
    """The array that a base is."""
    return w.array() if isinstance(w, Recorded) else w


def use(function: Callable[..., Any], w: Base, *operands: Any) -> Any:
    """`function(w, *operands)`; of a stored leaf what is stored is kept for the backward pass, and nothing dense."""
    if not isinstance(w, Recorded):
        return function(w, *operands)
    return jax.checkpoint(lambda w, *operands: function(w.array(), *operands))(w, *operands)


def type_of(w: Base) -> Any:
    """The type of the array that a base is."""
    return w.type if isinstance(w, Recorded) else jax.typeof(w)


def abstract(w: Base) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a base."""
    return jax.ShapeDtypeStruct(w.shape, w.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["axis"])
@dataclasses.dataclass(frozen=True, eq=False)
class Concatenated(StoredLeaf):
    """Bases side by side along an axis, of which at least one is stored.

    Attributes:
      parts: arrays, and what stands for one.
      axis: along which.
    """

    parts: tuple[Base, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the first, with the sizes along the axis added up."""
        first = self.parts[0].shape
        return (*first[: self.axis], sum(part.shape[self.axis] for part in self.parts), *first[self.axis + 1 :])

    @property
    def dtype(self) -> Any:
        """That of its parts, which is the same."""
        return self.parts[0].dtype

    def dequantize(self) -> Array:
        """The parts as one array."""
        return jax.lax.concatenate([as_array(part) for part in self.parts], self.axis)


def concatenate(parts: Sequence[Base], axis: int) -> Base:
    """Bases side by side."""
    if any(isinstance(part, Recorded) for part in parts):
        return Recorded(Concatenated(tuple(parts), axis))
    return jax.lax.concatenate(parts, axis)
