"""What quantized leaves have in common."""

from __future__ import annotations

import abc
import math
from collections.abc import Collection
from typing import Any, Self

import jax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from .._core import display
from .._core.paths import flatten
from .._core.placement import explicit_sharding, mesh_axes, with_auto_axes
from .._core.stored import Change, StoredLeaf
from .._errors import SpecError, listed
from ._format import Format


class QuantizedLeaf(StoredLeaf):
    """A kernel stored in few bits, as arrays whose axes are those of the kernel, in its order.

    Attributes:
      codes: the array of codes.
    """

    codes: Any

    @abc.abstractmethod
    def layout(self) -> Self:
        """Returns the leaf with, for each array, the kernel's axis of each of its axes; None for an axis of no one."""

    @property
    @abc.abstractmethod
    def format(self) -> Format | None:
        """The format that made the leaf, with `axes`; None if no format of `lora_jax.quant` does.

        Axes whose role is not known, because it does not matter, are outputs.
        """

    @abc.abstractmethod
    def decode(self) -> Array:
        """Returns the kernel. The mesh has no explicit axes."""

    def dequantize(self) -> Array:
        """Returns the kernel, sharded as the codes are."""
        sharding = explicit_sharding(jax.typeof(self.codes))
        if sharding is None:
            return self.decode()
        return with_auto_axes(type(self).decode, self._kernel_sharding(sharding))(self)

    def changed(self, change: Change, *arrays: Array) -> StoredLeaf | None:
        """Reshards or gathers the stored arrays, so that they are sent, and not the dequantized kernel."""
        if change.gathers:
            return self._gathered(change)
        if not change.places:
            return None
        (sharding,) = change.static
        places = shardings_like(self, sharding)
        wanted = PartitionSpec(*sharding.spec, *[None] * (self.ndim - len(sharding.spec)))
        if self._kernel_sharding(places.codes).spec != wanted:
            return None
        return jax.tree.map(lambda array, place: change.function(array, place), self, places)

    def _gathered(self, change: Change) -> Self | None:
        (axis,) = change.static
        if axis not in self.layout().codes or self.with_single_scales() is not self:
            return None

        def gather(axes: tuple[int | None, ...], array: Array) -> Array:
            return change.function(array, axes.index(axis)) if axis in axes else array

        gathered: Self = jax.tree.map(gather, self.layout(), self, is_leaf=_is_axes)
        return gathered

    def shards(self, spec: PartitionSpec, mesh: Any) -> tuple[Self, Any] | None:
        """Returns the leaf with scales that do not depend on their position in the kernel, unless it is replicated."""
        leaf = self.with_single_scales() if any(spec) else self
        layout, places = leaf.layout(), shardings_like(leaf, NamedSharding(mesh, spec))
        names = [*map(mesh_axes, spec), *[()] * leaf.ndim][: leaf.ndim]

        def is_sharded(axes: tuple[int | None, ...], place: NamedSharding) -> bool:
            pairs = zip(axes, place.spec, strict=True)
            return all(axis is None or mesh_axes(entry) == names[axis] for axis, entry in pairs)

        def shard(array: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(place.shard_shape(array.shape), array.dtype)

        follow = jax.tree.leaves(jax.tree.map(is_sharded, layout, places, is_leaf=_is_axes))
        has_all = all(axis in layout.codes for axis, entry in enumerate(names) if entry)
        if not (has_all and all(follow) and _axes_of(jax.tree.map(shard, leaf, places)) == _axes_of(leaf)):
            return None
        return leaf, jax.tree.map(lambda place: place.spec, places)

    def with_single_scales(self) -> Self:
        """Returns the leaf with scales that are stored as floats."""
        return self

    @property
    def storage(self) -> str:
        """The format, for errors and checkpoints."""
        return super().storage if self.format is None else repr(self.format)

    @property
    def nbytes(self) -> int:
        """The bytes of the stored arrays."""
        return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(self))

    @property
    def sharding(self) -> Any:
        """The sharding of the kernel: that of the codes."""
        sharding = self.codes.sharding
        return self._kernel_sharding(sharding) if isinstance(sharding, NamedSharding) else sharding

    def _kernel_sharding(self, of_codes: NamedSharding) -> NamedSharding:
        names = dict(zip(self.layout().codes, of_codes.spec, strict=False))
        return of_codes.update(spec=PartitionSpec(*(names.get(axis) for axis in range(self.ndim))))

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        summary = jax.numpy.dtype(self.dtype).name
        if all(isinstance(getattr(array, "shape", None), tuple) for array in jax.tree.leaves(self)):  # not shardings
            bits = 8 * self.nbytes / max(self.size, 1)
            summary += f"{list(self.shape)} in {self.storage}, {bits:.3g} bits per element"
        fields = {name: value for name, value in vars(self).items() if name != "dtype"}
        return display.tree_node(self, summary, fields, path, subtree_renderer)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({jax.numpy.dtype(self.dtype).name}{list(self.shape)})"


def shardings_by_path(dense: Any, paths: Collection[str]) -> dict[str, Any]:
    """Returns the leaves of a tree of shardings.

    Raises:
      SpecError: if there is none for one of the paths.
    """
    by_path = flatten(dense)[0]
    if missing := [repr(path) for path in paths if path not in by_path]:
        raise SpecError(
            f"Expected a sharding for each leaf; there is none for {len(missing)} of {len(paths)}.\n{listed(missing)}\n"
            "  Pass a tree with the same paths, such as jax.tree.map(lambda array: array.sharding, params)."
        )
    return by_path


def shardings_like(leaf: QuantizedLeaf, sharding: Sharding) -> Any:
    """Returns a leaf with shardings in place of its arrays; an axis that the devices do not divide is replicated."""
    if not isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda _: sharding, leaf)
    mesh, memory_kind = sharding.mesh, sharding.memory_kind
    spec = [*sharding.spec, *[None] * leaf.ndim][: leaf.ndim]

    def place(axes: tuple[int | None, ...], array: Any) -> NamedSharding:
        entries = [None if axis is None else spec[axis] for axis in axes]
        divided = [
            entry if entry is PartitionSpec.UNCONSTRAINED or size % _shards(mesh, entry) == 0 else None
            for entry, size in zip(entries, array.shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*divided), memory_kind=memory_kind)

    return jax.tree.map(place, leaf.layout(), leaf, is_leaf=_is_axes)


def _axes_of(leaf: QuantizedLeaf) -> list[tuple[int | None, ...]]:
    return jax.tree.leaves(leaf.layout(), is_leaf=_is_axes)


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


def _shards(mesh: Any, names: Any) -> int:
    return math.prod(mesh.shape[name] for name in mesh_axes(names))
