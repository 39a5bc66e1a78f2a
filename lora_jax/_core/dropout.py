"""Dropout on the low-rank path: what of the activation meets the factors. The base always sees all of it."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from .contract import computable
from .placement import typed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Dropout:
    """A rate and a key, which goes its own way into every use of a kernel.

    Attributes:
      rate: the probability that an element is zero.
      key: PRNG key; one for each path, use and turn of a loop.
    """

    rate: float = dataclasses.field(metadata={"static": True})
    key: Array

    def folded(self, number: Any) -> Self:
        """The same for one of several uses."""
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, number))

    def of(self, x: Array) -> Array:
        """Zeroes elements of `x` and scales the others, so that the expectation stays; in 16 bits at least."""
        x = x.astype(computable(x.dtype))
        where = typed(jax.typeof(x))
        kept = jax.random.bernoulli(self.key, 1 - self.rate, x.shape, out_sharding=where)
        return lax.select(kept, x / (1 - self.rate), jnp.zeros(x.shape, x.dtype, out_sharding=where))
