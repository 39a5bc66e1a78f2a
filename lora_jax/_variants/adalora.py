"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (Zhang et al. 2023, arXiv:2303.10512)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._core.axes import RANK, axes_with
from .._core.variant import LowRank

_SPREAD = 0.02  # of the factors at the start, as in the authors' code and in PEFT


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class AdaLoRA(LowRank):
    """A low-rank update of which directions are taken away while it is trained (Zhang et al. 2023, arXiv:2303.10512).

        W = W0 + (alpha / rank)·A·diag(e)·B

    The paper's P·Λ·Q, which `adaptive.orthogonality` keeps near a singular value decomposition, and of which
    `adaptive.ada_lora` sets to zero the `e` that matter least. `e` starts at zero, so that the model starts as it was;
    `a` and `b` are normal, their deviation 0.02. The rank in the scale is the one at the start, and does not follow
    the number of directions that are left: what stays is not made larger when others go.

    >>> AdaLoRA(rank=12, alpha=24).scale
    2.0

    Attributes:
      rank: r, that of the start, in [1, min(in, out)].
      alpha: α; the update is multiplied by α/r.
      clip_rank: as in `LoRA`.
      dropout: as in `LoRA`.
      axes: as in `LoRA`.
    """

    @property
    def scale(self) -> float:
        """α/r, of the rank at the start."""
        return self.alpha / self.rank

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """Beside the factors `e`: (batch…, `RANK`)."""
        return super().layout(axes) | {"e": (*axes_with(axes, "b"), RANK)}

    def start(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """`a` and `b` normal, `e` zero."""
        shapes = self.shapes(kernel.shape, axes)
        drawn = zip("ab", jax.random.split(key), strict=True)
        factors = {name: _SPREAD * jax.random.normal(its, shapes[name], dtype) for name, its in drawn}
        return factors | {"e": jnp.zeros(shapes["e"], dtype)}

    def diagonal(self, arrays: dict[str, Array]) -> Array:
        """`e`."""
        return arrays["e"]
