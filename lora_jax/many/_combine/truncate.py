"""The best approximation of the sum of the updates of a given rank, from the factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax import Array

from ..._core.adapter import Adapter
from ..._core.linalg import as_factors, factors_from_svd, kernel_shape, rank_for_energy, svd_of_delta
from ..._core.numbers import integer
from ..._errors import SpecError
from ..._merge.compress import check_energy
from ..._variants import LoRA
from .method import Combination, Term, concatenated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Truncate(Combination):
    """The best approximation of the weighted sum of the updates of a given rank (Eckart and Young 1936).

        ΔW = U_r·Σ_r·V_rᵀ        of Σ w_k·s_k·A_k·B_k, in the Frobenius norm

    It follows from QR decompositions of the concatenated factors and a decomposition of a matrix of the size of the sum
    of the ranks. Nothing of the kernel's shape is materialized, unlike in PEFT's `svd`. The singular values are in both
    factors, with their root. Leaves without factors are summed.

    >>> Truncate(rank=8), Truncate(energy=0.9)
    (Truncate(rank=8, energy=None), Truncate(rank=None, energy=0.9))

    Attributes:
      rank: the rank; less where the ranks of the adapters, or the kernel, allow only less.
      energy: in place of `rank`, a fraction in (0, 1): the smallest rank that keeps this fraction of ‖ΔW‖² in the
        Frobenius norm. Not under `jit`.
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise SpecError(f"Expected either `rank` or `energy`; got {self}.")
        if self.rank is not None:
            object.__setattr__(self, "rank", integer("rank", self.rank, least=1))
        else:
            object.__setattr__(self, "energy", check_energy(self.energy))

    def factors(self, terms: Sequence[Term], axes: str) -> tuple[Array, Array]:
        """Returns the truncated factors."""
        a, b = concatenated(terms, axes)
        rank = a.shape[-1]
        part = Adapter(LoRA(rank=rank, alpha=rank), axes, a=a, b=b)
        svd = svd_of_delta(part)
        rank = self.rank or rank_for_energy(svd.s, self.energy or 0)
        factors = as_factors(*factors_from_svd(svd, rank, 1.0), axes, kernel_shape(part))
        return factors["a"], factors["b"]
