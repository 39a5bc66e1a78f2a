"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (Zhang et al. 2023, arXiv:2303.10512)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._core.axes import RANK, axes_with
from .._core.variant import LowRank

_STDDEV = 0.02  # of the initial factors, as in the authors' code and in PEFT


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class AdaLoRA(LowRank):
    """A low-rank update whose directions are pruned during training (Zhang et al. 2023, arXiv:2303.10512).

        W = W0 + (alpha / rank)·A·diag(e)·B

    A·diag(e)·B is the paper's P·Λ·Q. `adaptive.orthogonality` keeps it close to a singular value decomposition, and
    `adaptive.ada_lora` sets the least important entries of `e` to zero. `e` is initialized to zero, so the model is
    initially unchanged; `a` and `b` are normal with standard deviation 0.02. The scale uses the initial rank, so
    pruning does not scale up the directions that remain.

    >>> AdaLoRA(rank=12, alpha=24).scale
    2.0

    Attributes:
      rank: r, the initial rank, in [1, min(in, out)].
      alpha: α; the update is multiplied by α/r.
      clip_rank: as in `LoRA`.
      dropout: as in `LoRA`.
      axes: as in `LoRA`.
    """

    @property
    def scale(self) -> float:
        """α/r, with the initial rank."""
        return self.alpha / self.rank

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """The factors, and `e`: (batch…, `RANK`)."""
        return super().layout(axes) | {"e": (*axes_with(axes, "b"), RANK)}

    def init(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """Returns normal `a` and `b`, and `e` zero."""
        shapes = self.shapes(kernel.shape, axes)
        keys = zip("ab", jax.random.split(key), strict=True)
        factors = {name: _STDDEV * jax.random.normal(subkey, shapes[name], dtype) for name, subkey in keys}
        return factors | {"e": jnp.zeros(shapes["e"], dtype)}

    def diagonal(self, arrays: dict[str, Array]) -> Array:
        """Returns `e`."""
        return arrays["e"]
