"""Shardings for adapters: an adapter follows its base onto the mesh, so that no step has to move either."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from ._core.adapter import Adapter
from ._core.paths import flatten, nearest
from ._core.placement import factor_spec, mesh_axes
from ._errors import AdapterError

__all__ = ["like_base"]


def like_base(adapter: Any, params_shardings: Any) -> Any:
    """Gives each array of an adapter the sharding that goes with its base's.

    A factor is cut along the kernel's axes that it has: along input axes `a`, along output axes `b`, along batch axes
    both. The rank is on every device, and so is an axis that the devices do not divide; `explain(shardings=…)` names
    those. The copy of a leaf that is trained whole goes where the leaf is. All are in the devices' own memory, even if
    the base is kept on the host.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from jax.sharding import PartitionSpec as P
    >>> params = {"kernel": jax.ShapeDtypeStruct((64, 32), jnp.bfloat16)}
    >>> init = lambda key: lj.init(key, params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> shapes = jax.eval_shape(init, jax.random.key(0))
    >>> lj.sharding.like_base(shapes, {"kernel": P("fsdp", "model")})
    {'kernel': Adapter(LoRA(rank=2, alpha=4), 'io', a=P('fsdp', None), b=P(None, 'model'))}

    With shardings on a mesh, `jax.jit(init, out_shardings=lj.sharding.like_base(shapes, params_shardings))` makes each
    shard where it lives.

    Args:
      adapter: from `init`, or its shapes; or any tree that holds adapters under their paths, such as the state of an
        optimizer: what else is in it goes on every device.
      params_shardings: a tree like the parameters, or like the top of it, or one leaf for all: of `NamedSharding`s,
        `PartitionSpec`s, or arrays or `ShapeDtypeStruct`s that have a sharding. What `nn.get_sharding`,
        `nn.get_partition_spec`, `nnx.get_named_sharding` and `nnx.get_partition_spec` return is one.

    Returns:
      The tree of `adapter`, with a sharding of the given kind in place of each array.

    Raises:
      AdapterError: if there is no sharding for an adapted leaf, or one that it cannot have; if there is no adapter.
    """
    parts, treedef = jax.tree_util.tree_flatten_with_path(adapter, is_leaf=lambda node: isinstance(node, Adapter))
    given = flatten(params_shardings)[0]
    placed = {
        number: jax.tree.map(lambda its: its.sharding, placements(_path(keys), part, given), is_leaf=_is_placement)
        for number, (keys, part) in enumerate(parts)
        if isinstance(part, Adapter)
    }
    if not placed:
        raise AdapterError(
            f"Expected an adapter, or a tree that holds one, as optimizer state does; got {type(adapter).__name__}.\n"
            "  The arguments come in this order: sharding.like_base(adapter, params_shardings)."
        )
    elsewhere = next(_replicated(its) for part in placed.values() for its in jax.tree.leaves(part))
    return jax.tree.unflatten(treedef, [placed.get(number, elsewhere) for number in range(len(parts))])


class Placement(NamedTuple):
    """Where one array goes.

    Attributes:
      sharding: of the kind that was given for the base.
      names: for each axis the axes of the mesh along which it is cut.
      undivided: the axes that stay whole, by number, because the devices that cut the base do not divide them; for
        each, the axes of the mesh.
    """

    sharding: Sharding | PartitionSpec
    names: tuple[tuple[str, ...], ...]
    undivided: Mapping[int, tuple[str, ...]]


def placements(path: str, part: Adapter, given: Mapping[str, Any]) -> Adapter:
    """The adapter of one leaf, a `Placement` in place of each of its arrays.

    Args:
      path: of the leaf.
      part: its adapter; what an optimizer has masked there stays as it is.
      given: by path, the shardings of leaves, or of parts of the tree.

    Raises:
      AdapterError: if there is none for the leaf, or one that it cannot have.
    """
    base, layout = _of_leaf(path, part, given), part.variant.layout(part.axes)

    def place(keys: Any, array: Any) -> Placement:
        return _placement(base, layout.get(keys[0].name, tuple(range(array.ndim))), array.shape)

    return jax.tree_util.tree_map_with_path(place, part)


def _placement(base: Sharding | PartitionSpec, axes: tuple[int, ...], shape: tuple[int, ...]) -> Placement:
    # An optimizer may keep an array of fewer axes, and on a single device there is nothing to cut.
    if len(axes) != len(shape) or not isinstance(base, (NamedSharding, PartitionSpec)):
        return Placement(_replicated(base), ((),) * len(shape), {})
    spec = factor_spec(axes, base if isinstance(base, PartitionSpec) else base.spec)
    names = tuple(map(mesh_axes, spec))
    if isinstance(base, PartitionSpec):  # of a mesh whose sizes are not known
        return Placement(spec, names, {})
    sizes = base.mesh.shape
    undivided = {axis: its for axis, its in enumerate(names) if shape[axis] % math.prod(map(sizes.__getitem__, its))}
    divided = PartitionSpec(*(None if axis in undivided else its for axis, its in enumerate(spec)))
    return Placement(NamedSharding(base.mesh, divided), tuple(map(mesh_axes, divided)), undivided)


def _of_leaf(path: str, part: Adapter, given: Mapping[str, Any]) -> Sharding | PartitionSpec:
    """The sharding of a leaf: its own, or that of the nearest part of the tree that it is in."""
    steps = path.split("/")
    prefixes = ["/".join(steps[:count]) for count in range(len(steps), -1, -1)]
    found = next((given[prefix] for prefix in prefixes if prefix in given), None)
    if found is None:
        raise AdapterError(
            f"Expected a sharding for each adapted leaf, or for a part of the tree that it is in; there is none for "
            f"{path!r}.\n  The nearest paths: {', '.join(map(repr, nearest(path, list(given)))) or 'none'}.\n"
            "  Give a tree like the one that the adapter was made from, or one sharding for all of it."
        )
    sharding = found if isinstance(found, (Sharding, PartitionSpec)) else getattr(found, "sharding", None)
    if sharding is None:
        raise AdapterError(
            f"Expected a sharding, or an array that has one, for {path!r}; got a {type(found).__name__} without.\n"
            "  If boxes name its axes, ask them: `nn.get_sharding(params, mesh)`, for logical names "
            "`nn.logical_to_mesh_sharding(nn.get_partition_spec(params), mesh, rules)`, for an NNX state "
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
    """The same devices, with everything on each of them."""
    match sharding:
        case NamedSharding(mesh=mesh):
            return NamedSharding(mesh, PartitionSpec())
        case PartitionSpec():
            return PartitionSpec()
    return sharding


def _path(keys: Any) -> str:
    """The path under which an adapter stands in its dict."""
    return str(getattr(keys[-1], "key", "")) if keys else ""


def _is_placement(node: Any) -> bool:
    return isinstance(node, Placement)
