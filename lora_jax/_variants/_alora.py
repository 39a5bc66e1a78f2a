"""aLoRA: Activated LoRA (Greenewald et al. 2025, arXiv:2504.12397)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from .._errors import SpecError
from ._base import LowRank


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class ALoRA(LowRank):
    """LoRA that acts from an invocation on: tokens before it are the base's (Greenewald et al. 2025, arXiv:2504.12397).

        y = x·W0 + [the token is active]·s·(x·A)·B

    What a cache keeps of the tokens before the invocation is what the base itself would keep there, bit for bit, so one
    cache serves the base and every such adapter. The adapted function is told which tokens those are:
    `adapted(params, adapter, ids, active_tokens=lora_jax.active_tokens(adapter, ids))`. It cannot be merged.

    >>> ALoRA(rank=32, alpha=32, invocation=[529, 29989])
    ALoRA(rank=32, alpha=32, invocation=(529, 29989))

    Attributes:
      rank: r, in [1, min(in, out)].
      alpha: α; the update is multiplied by α/r.
      dropout: as in `LoRA`.
      invocation: the ids of the tokens that invoke the adapter, at least one.
      axes: as in `LoRA`.
    """

    invocation: tuple[int, ...]
    adds: ClassVar[bool] = False
    some_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "invocation", tuple(map(int, self.invocation)))  # a list could not be hashed

    @property
    def scale(self) -> float:
        """α/r."""
        return self.alpha / self.rank

    def check(self, shape: Sequence[int], axes: str) -> None:
        """Raises as other methods do, and if there is no invocation."""
        super().check(shape, axes)
        if not self.invocation:
            raise SpecError(f"expected the tokens of an invocation; got {self}")
