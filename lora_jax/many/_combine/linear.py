"""Weighted sums of the factors, which are not sums of the updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax import Array

from .method import Combination, Term, signed_roots, weighted_sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Combination):
    """The product of weighted sums of the factors. It keeps the rank, and contains cross terms.

        A = Σ ±√|w_k·s_k|·A_k,  B = Σ √|w_k·s_k|·B_k        ± is the sign of w_k·s_k
        A·B = Σ_k w_k·s_k·A_k·B_k  +  Σ_{k≠l} ±√|w_k·s_k·w_l·s_l|·A_k·B_l

    The second sum, the cross terms, pairs the `A` of one adapter with the `B` of another, and is as large as the first
    one. They cancel only if the factors of different adapters are orthogonal. This is PEFT's `linear`. Adapters of
    equal initialization, such as seeds of one `A`, are the case where it is meaningful; otherwise use `Concat` or
    `Truncate`. The ranks must be equal.

    >>> Linear()
    Linear()
    """

    @property
    def needs_equal_ranks(self) -> bool:
        """True: factors are added."""
        return True

    def factors(self, terms: Sequence[Term], axes: str) -> tuple[Array, Array]:
        """Returns the sums of the factors."""
        of_a, of_b = signed_roots(terms)
        return weighted_sum(of_a, [term.a for term in terms]), weighted_sum(of_b, [term.b for term in terms])
