"""The base of a kernel: an array, or a leaf that represents an array in another form, such as quantized.

A stored leaf is dequantized only where a program uses it. Casts, transposes and other changes before that are recorded,
and repeated for each use. A use is evaluated under `jax.checkpoint`, so that only the stored form is kept for the
backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Self

import jax
from jax import Array
from jax.sharding import PartitionSpec

from .memory import is_in_host_memory, to_device
from .stored import Change, StoredLeaf


@functools.partial(jax.tree_util.register_dataclass, data_fields=["leaf", "arrays"], meta_fields=["changes"])
@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """A stored leaf with the changes that a program has made to the array it represents.

    Attributes:
      leaf: the stored leaf.
      arrays: the array arguments of each change.
      changes: in the order of the program.
    """

    leaf: StoredLeaf
    arrays: tuple[tuple[Array, ...], ...] = ()
    changes: tuple[Change, ...] = ()

    def with_change(self, change: Change, *arrays: Array) -> Self:
        """Records one more change."""
        return dataclasses.replace(self, arrays=(*self.arrays, arrays), changes=(*self.changes, change))

    def settled(self) -> Self:
        """Applies to the stored form the changes for which that is possible: a part is selected, a sharding changed."""
        leaf, rest = self.leaf, list[tuple[Change, tuple[Array, ...]]]()
        for change, arrays in zip(self.changes, self.arrays, strict=True):
            commutes = all(before.elementwise and not operands for before, operands in rest)
            if commutes and (new := leaf.changed(change, *arrays)) is not None:
                leaf = new
            else:
                rest.append((change, arrays))
        return type(self)(leaf, tuple(arrays for _, arrays in rest), tuple(change for change, _ in rest))

    def fetched(self) -> Self:
        """Applies to the stored form what is possible, and gathers it from other devices."""
        settled = self.settled()
        return dataclasses.replace(settled, leaf=settled.leaf.fetched())

    def array(self) -> Array:
        """Applies to the stored form what is possible, dequantizes it, and applies the other changes."""
        settled = self.settled()
        w = settled.leaf.dequantize()
        for change, arrays in zip(settled.changes, settled.arrays, strict=True):
            w = change(w, *arrays)
        return w

    @functools.cached_property
    def type(self) -> Any:
        """The JAX type of the array: shape, dtype and, with explicit axes, sharding."""
        return jax.make_jaxpr(self.array)().out_avals[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self._like.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the array."""
        return self._like.dtype

    @property
    def ndim(self) -> int:
        """The number of axes of the array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements of the array."""
        return math.prod(self.shape)

    @property
    def _like(self) -> Any:
        return self.type if self.changes else self.leaf

    @property
    def is_sliceable(self) -> bool:
        """Whether a slice of the stored leaf represents the same slice of the array."""
        return self.leaf.sliceable and self._is_elementwise

    def shards(self, spec: PartitionSpec, mesh: Any) -> tuple[Self, Self] | None:
        """Returns the array with its stored form as `StoredLeaf.shards` says, and the specs."""
        settled = self.settled()
        if not settled._is_elementwise or (found := settled.leaf.shards(spec, mesh)) is None:
            return None
        leaf, specs = found
        return dataclasses.replace(settled, leaf=leaf), dataclasses.replace(settled, leaf=specs)

    def take(self, rows: Array) -> Self | None:
        """Returns the rows of the array along its leading axis; None if that needs the whole array."""
        settled = self.settled()
        leaf = settled.leaf.take(rows) if settled._is_elementwise else None
        return None if leaf is None else dataclasses.replace(settled, leaf=leaf)

    @property
    def _is_elementwise(self) -> bool:
        return all(change.elementwise for change in self.changes) and not any(self.arrays)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostLeaf(StoredLeaf):
    """A leaf in host memory, which each use moves to the device.

    The transform makes these. In a parameter tree, the leaf is an ordinary array, or a stored leaf, in host memory.

    Attributes:
      leaf: an array or a stored leaf.
    """

    leaf: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(self.leaf.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the array."""
        return self.leaf.dtype

    @property
    def sliceable(self) -> bool:
        """Whether a slice of what is in host memory is the same slice of the array."""
        return self.leaf.sliceable if isinstance(self.leaf, StoredLeaf) else bool(self.shape)

    def take(self, rows: Array) -> None:
        """Returns None: the whole array is moved. Lookups are not done in host memory."""
        del rows

    def dequantize(self) -> Array:
        """Returns the array in device memory."""
        leaf = jax.tree.map(to_device, self.leaf)
        return leaf.dequantize() if isinstance(leaf, StoredLeaf) else leaf

    def changed(self, change: Change, *arrays: Array) -> StoredLeaf | None:
        """Selects a part in host memory, so that of a layer of a stack, only this layer is moved."""
        if not isinstance(self.leaf, StoredLeaf):
            return dataclasses.replace(self, leaf=change(self.leaf, *arrays)) if change.selects else None
        return jax.tree.map(to_device, self.leaf).changed(change, *arrays) if change.places else None


Base = Any  # an Array or a Recorded; an array may be abstract


def base_of(leaf: Any) -> Base:
    """Returns the base for a leaf of a parameter tree."""
    if any(map(is_in_host_memory, jax.tree.leaves(leaf) if isinstance(leaf, StoredLeaf) else [leaf])):
        return Recorded(HostLeaf(leaf))
    return Recorded(leaf) if isinstance(leaf, StoredLeaf) else leaf


def dense(leaf: Any) -> Any:
    """Returns a leaf of a parameter tree as an array: dequantizes a stored leaf, and returns others unchanged."""
    return as_array(base_of(leaf))


def apply_change(w: Base, change: Change, *arrays: Array) -> Base:
    """Applies a change to an array at once; records it for a stored leaf."""
    return w.with_change(change, *arrays) if isinstance(w, Recorded) else change(w, *arrays)


def as_array(w: Base) -> Array:
    """Returns the base as an array; dequantizes a stored leaf."""
    return w.array() if isinstance(w, Recorded) else w


def apply_to_base(function: Callable[..., Any], w: Base, *operands: Any) -> Any:
    """Returns `function(w, *operands)`. For a stored leaf only the stored form is kept for the backward pass.

    The barrier makes the array depend on the operands. Without it, XLA's CPU compiler schedules all uses of the forward
    pass first, and holds all arrays at once. In the backward pass, `jax.checkpoint` has a barrier with the cotangents.
    """
    if not isinstance(w, Recorded):
        return function(w, *operands)

    def use(w: Recorded, *operands: Any) -> Any:
        w = w.fetched()  # after what is kept for the backward pass, and before the barrier: a gather needs no operands
        if not any(map(is_in_host_memory, jax.tree.leaves(w))):  # of a stack in host memory, a part may be needed
            w, _ = jax.lax.optimization_barrier((w, jax.lax.stop_gradient(operands)))
        return function(w.array(), *operands)

    return jax.checkpoint(use)(w, *operands)


def type_of(w: Base) -> Any:
    """Returns the JAX type of a base."""
    return w.type if isinstance(w, Recorded) else jax.typeof(w)


def abstract(w: Base) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of a base: of a NumPy array in float64, the dtype to which JAX converts it."""
    return jax.ShapeDtypeStruct(w.shape, jax.dtypes.canonicalize_dtype(w.dtype))
