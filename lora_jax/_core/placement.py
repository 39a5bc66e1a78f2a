"""Where the factors of a kernel go on a mesh: each axis is sharded as the kernel's, the rank is replicated.

A spec names for each axis of an array the axes of the mesh along which it is sharded; None, if it is replicated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .axes import RANK
from .base import Base, type_of


def along(axes: Iterable[int], spec: Iterable[Any]) -> PartitionSpec:
    """The spec of a factor whose axes are those of a kernel, by number.

    >>> from lora_jax._core.axes import axes_of_a, axes_of_b
    >>> kernel = PartitionSpec("layers", "fsdp", ("model", "data"))
    >>> along(axes_of_a("bio"), kernel), along(axes_of_b("bio"), kernel)
    (P('layers', 'fsdp', None), P('layers', None, ('model', 'data')))
    """
    given = dict(enumerate(spec))  # of axes at the end a spec may say nothing
    return PartitionSpec(*(None if axis == RANK else given.get(axis) for axis in axes))


def mesh_axes(names: Any) -> tuple[str, ...]:
    """The axes of a mesh that a spec names for one axis of an array."""
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def typed(its_type: Any) -> NamedSharding | None:
    """The sharding that is part of an array's type (`jax.typeof`), as of `AxisType.Explicit`; None, if none is."""
    sharding: NamedSharding = its_type.sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def like_kernel(factor: Array, axes: Iterable[int], kernel: Base) -> Array:
    """A factor that was made of nothing, put along its kernel where shardings are types."""
    sharding = typed(type_of(kernel))
    return factor if sharding is None else jax.reshard(factor, sharding.update(spec=along(axes, sharding.spec)))


def replicated(x: Array) -> Array:
    """The array on every device, where shardings are types: there, sharded matrices cannot be decomposed.

    Elsewhere the compiler sees to that.
    """
    sharding = typed(jax.typeof(x))
    return x if sharding is None else jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def sharded_as(x: Array, other: Array) -> Array:
    """The array sharded as another of as many axes is, where shardings are types."""
    sharding = typed(jax.typeof(other))
    return x if sharding is None else jax.reshard(x, sharding)


def names_of(labels: Iterable[int], its_type: Any) -> dict[int, Any]:
    """The axes of the mesh along which an array is cut by its type, by the labels of its own axes."""
    return {label: names for label, names in zip(labels, its_type.sharding.spec, strict=False) if names is not None}


def disjoint(labels: Iterable[int], names: Mapping[int, Any]) -> PartitionSpec:
    """The spec of an array by the labels of its axes; of two that would go along one axis of the mesh, the first does.

    >>> disjoint((2, 0, 1), {0: "x", 1: ("x", "y")})
    P(None, 'x', None)
    """
    spec: list[Any] = []
    for label in labels:
        taken = {axis for its in spec for axis in mesh_axes(its)}
        its = names.get(label)
        spec.append(None if taken.intersection(mesh_axes(its)) else its)
    return PartitionSpec(*spec)
