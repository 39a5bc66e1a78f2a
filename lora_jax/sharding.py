"""Shardings of an adapter, derived from the shardings of its base; parameters in host memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ._core.adapter import Adapter
from ._core.memory import HOST_KIND, check_host_memory, is_in_host_memory
from ._core.memory import to_host as to_host_memory
from ._core.paths import Patterns, as_tuple, flatten, matches_any, matching_paths, nearest, unflatten
from ._core.placement import factor_spec, mesh_axes
from ._errors import AdapterError
from ._transform.program import is_array

__all__ = ["like_base", "to_host"]


def to_host(params: Any, *, paths: Patterns = "**", exclude: Patterns = ()) -> Any:
    """Moves parameters to host memory, from which the adapted model moves each to the device where it is used.

    `lora(apply)(params, adapter, …)` accepts the result as it is. A `scan` over a stack of layers moves one layer at a
    time, and so does its backward pass, in which each kernel is moved again. The same is true for layers that the model
    selects from a stack with an index, and for separate layers as far as the compiler needs the memory. Such parameters
    take no memory on the device otherwise; each step reads them twice over the bus to the host.

    A lookup moves the whole table, so exclude embeddings. Only functions transformed by `lora` move parameters by
    themselves.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"embed": jnp.ones((9, 4)), "kernel": jnp.ones((4, 3))}
    >>> params = lj.sharding.to_host(params, exclude="embed")
    >>> {path: leaf.sharding.memory_kind for path, leaf in params.items()}
    {'embed': 'device', 'kernel': 'pinned_host'}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> adapted = lj.lora(lambda params, ids: params["embed"][ids] @ params["kernel"])
    >>> adapted(params, adapter, jnp.arange(2)).sharding.memory_kind
    'device'

    Args:
      params: the parameter tree, or its `ShapeDtypeStruct`s, as for `plan`.
      paths: one pattern, or several, for the leaves to move.
      exclude: patterns for leaves that are not moved.

    Returns:
      The tree with these leaves in `"pinned_host"` memory, with the same shardings. Without a sharding, as for NumPy
      arrays, a leaf is in the host memory of JAX's default device.

    Raises:
      SpecError: if a pattern matches no leaf.
      UnsupportedError: if the backend has no pinned host memory.
    """
    leaves, treedef = flatten(params)
    included, excluded = as_tuple(paths), as_tuple(exclude)
    for pattern in (*included, *excluded):
        matching_paths(pattern, leaves, "every pattern to match a leaf")
    chosen = [
        path
        for path, leaf in leaves.items()
        if is_array(leaf) and matches_any(path, included) and not matches_any(path, excluded)
    ]
    check_host_memory([leaves[path] for path in chosen])
    return unflatten(treedef, leaves | {path: jax.tree.map(_to_host, leaves[path]) for path in chosen})


def _to_host(array: Any) -> Any:
    if not isinstance(array, jax.ShapeDtypeStruct):
        return to_host_memory(array)
    sharding = array.sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding.with_memory_kind(HOST_KIND))


def like_base(adapter: Any, params_shardings: Any) -> Any:
    """Returns shardings for an adapter that match the shardings of its base.

    Each axis of a factor is sharded like the same axis of the kernel: `a` along the input axes, `b` along the output
    axes, both along batch axes. The rank axis is replicated. An axis whose size the devices do not divide is replicated
    as well; `explain(shardings=…)` lists such axes. The value of a `Full` leaf is sharded like the leaf. The memory
    kind is that of the arrays in `adapter`, not of the base: host memory for the state of `optim.offload`, otherwise
    device memory.
    (In JAX 0.10, the results of `jax.eval_shape` have no memory kind, and so are in device memory.)

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from jax.sharding import PartitionSpec as P
    >>> params = {"kernel": jax.ShapeDtypeStruct((64, 32), jnp.bfloat16)}
    >>> init = lambda key: lj.init(key, params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> shapes = jax.eval_shape(init, jax.random.key(0))
    >>> lj.sharding.like_base(shapes, {"kernel": P("fsdp", "model")})
    {'kernel': Adapter(LoRA(rank=2, alpha=4), 'io', a=P('fsdp', None), b=P(None, 'model'))}

    With shardings on a mesh, `jax.jit(init, out_shardings=lj.sharding.like_base(shapes, params_shardings))` initializes
    each shard on its device.

    Args:
      adapter: from `init`, or its shapes; or a tree that contains adapters, such as optimizer state. Other arrays of
        such a tree are replicated.
      params_shardings: a tree like the parameters or a prefix of it, with leaves that are `NamedSharding`s,
        `PartitionSpec`s, or arrays or `ShapeDtypeStruct`s with a sharding; such as the results of `nn.get_sharding`,
        `nn.get_partition_spec`, `nnx.get_named_sharding` and `nnx.get_partition_spec`.

    Returns:
      A tree like `adapter`, with a sharding of the given type in place of each array.

    Raises:
      AdapterError: if an adapted leaf has no sharding, or that of an array with other axes; if there is no adapter.
    """
    parts, treedef = jax.tree_util.tree_flatten_with_path(adapter, is_leaf=lambda node: isinstance(node, Adapter))
    by_path = flatten(params_shardings)[0]
    shardings = {
        index: jax.tree.map(lambda place: place.sharding, placements(_path(keys), part, by_path), is_leaf=_is_placement)
        for index, (keys, part) in enumerate(parts)
        if isinstance(part, Adapter)
    }
    if not shardings:
        raise AdapterError(
            f"Expected an adapter, or a tree with one, such as optimizer state; got {type(adapter).__name__}.\n"
            "  The arguments come in this order: sharding.like_base(adapter, params_shardings)."
        )
    replicated = next(_replicated(sharding) for part in shardings.values() for sharding in jax.tree.leaves(part))
    others = {index: _in_memory_of(part, replicated) for index, (_, part) in enumerate(parts)}
    return jax.tree.unflatten(treedef, list((others | shardings).values()))


class Placement(NamedTuple):
    """How one array is sharded.

    Attributes:
      sharding: of the same type as the base's.
      names: for each axis, the mesh axes along which it is sharded.
      undivided: the axes that are replicated because the devices do not divide their size, with the mesh axes along
        which the base is sharded there.
    """

    sharding: Sharding | PartitionSpec
    names: tuple[tuple[str, ...], ...]
    undivided: Mapping[int, tuple[str, ...]]


def placements(path: str, part: Adapter, by_path: Mapping[str, Any]) -> Adapter:
    """Returns the adapter of one leaf with a `Placement` in place of each array.

    Args:
      path: of the leaf.
      part: the leaf's adapter; nodes that an optimizer has masked are unchanged.
      by_path: the shardings of leaves or subtrees by path.

    Raises:
      AdapterError: if the leaf has no sharding, or that of an array with other axes.
    """
    base, layout = _base_sharding(path, part, by_path), part.variant.layout(part.axes)

    def place(keys: Any, array: Any) -> Placement:
        found = _placement(base, layout.get(keys[0].name, tuple(range(array.ndim))), array.shape)
        return found._replace(sharding=_in_memory_of(array, found.sharding))

    return jax.tree_util.tree_map_with_path(place, part)


def _placement(base: Sharding | PartitionSpec, axes: tuple[int, ...], shape: tuple[int, ...]) -> Placement:
    # Optimizer state may have fewer axes, and on a single device there is nothing to shard.
    if len(axes) != len(shape) or not isinstance(base, (NamedSharding, PartitionSpec)):
        return Placement(_replicated(base), ((),) * len(shape), {})
    spec = factor_spec(axes, base if isinstance(base, PartitionSpec) else base.spec)
    names = tuple(map(mesh_axes, spec))
    if isinstance(base, PartitionSpec):  # without a mesh, sizes are unknown
        return Placement(spec, names, {})
    sizes = base.mesh.shape
    shards = [math.prod(sizes[name] for name in entry) for entry in names]
    undivided = {axis: entry for axis, entry in enumerate(names) if shape[axis] % shards[axis]}
    divided = PartitionSpec(*(None if axis in undivided else entry for axis, entry in enumerate(spec)))
    return Placement(NamedSharding(base.mesh, divided), tuple(map(mesh_axes, divided)), undivided)


def _base_sharding(path: str, part: Adapter, by_path: Mapping[str, Any]) -> Sharding | PartitionSpec:
    """Returns the sharding of a leaf, or else of the smallest subtree that contains it."""
    steps = path.split("/")
    prefixes = ["/".join(steps[:count]) for count in range(len(steps), -1, -1)]
    found = next((by_path[prefix] for prefix in prefixes if prefix in by_path), None)
    if found is None:
        raise AdapterError(
            f"Expected a sharding for each adapted leaf, or for a subtree with it; there is none for {path!r}.\n"
            f"  The nearest paths: {', '.join(map(repr, nearest(path, list(by_path)))) or 'none'}.\n"
            "  Pass a tree like the parameters, or one sharding for all of them."
        )
    sharding = found if isinstance(found, (Sharding, PartitionSpec)) else getattr(found, "sharding", None)
    if sharding is None:
        raise AdapterError(
            f"Expected a sharding, or an array with one, for {path!r}; got a {type(found).__name__} without.\n"
            "  If the parameters carry axis names: `nn.get_sharding(params, mesh)`; for logical names "
            "`nn.logical_to_mesh_sharding(nn.get_partition_spec(params), mesh, rules)`; for an NNX state "
            "`nnx.get_named_sharding(state, mesh)`."
        )
    spec = sharding if isinstance(sharding, PartitionSpec) else getattr(sharding, "spec", ())
    if part.axes and not len(spec) <= len(part.axes) == getattr(found, "ndim", len(part.axes)):
        raise AdapterError(
            f"Expected the sharding of a leaf with the axes {part.axes!r} for {path!r}; got {spec}, of "
            f"{getattr(found, 'shape', 'another shape')}."
        )
    return sharding


def _replicated(sharding: Any) -> Any:
    """Returns the sharding that replicates an array over the same devices."""
    match sharding:
        case NamedSharding(mesh=mesh):
            return NamedSharding(mesh, PartitionSpec())
        case PartitionSpec():
            return PartitionSpec()
    return sharding.with_memory_kind(None)


def _in_memory_of(array: Any, sharding: Any) -> Any:
    """Returns the sharding with the memory kind of an array that is in host memory; a `PartitionSpec` has none."""
    in_host_memory = is_in_host_memory(array) and not isinstance(sharding, PartitionSpec)
    return sharding.with_memory_kind(HOST_KIND) if in_host_memory else sharding


def _path(keys: Any) -> str:
    """Returns the last key, which is the path of a leaf if the node is its adapter."""
    return str(getattr(keys[-1], "key", "")) if keys else ""


def _is_placement(node: Any) -> bool:
    return isinstance(node, Placement)
