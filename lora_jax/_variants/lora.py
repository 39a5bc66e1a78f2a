"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import dataclasses

from .._core.variant import LowRank


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class LoRA(LowRank):
    """A low-rank update with the paper's scale (Hu et al. 2021, arXiv:2106.09685).

        W = W0 + (alpha / rank)·A·B

    Our `A` and `B` are the transposes of the paper's, as Flax computes `x @ W`.

    >>> LoRA(rank=8, alpha=16).scale
    2.0

    Attributes:
      rank: r, in [1, min(in, out)].
      alpha: α; the update is multiplied by α/r.
      clip_rank: whether `rank` is an upper bound: a kernel with fewer inputs or outputs gets the rank that these allow.
        `init` decides it, and the adapter's variant has the rank that it got. α stays, so that the scale is α over
        that rank, as if it had been written for the kernel by itself.
      dropout: the share of the activations that is dropped before they meet `A`, in [0, 1), where the adapted function
        gets a `dropout_key`. Not of the base's, nor of rows that are looked up.
      axes: the role of each kernel axis (`"ioo"`: `i` input, `o` output, `b` batch), where it cannot be known
        otherwise; it outranks what was traced.
    """

    @property
    def scale(self) -> float:
        """α/r."""
        return self.alpha / self.rank
