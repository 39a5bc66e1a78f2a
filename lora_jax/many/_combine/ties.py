"""TIES-Merging: Resolving Interference When Merging Models (Yadav et al. 2023, arXiv:2306.01708)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from jax import Array

from ..._core.numbers import chosen
from .method import Change
from .sparse import Sparse, elected_mean, keep_largest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ties(Sparse):
    """Trims each adapter, elects a sign for each element, and averages those that have it (arXiv:2306.01708).

        Δ = Σ_k w_k·τ_k·[sign(τ_k) = γ] / #{k: sign(τ_k) = γ}        τ_k = prune(Δ_k), γ = sign(Σ_k τ_k)

    The sum is divided by the number of adapters that agree, not by their weights, as in PEFT's `ties_svd` and `ties`.
    A weight of -1 is the negative adapter, also in the election; PEFT elects before it applies the weights.
    The result is not a sum, so combining in two steps differs from combining at once.

    >>> Ties(density=0.2)
    Ties(density=0.2, on='updates', rank=None, sign='total')

    Attributes:
      density: the share of the elements to keep, in (0, 1]; 0.2 in the paper.
      on: whether it acts on the updates s·A·B, materialized, as the paper does with changes of weights, or on the
        factors, as PEFT's `ties`; see `Prune`.
      rank: as in `Prune`.
      sign: whether the elected sign is that of the sum, `"total"`, as in the paper, or that of most adapters.
    """

    sign: Literal["total", "frequency"] = "total"

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen("sign", self.sign, ("total", "frequency"))

    def change(self, changes: Sequence[Change], batch: int) -> Array:
        """Returns the mean of the trimmed elements with the elected sign."""
        trimmed = [keep_largest(change.value, self.density, batch) for change in changes]
        return elected_mean([change.weight for change in changes], trimmed, self.sign)
