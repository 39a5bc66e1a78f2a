"""Quantized leaves that each use gathers from the devices before it dequantizes them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .._core.paths import flatten, unflatten
from .._core.placement import mesh_axes
from .._core.stored import Change, StoredLeaf
from .._errors import SpecError
from ._leaf import QuantizedLeaf, shardings_by_path, shardings_like


def gather(params: Any, dense: Any, over: str | Sequence[str]) -> Any:
    """Makes each use of a quantized leaf gather its packed bytes along mesh axes, and then dequantize them.

    For fully sharded data parallelism (FSDP): kernels are sharded along the axis of the mesh that shards the batch, and
    gathered where they are used. On a mesh without explicit axes the compiler decides when to gather; it dequantizes
    first, and sends the dense kernel. Call this function inside the step, or on what it is called with; the backward
    pass gathers again. In a loop over layers, each iteration gathers one layer. Lookups gather nothing.

    With explicit axes, the model calls `jax.reshard`, which sends packed bytes without this function, as does
    `with_sharding_constraint` on a kernel.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> mesh = jax.make_mesh((1, 1), ("fsdp", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    >>> shardings = {"kernel": jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "model"))}
    >>> params = jax.device_put({"kernel": jnp.ones((128, 16))}, shardings)
    >>> params = lj.quant.quantize(params, {"kernel": lj.quant.NF4()})
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> adapted = lj.lora(lambda params, x: x @ params["kernel"])
    >>> step = jax.jit(lambda params, x: adapted(lj.quant.gather(params, shardings, "fsdp"), adapter, x))
    >>> step(params, jnp.ones((4, 128))).shape
    (4, 16)

    Args:
      params: a tree with quantized leaves.
      dense: a tree with the same paths and a sharding for each leaf, as for `shardings`.
      over: one mesh axis, or several, along which to gather. Leaves keep their shardings along other axes.

    Returns:
      The tree for `lora(apply)`, with the same arrays.

    Raises:
      SpecError: if no quantized leaf is sharded along one of the axes, or if the axis is explicit; if a leaf has no
        sharding.
    """
    leaves, treedef = flatten(params)
    axes = (over,) if isinstance(over, str) else tuple(over)
    quantized = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, QuantizedLeaf)}
    by_path = shardings_by_path(dense, quantized)
    gathered = {path: _gathered(leaf, by_path[path], axes) for path, leaf in quantized.items()}
    changed = {path: leaf for path, leaf in gathered.items() if leaf is not quantized[path]}
    if not changed:
        raise SpecError(
            f"Expected a quantized leaf that is sharded along {' or '.join(map(repr, axes))}; none of "
            f"{len(quantized)} is.\n  `over` names axes of the mesh of the shardings."
        )
    return unflatten(treedef, leaves | changed)


def _gathered(leaf: QuantizedLeaf, sharding: Any, over: Sequence[str]) -> StoredLeaf:
    spec = [mesh_axes(names) for names in getattr(sharding, "spec", ())]
    if not {name for names in spec for name in names} & set(over):
        return leaf
    kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    if explicit := [name for name in over if kinds.get(name) is AxisType.Explicit]:
        raise SpecError(
            f"Expected axes along which the compiler shards arrays; {explicit[0]!r} is explicit.\n"
            "  Call `jax.reshard` on the kernel in the model; it sends the packed bytes."
        )
    rest = [tuple(name for name in names if name not in over) or None for names in spec]
    rest += [None] * (leaf.ndim - len(rest))
    return GatheredLeaf(leaf, sharding.update(spec=PartitionSpec(*rest), memory_kind=None))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["leaf"], meta_fields=["gathered"])
@dataclasses.dataclass(frozen=True, eq=False)
class GatheredLeaf(StoredLeaf):
    """A quantized leaf that is dequantized with another sharding than it is stored with.

    Attributes:
      leaf: the leaf.
      gathered: the sharding of the kernel when it is dequantized; that of its last axes, if the leaf is a slice.
    """

    leaf: QuantizedLeaf
    gathered: NamedSharding

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        return self.leaf.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the kernel."""
        return self.leaf.dtype

    @property
    def sliceable(self) -> bool:
        """Whether the leaf is."""
        return self.leaf.sliceable

    @property
    def sharding(self) -> Any:
        """The sharding of the leaf."""
        return self.leaf.sharding

    @property
    def storage(self) -> str:
        """The format of the leaf."""
        return self.leaf.storage

    def take(self, rows: Array) -> StoredLeaf | None:
        """Returns the rows, which the compiler looks up where they are."""
        return self.leaf.take(rows)

    def changed(self, change: Change, *arrays: Array) -> StoredLeaf | None:
        """Returns the leaf with the sharding that the model asks for."""
        return self.leaf.changed(change, *arrays)

    def shards(self, spec: PartitionSpec, mesh: Any) -> tuple[StoredLeaf, Any] | None:
        """Returns the leaf with the shards of a `shard_map`, which gathers it itself."""
        return self.leaf.shards(spec, mesh)

    def fetched(self) -> StoredLeaf:
        """Gathers the stored arrays."""
        sharding = self.gathered.update(spec=PartitionSpec(*self.gathered.spec[-self.ndim :]))
        places = shardings_like(self.leaf, sharding)
        gathered: StoredLeaf = jax.tree.map(lax.with_sharding_constraint, self.leaf, places)
        return gathered

    def dequantize(self) -> Array:
        """Gathers the stored arrays, and returns the kernel."""
        return self.fetched().dequantize()
