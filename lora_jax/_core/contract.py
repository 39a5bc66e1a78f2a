"""Contraction of two labelled arrays: one `dot_general`, as `einsum` would, without strings.

An axis is known by its label. A label that both arrays have is a batch axis if it is kept, and is summed if it is not.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding

from .placement import disjoint, names_of, typed

Labels = tuple[int, ...]


class Labelled(NamedTuple):
    """An array, and the label of each of its axes."""

    array: Array
    labels: Labels

    @property
    def names(self) -> dict[int, Any]:
        """Along which axes of the mesh its axes are cut, by label, where that is part of its type."""
        return names_of(self.labels, jax.typeof(self.array))

    def in_order(self, order: Labels) -> Array:
        """The array with its axes in the given order of labels; nothing is added if they already are."""
        if self.labels == tuple(order):
            return self.array
        return lax.transpose(self.array, [self.labels.index(label) for label in order])

    def beside(self, labels: Labels) -> Array:
        """The array as it broadcasts against one with these labels, of which it lacks some."""
        shared = tuple(label for label in labels if label in self.labels)
        return lax.expand_dims(self.in_order(shared), [at for at, label in enumerate(labels) if label not in shared])


def is_narrow(dtype: Any) -> bool:
    """Whether a dtype has too few bits to compute in: floats of fewer than 16 bits, integers of fewer than 8.

    JAX does not promote them. Kernels are stored in them, or cast to them for a product by special hardware.
    """
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits < 16
    return jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 8


def computable(dtype: Any) -> Any:
    """The dtype that an array of a dtype is computed with: its own, or bfloat16 where it is narrow, which holds it."""
    return jnp.dtype(jnp.bfloat16) if is_narrow(dtype) else jnp.dtype(dtype)


def widest(*dtypes: Any) -> Any:
    """The dtype, of 16 bits at least, that holds all of them; also where JAX does not promote them by itself."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, map(computable, dtypes))


def contract(
    x: Labelled,
    y: Labelled,
    *,
    keep: Collection[int],
    precision: Any = None,
    dtype: Any = None,
    names: Mapping[int, Any] | None = None,
) -> Labelled:
    """Multiplies two arrays over the axes that they share, summing those whose label is not in `keep`.

    The product's axes come as `dot_general` leaves them: batch, the rest of `x`, the rest of `y`. Where shardings are
    types, its own is as `names` says, by label; without it, each axis is cut as the operand's that it is.
    """
    shared = [label for label in x.labels if label in y.labels]
    summed = [label for label in shared if label not in keep]
    batch = [label for label in shared if label in keep]
    numbers = (
        ([x.labels.index(label) for label in summed], [y.labels.index(label) for label in summed]),
        ([x.labels.index(label) for label in batch], [y.labels.index(label) for label in batch]),
    )
    labels = (*batch, *(label for label in (*x.labels, *y.labels) if label not in shared))
    array = lax.dot_general(
        x.array,
        y.array,
        numbers,
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=sharding_of_product(x, y, labels, names),
    )
    return Labelled(array, labels)


def sharding_of_product(
    x: Labelled, y: Labelled, labels: Sequence[int], names: Mapping[int, Any] | None = None
) -> NamedSharding | None:
    """Where a product goes if shardings are types: as `names` says, or else as its operands; None, if they are not."""
    for operand in (x, y):
        if (sharding := typed(jax.typeof(operand.array))) is not None:
            return sharding.update(spec=disjoint(labels, y.names | x.names if names is None else names))
    return None
