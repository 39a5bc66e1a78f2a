"""Shardings of factors: each axis is sharded as the same axis of the kernel, and the rank axis is replicated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .axes import RANK
from .base import Base, type_of


def factor_spec(axes: Iterable[int], spec: Iterable[Any]) -> PartitionSpec:
    """Returns the `PartitionSpec` of a factor with the given kernel axes, from the spec of the kernel.

    >>> from lora_jax._core.axes import axes_of_a, axes_of_b
    >>> kernel = PartitionSpec("layers", "fsdp", ("model", "data"))
    >>> factor_spec(axes_of_a("bio"), kernel), factor_spec(axes_of_b("bio"), kernel)
    (P('layers', 'fsdp', None), P('layers', None, ('model', 'data')))
    """
    names = dict(enumerate(spec))  # a spec may be shorter than the shape
    return PartitionSpec(*(None if axis == RANK else names.get(axis) for axis in axes))


def mesh_axes(names: Any) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a `PartitionSpec` as a tuple."""
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def explicit_sharding(array_type: Any) -> NamedSharding | None:
    """Returns the sharding in an array's type (`jax.typeof`) if its mesh has explicit axes; otherwise None."""
    sharding: NamedSharding = array_type.sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def with_auto_axes(function: Callable[..., Any], out_shardings: Any) -> Callable[..., Any]:
    """Returns a function whose inner shardings the compiler chooses; those of its results are given, on one mesh."""
    mesh = jax.tree.leaves(out_shardings)[0].mesh
    axes = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is AxisType.Explicit)
    mapped: Callable[..., Any] = jax.sharding.auto_axes(function, axes=axes, out_sharding=out_shardings)
    return mapped


def like_kernel(factor: Array, axes: Iterable[int], kernel: Base) -> Array:
    """Shards a new factor along its kernel if the kernel has an explicit sharding."""
    sharding = explicit_sharding(type_of(kernel))
    return factor if sharding is None else jax.reshard(factor, sharding.update(spec=factor_spec(axes, sharding.spec)))


def replicated(x: Array) -> Array:
    """Replicates an array with an explicit sharding, because JAX cannot decompose such a matrix while it is sharded.

    Other arrays are returned unchanged: the compiler gathers them where that is necessary.
    """
    sharding = explicit_sharding(jax.typeof(x))
    return x if sharding is None else jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def sharded_as(x: Array, other: Array) -> Array:
    """Shards `x` as `other` if `other` has an explicit sharding."""
    sharding = explicit_sharding(jax.typeof(other))
    return x if sharding is None else jax.reshard(x, sharding)


def names_of(labels: Iterable[int], array_type: Any) -> dict[int, Any]:
    """Returns the mesh axes along which an array's type is sharded, by the labels of its axes."""
    return {label: names for label, names in zip(labels, array_type.sharding.spec, strict=False) if names is not None}


def spec_by_label(labels: Iterable[int], names: Mapping[int, Any]) -> PartitionSpec:
    """Returns the `PartitionSpec` of an array with the given labels. Each mesh axis is used only once, the first time.

    >>> spec_by_label((2, 0, 1), {0: "x", 1: ("x", "y")})
    P(None, 'x', None)
    """
    spec: list[Any] = []
    for label in labels:
        used = {axis for entry in spec for axis in mesh_axes(entry)}
        wanted = names.get(label)
        spec.append(None if used.intersection(mesh_axes(wanted)) else wanted)
    return PartitionSpec(*spec)
