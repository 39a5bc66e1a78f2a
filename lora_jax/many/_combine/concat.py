"""Concatenation of the factors: exactly the sum of the updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax import Array

from .method import Combination, Term, concatenated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Concat(Combination):
    """The weighted sum of the updates, with the sum of the ranks. Exact, apart from the rounding of `a`.

        ΔW = Σ w_k·s_k·A_k·B_k = [w_1·s_1·A_1, w_2·s_2·A_2, …]·[B_1; B_2; …]

    >>> Concat()
    Concat()
    """

    def factors(self, terms: Sequence[Term], axes: str) -> tuple[Array, Array]:
        """Returns the concatenated factors, with weights and scales multiplied into `a`."""
        return concatenated(terms, axes)
