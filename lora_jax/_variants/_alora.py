"""aLoRA: Activated LoRA (Greenewald et al. 2025, arXiv:2504.12397)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ._base import LowRank
from ._numbers import integers


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class ALoRA(LowRank):
    """LoRA that acts from an invocation on: tokens before it are the base's (Greenewald et al. 2025, arXiv:2504.12397).

        y = x·W0 + [the token is active]·s·(x·A)·B

    To the tokens before the invocation exactly zero is added: what a cache keeps of them is what the base itself would
    keep there, so one cache serves the base and every such adapter. The adapted function is told which are active:
    `adapted(params, adapter, ids, active_tokens=lora_jax.active_tokens(adapter, ids))`. It cannot be merged.

    >>> ALoRA(rank=32, alpha=32, invocation=[529, 29989])
    ALoRA(rank=32, alpha=32, invocation=(529, 29989))

    Attributes:
      rank: r, in [1, min(in, out)].
      alpha: α; the update is multiplied by α/r.
      clip_rank: as in `LoRA`.
      dropout: as in `LoRA`.
      invocation: the ids of the tokens that invoke the adapter, at least one.
      axes: as in `LoRA`.
    """

    invocation: tuple[int, ...]
    adds: ClassVar[bool] = False
    some_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(invocation=integers("invocation", self.invocation))  # a list could not be hashed

    @property
    def scale(self) -> float:
        """α/r."""
        return self.alpha / self.rank
