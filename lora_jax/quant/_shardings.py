"""Shardings of quantized leaves, derived from those of their kernels."""

from __future__ import annotations

from typing import Any

from .._core.paths import flatten, unflatten
from ._leaf import QuantizedLeaf, shardings_by_path, shardings_like


def shardings(params: Any, dense: Any) -> Any:
    """Returns shardings for a tree with quantized leaves, from those of the tree before it was quantized.

    Codes and scales are sharded as the kernel is; an axis whose size the devices do not divide is replicated, as are
    the second-level scales.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> mesh = jax.make_mesh((1, 1), ("fsdp", "model"))
    >>> place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "model"))
    >>> params = {"kernel": jax.ShapeDtypeStruct((128, 16), jnp.float32)}
    >>> small = lj.quant.quantize(params, {"kernel": lj.quant.NF4()})
    >>> lj.quant.shardings(small, {"kernel": place})["kernel"].codes.spec
    P('fsdp', 'model')

    Args:
      params: from `quantize`, or its shapes.
      dense: a tree with the same paths and a sharding for each leaf.

    Returns:
      A tree like `params`, with a sharding in place of each array, for `jax.device_put` and `jax.jit`.

    Raises:
      SpecError: if a leaf has no sharding.
    """
    leaves, treedef = flatten(params)
    by_path = shardings_by_path(dense, leaves)
    return unflatten(
        treedef,
        {
            path: shardings_like(leaf, by_path[path]) if isinstance(leaf, QuantizedLeaf) else by_path[path]
            for path, leaf in leaves.items()
        },
    )
