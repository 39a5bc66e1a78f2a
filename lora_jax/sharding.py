"""Shardings for adapters: an adapter follows its base onto the mesh, so that no step has to move either."""

from __future__ import annotations

from typing import Any

from ._shardings import follow

__all__ = ["of"]


def of(adapter: Any, params_shardings: Any) -> Any:
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
    >>> lj.sharding.of(shapes, {"kernel": P("fsdp", "model")})
    {'kernel': Adapter(LoRA(rank=2, alpha=4), 'io', a=P('fsdp', None), b=P(None, 'model'))}

    With shardings on a mesh, `jax.jit(init, out_shardings=lj.sharding.of(shapes, params_shardings))` makes each shard
    where it lives.

    Args:
      adapter: from `init`, or its shapes; or any tree that holds adapters under their paths, such as the state of an
        optimiser: what else is in it goes on every device.
      params_shardings: a tree like the parameters, or like the top of it, or one leaf for all: of `NamedSharding`s,
        `PartitionSpec`s, or arrays or `ShapeDtypeStruct`s that have a sharding. What `nn.get_sharding`,
        `nn.get_partition_spec`, `nnx.get_named_sharding` and `nnx.get_partition_spec` return is one.

    Returns:
      The tree of `adapter`, with a sharding of the given kind in place of each array.

    Raises:
      AdapterError: if there is no sharding for an adapted leaf, or one that it cannot have; if there is no adapter.
    """
    return follow(adapter, params_shardings)
