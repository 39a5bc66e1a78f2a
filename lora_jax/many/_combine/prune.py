"""Magnitude pruning before the sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax import Array

from .method import Change, weighted_sum
from .sparse import Sparse, keep_largest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(Sparse):
    """The weighted sum of the largest elements of each adapter. PEFT's `magnitude_prune_svd` and `magnitude_prune`.

        Δ = Σ w_k·prune(Δ_k)        prune keeps the largest magnitudes

    >>> Prune(density=0.5)
    Prune(density=0.5, on='updates', rank=None)

    Attributes:
      density: the share of the elements to keep, in (0, 1].
      on: whether it acts on the updates s·A·B, materialized, or on the factors. A low-rank update has no zeros
        to prune for free, so `"updates"` is the meaning of pruning a kernel's change; `"factors"` is PEFT's cheap
        form, with cross terms as in `Linear` and equal ranks.
      rank: the rank of the result with `on="updates"`; None is the largest rank among the adapters at the path.
    """

    def change(self, changes: Sequence[Change], batch: int) -> Array:
        """Returns the sum of the pruned arrays."""
        pruned = [keep_largest(change.value, self.density, batch) for change in changes]
        return weighted_sum([change.weight for change in changes], pruned)
