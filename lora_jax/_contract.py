"""Contraction of two labelled arrays: one `dot_general`, as `einsum` would, without strings.

An axis is known by its label. A label that both arrays have is a batch axis if it is kept, and is summed if it is not.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

Labels = tuple[int, ...]


class Labelled(NamedTuple):
    """An array, and the label of each of its axes."""

    array: Array
    labels: Labels

    def in_order(self, order: Labels) -> Array:
        """The array with its axes in the given order of labels; nothing is added if they already are."""
        if self.labels == tuple(order):
            return self.array
        return lax.transpose(self.array, [self.labels.index(label) for label in order])


def widest(*dtypes: Any) -> Any:
    """The dtype that holds all of them, also where the user has forbidden JAX to promote by itself."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def contract(x: Labelled, y: Labelled, *, keep: Collection[int], precision: Any = None, dtype: Any = None) -> Labelled:
    """Multiplies two arrays over the axes that they share, summing those whose label is not in `keep`.

    The product's axes come as `dot_general` leaves them: batch, the rest of `x`, the rest of `y`.
    """
    shared = [label for label in x.labels if label in y.labels]
    summed = [label for label in shared if label not in keep]
    batch = [label for label in shared if label in keep]
    numbers = (
        ([x.labels.index(label) for label in summed], [y.labels.index(label) for label in summed]),
        ([x.labels.index(label) for label in batch], [y.labels.index(label) for label in batch]),
    )
    array = lax.dot_general(x.array, y.array, numbers, precision=precision, preferred_element_type=dtype)
    rest = [label for label in (*x.labels, *y.labels) if label not in shared]
    return Labelled(array, (*batch, *rest))
