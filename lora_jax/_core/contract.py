"""Contractions of labeled arrays: one `dot_general`, as `einsum` makes it, with integer labels.

A label of both arrays is a batch axis if it is in `keep`, and is summed otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding

from .placement import explicit_sharding, names_of, spec_by_label

Labels = tuple[int, ...]


class Labeled(NamedTuple):
    """An array with a label for each axis."""

    array: Array
    labels: Labels

    @property
    def names(self) -> dict[int, Any]:
        """The mesh axes along which each axis is sharded, by label; empty unless shardings are explicit."""
        return names_of(self.labels, jax.typeof(self.array))

    def in_order(self, order: Labels) -> Array:
        """Returns the array with its axes in the given order; no `transpose` if they already are in it."""
        if self.labels == tuple(order):
            return self.array
        return lax.transpose(self.array, [self.labels.index(label) for label in order])

    def expand_to(self, labels: Labels) -> Array:
        """Inserts axes of size 1, so that the array broadcasts against one with the given labels."""
        shared = tuple(label for label in labels if label in self.labels)
        return lax.expand_dims(self.in_order(shared), [i for i, label in enumerate(labels) if label not in shared])


def is_narrow(dtype: Any) -> bool:
    """Whether a dtype is too narrow for computations: floats of fewer than 16 bits, integers of fewer than 8.

    JAX does not promote these dtypes. They are used for storage, and for products on special hardware.
    """
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits < 16
    return jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 8


def computable(dtype: Any) -> Any:
    """Returns bfloat16 for a narrow dtype, all of whose values it can represent, and `dtype` otherwise."""
    return jnp.dtype(jnp.bfloat16) if is_narrow(dtype) else jnp.dtype(dtype)


def widest(*dtypes: Any) -> Any:
    """Returns the dtype that all of the dtypes promote to, at least 16 bits wide, even if promotion is strict."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, map(computable, dtypes))


def contract(
    x: Labeled,
    y: Labeled,
    *,
    keep: Collection[int],
    precision: Any = None,
    dtype: Any = None,
    names: Mapping[int, Any] | None = None,
) -> Labeled:
    """Multiplies two arrays and sums over the labels of both that are not in `keep`.

    The axes of the result are in the order of `dot_general`: batch, the rest of `x`, the rest of `y`. With explicit
    sharding, the result is sharded according to `names` (mesh axes by label), or else as its operands are.
    """
    shared = [label for label in x.labels if label in y.labels]
    summed = [label for label in shared if label not in keep]
    batch = [label for label in shared if label in keep]
    dimension_numbers = (
        ([x.labels.index(label) for label in summed], [y.labels.index(label) for label in summed]),
        ([x.labels.index(label) for label in batch], [y.labels.index(label) for label in batch]),
    )
    labels = (*batch, *(label for label in (*x.labels, *y.labels) if label not in shared))
    array = lax.dot_general(
        x.array,
        y.array,
        dimension_numbers,
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=sharding_of_product(x, y, labels, names),
    )
    return Labeled(array, labels)


def sharding_of_product(
    x: Labeled, y: Labeled, labels: Sequence[int], names: Mapping[int, Any] | None = None
) -> NamedSharding | None:
    """Returns the explicit sharding of a product: from `names`, or else from its operands. None if none is explicit."""
    for operand in (x, y):
        if (sharding := explicit_sharding(jax.typeof(operand.array))) is not None:
            return sharding.update(spec=spec_by_label(labels, y.names | x.names if names is None else names))
    return None
