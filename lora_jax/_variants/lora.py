"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import dataclasses

from .._core.variant import LowRank


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class LoRA(LowRank):
    """A low-rank update with the paper's scale (Hu et al. 2021, arXiv:2106.09685).

        W = W0 + (alpha / rank)·A·B

    `A` and `B` are the transposes of the paper's, because Flax computes `x @ W`.

    >>> LoRA(rank=8, alpha=16).scale
    2.0

    Attributes:
      rank: r, in [1, min(in, out)].
      alpha: α; the update is multiplied by α/r.
      clip_rank: whether `rank` is an upper bound. If so, `init` gives a kernel with fewer inputs or outputs the largest
        rank that they allow, and the adapter stores that rank. α does not change, so the scale is α over that rank.
      dropout: probability, in [0, 1), with which an element of the activation is dropped before `A`, if the adapted
        function gets a `dropout_key`. The base's input and embedding lookups have no dropout.
      axes: the role of each kernel axis (`"ioo"`: `i` input, `o` output, `b` batch). Takes precedence over the roles
        in the traced model.
    """

    @property
    def scale(self) -> float:
        """α/r."""
        return self.alpha / self.rank
