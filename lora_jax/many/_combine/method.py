"""The interface of a way to combine adapters."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..._core.axes import RANK, axes_of_b


class Term(NamedTuple):
    """One adapter's update of a kernel, `scale·a·b`, and its weight.

    Attributes:
      weight: a Python number or a scalar array.
      scale: s.
      a: (batch…, in…, rank), in at least float32, with the diagonal of a variant that has one.
      b: (batch…, rank, out…), in at least float32.
      key: PRNG key of this adapter and leaf; None unless the method is random.
    """

    weight: Any
    scale: float
    a: Array
    b: Array
    key: Any


class Change(NamedTuple):
    """One adapter's change of a leaf without factors, such as a bias, and its weight.

    Attributes:
      weight: a Python number or a scalar array.
      value: the change, in at least float32.
      key: as in `Term`.
    """

    weight: Any
    value: Array
    key: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Combination(abc.ABC):
    """A way to combine adapters: an immutable value without arrays."""

    is_random: ClassVar[bool] = False  # whether it needs a key

    @property
    def needs_equal_ranks(self) -> bool:
        """Whether the adapters must have the same rank at each path."""
        return False

    @abc.abstractmethod
    def factors(self, terms: Sequence[Term], axes: str) -> tuple[Array, Array]:
        """Returns the factors of the combined update, (batch…, in…, rank) and (batch…, rank, out…), with scale 1."""

    def change(self, changes: Sequence[Change], batch: int) -> Array:
        """Returns the combined change of a leaf without factors; `batch` is the number of its batch axes."""
        del batch  # for methods that treat the layers of a stack separately
        return weighted_sum([change.weight for change in changes], [change.value for change in changes])


def weighted_sum(weights: Sequence[Any], arrays: Sequence[Array]) -> Array:
    """Returns Σ weight·array."""
    first, *others = (as_dtype(weight, array) * array for weight, array in zip(weights, arrays, strict=True))
    return sum(others, start=first)


def as_dtype(weight: Any, array: Array) -> Array:
    """Returns a weight in the dtype of an array."""
    return jnp.asarray(weight).astype(array.dtype)


def concatenated(terms: Sequence[Term], axes: str) -> tuple[Array, Array]:
    """Returns factors whose product is Σ weight·scale·a·b, of the sum of the ranks."""
    a = [as_dtype(term.weight, term.a) * term.scale * term.a for term in terms]
    b = [term.b for term in terms]
    return lax.concatenate(a, a[0].ndim - 1), lax.concatenate(b, axes_of_b(axes).index(RANK))


def signed_roots(terms: Sequence[Term]) -> tuple[list[Array], list[Array]]:
    """Returns the weights of `a` and of `b`, sign(c)·√|c| and √|c| for c = weight·scale."""
    products = [as_dtype(term.weight, term.a) * term.scale for term in terms]
    roots = [jnp.sqrt(jnp.abs(product)) for product in products]
    return [jnp.sign(product) * root for product, root in zip(products, roots, strict=True)], roots


def split(key: Any) -> tuple[Any, Any]:
    """Returns two keys; None twice for None."""
    return (None, None) if key is None else tuple(jax.random.split(key))  # type: ignore[return-value]
