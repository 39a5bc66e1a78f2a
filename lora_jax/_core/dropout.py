"""Dropout of the activations that are multiplied with the factors. It does not affect the base."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._compat import varying
from .contract import computable
from .placement import explicit_sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Dropout:
    """The dropout of one kernel.

    Attributes:
      rate: the probability that an element is zero.
      key: PRNG key, different for each path, use and loop iteration. Shards of an activation in a `shard_map` get
        different masks, except with `check_vma=False`, where nothing shows that they are shards.
    """

    rate: float = dataclasses.field(metadata={"static": True})
    key: Array

    def fold_in(self, index: Any) -> Self:
        """Folds the index of a use or an iteration into the key."""
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, index))

    def apply(self, x: Array) -> Array:
        """Zeroes elements of `x` and divides the others by `1 - rate`; in at least 16 bits."""
        x = x.astype(computable(x.dtype))
        sharding, key = explicit_sharding(jax.typeof(x)), self.key
        for axis in sorted(varying(jax.typeof(x))):  # other elements on each device need another mask
            key = jax.random.fold_in(key, lax.axis_index(axis))
        kept = jax.random.bernoulli(key, 1 - self.rate, x.shape, out_sharding=sharding)
        return lax.select(kept, x / (1 - self.rate), jnp.zeros(x.shape, x.dtype, out_sharding=sharding))
