"""DARE: Language Models are Super Mario (Yu et al. 2023, arXiv:2311.03099)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from ..._core.numbers import chosen
from .method import Change, weighted_sum
from .sparse import Sparse, elected_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dare(Sparse):
    """Drops random elements of each adapter, rescales the others, and sums them (arXiv:2311.03099).

        Δ = Σ w_k·m_k⊙Δ_k / density        m_k is 1 with probability `density`, otherwise 0

    The expectation is the weighted sum. `combine` needs a `key`, and draws other elements for each adapter and path. It
    is PEFT's `dare_linear_svd` and `dare_linear`, and with `sign` `dare_ties_svd` and `dare_ties`. The factors of an
    update are dropped independently, so that with `on="factors"` the expectation has the cross terms of `Linear`.

    >>> Dare(density=0.5)
    Dare(density=0.5, on='updates', rank=None, sign=None)

    Attributes:
      density: the probability to keep an element, in (0, 1].
      on: whether it acts on the updates s·A·B, materialized, as the paper does with changes of weights, or on the
        factors, as PEFT's `dare_linear`; see `Prune`.
      rank: as in `Prune`.
      sign: None sums the adapters; otherwise signs are elected as in `Ties`.
    """

    sign: Literal["total", "frequency"] | None = None
    is_random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sign is not None:
            chosen("sign", self.sign, ("total", "frequency"))

    def change(self, changes: Sequence[Change], batch: int) -> Array:
        """Returns the sum of the rescaled elements, or the mean of those with the elected sign."""
        del batch  # elements are drawn independently
        weights = [change.weight for change in changes]
        dropped = [self._dropped(change) for change in changes]
        return weighted_sum(weights, dropped) if self.sign is None else elected_mean(weights, dropped, self.sign)

    def _dropped(self, change: Change) -> Array:
        kept = jax.random.bernoulli(change.key, float(self.density), change.value.shape)
        return jnp.where(kept, change.value / self.density, jnp.zeros_like(change.value))
