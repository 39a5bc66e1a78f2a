"""What the methods share that drop elements of the factors, or of the materialized updates."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax

from ..._core.adapter import Adapter
from ..._core.linalg import SVD, as_factors, delta_matrices, factors_from_svd, kernel_shape, product
from ..._core.numbers import chosen, integer, number
from ..._core.placement import replicated
from ..._errors import SpecError
from ..._variants import LoRA
from .method import Change, Combination, Term, as_dtype, signed_roots, split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparse(Combination):
    """Methods that keep only some elements of each adapter.

    They were proposed for fully fine-tuned weights, whose change is a dense array. A low-rank update offers two:

    - `on="updates"`: the method acts on s·A·B, as in the papers, which keeps their meaning: an element that is dropped
      or elected is one of the kernel. Each update is materialized, one leaf at a time, and the result is truncated to
      `rank` by a singular value decomposition, since a sparse matrix has no low rank.
    - `on="factors"`: the method acts on `A` and on `B`, as PEFT does without `_svd`. Nothing is materialized, the rank
      is kept, and the ranks must be equal. The product has the cross terms of `Linear`, and the signs of factors, which
      are arbitrary (A·B = (-A)·(-B)), are taken for those of updates.

    Leaves without factors are one dense change each. The layers of a stack are treated separately.
    """

    density: float
    on: Literal["updates", "factors"] = "updates"
    rank: int | None = None

    def __post_init__(self) -> None:
        density = number("density", self.density)
        if not 0 < density <= 1:
            raise SpecError(f"Expected a number in (0, 1] for `density`, the share to keep; got density={density}.")
        chosen("on", self.on, ("updates", "factors"))
        if self.rank is not None:
            object.__setattr__(self, "rank", integer("rank", self.rank, least=1))
            if self.on == "factors":
                raise SpecError(
                    f"Expected no `rank` with on='factors', which keeps the rank of the factors; got {self}."
                )
        object.__setattr__(self, "density", density)

    @property
    def needs_equal_ranks(self) -> bool:
        """Whether it acts on the factors."""
        return self.on == "factors"

    @abc.abstractmethod
    def change(self, changes: Sequence[Change], batch: int) -> Array:
        """Returns the combination of dense arrays."""

    def factors(self, terms: Sequence[Term], axes: str) -> tuple[Array, Array]:
        """Combines the factors, or the updates, whose result is then truncated."""
        batch = axes.count("b")
        if self.on == "factors":
            keys = [split(term.key) for term in terms]
            of_a, of_b = signed_roots(terms)
            a = [Change(weight, term.a, key[0]) for weight, term, key in zip(of_a, terms, keys, strict=True)]
            b = [Change(weight, term.b, key[1]) for weight, term, key in zip(of_b, terms, keys, strict=True)]
            return self.change(a, batch), self.change(b, batch)
        parts = [_plain(term, axes) for term in terms]
        updates = [term.scale * product(*delta_matrices(part)) for term, part in zip(terms, parts, strict=True)]
        changes = [Change(term.weight, update, term.key) for term, update in zip(terms, updates, strict=True)]
        svd = SVD(*jnp.linalg.svd(self.change(changes, batch), full_matrices=False))
        rank = max(term.a.shape[-1] for term in terms) if self.rank is None else self.rank
        factors = as_factors(*factors_from_svd(svd, rank, 1.0), axes, kernel_shape(parts[0]))
        return factors["a"], factors["b"]


def _plain(term: Term, axes: str) -> Adapter:
    rank = term.a.shape[-1]
    return Adapter(LoRA(rank=rank, alpha=rank), axes, a=term.a, b=term.b)


def keep_largest(x: Array, density: float, batch: int) -> Array:
    """Sets all but the largest magnitudes to zero, in each element of the batch axes.

    `⌊density·size⌋` elements are kept, at least one, and all that equal the smallest of them.
    """
    flat = jnp.abs(replicated(x)).reshape(*x.shape[:batch], -1)
    kept = max(1, int(density * flat.shape[-1]))
    least = lax.top_k(flat, kept)[0][..., -1]
    return jnp.where(jnp.abs(x) >= lax.expand_dims(least, range(batch, x.ndim)), x, jnp.zeros_like(x))


def elected_mean(weights: Sequence[Any], arrays: Sequence[Array], sign: str) -> Array:
    """Elects a sign for each element, and divides the sum of those with it by their number (TIES).

    The sign of a weight counts as that of its array, so that a weight of -1 is the negative adapter; only the magnitude
    of the weight is applied after the election, as in PEFT.
    """
    weight = jnp.stack([as_dtype(weight, x) for weight, x in zip(weights, arrays, strict=True)])
    weight = lax.expand_dims(weight, range(1, arrays[0].ndim + 1))
    signed = jnp.sign(weight) * jnp.stack(arrays)
    votes = jnp.sign(signed) if sign == "frequency" else signed
    elected = jnp.where(votes.sum(0, keepdims=True) >= 0, 1, -1).astype(signed.dtype)
    agree = (jnp.sign(signed) == elected).astype(signed.dtype)
    return (agree * jnp.abs(weight) * signed).sum(0) / jnp.maximum(agree.sum(0), 1)
