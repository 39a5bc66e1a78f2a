"""rsLoRA: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA (Kalajdzievski 2023, arXiv:2312.03732)."""

from __future__ import annotations

import dataclasses
import math

from .._core.variant import LowRank


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class RSLoRA(LowRank):
    """LoRA with a scale that keeps updates stable for large ranks (Kalajdzievski 2023, arXiv:2312.03732).

        W = W0 + (alpha / √rank)·A·B

    >>> RSLoRA(rank=16, alpha=16).scale
    4.0

    Attributes:
      rank: r, in [1, min(in, out)].
      alpha: α; the update is multiplied by α/√r.
      clip_rank: as in `LoRA`.
      dropout: as in `LoRA`.
      axes: as in `LoRA`.
    """

    @property
    def scale(self) -> float:
        """α/√r."""
        return self.alpha / math.sqrt(self.rank)
