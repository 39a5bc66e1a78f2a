"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from .._core.axes import RANK, axes_of_b, axes_with
from .._core.base import base_of
from .._core.contract import widest
from .._core.kernel import AdaptedKernel
from .._core.norms import norms
from .._core.numbers import flag
from .._core.stored import StoredLeaf
from .._core.variant import LowRank, check_values


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class DoRA(LowRank):
    """A low-rank update of the direction of each output, and a trained magnitude (Liu et al. 2024, arXiv:2402.09353).

        W = magnitude ⊙ (W0 + s·A·B) / ‖W0 + s·A·B‖

    The norm is over the inputs, for each output, and is computed from the factors. Its gradient is stopped, as in the
    paper (section 4.3). `magnitude` is initialized to the norm of `W0`, so the model is initially unchanged.

    >>> DoRA(rank=8, alpha=16).scale, DoRA(rank=16, alpha=16, rank_stabilized=True).scale
    (2.0, 4.0)

    Attributes:
      rank: r, in [1, min(in, out)].
      alpha: α; the update is multiplied by α/r.
      clip_rank: as in `LoRA`.
      dropout: as in `LoRA`. As in the authors' code, (magnitude / norm - 1)·x·W0 uses the dropped activation, too.
      rank_stabilized: whether the scale is α/√r, as in rsLoRA.
      axes: as in `LoRA`.
    """

    rank_stabilized: bool = False
    adds: ClassVar[bool] = False
    needs_all: ClassVar[str] = "i"  # for the norms of the outputs

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(rank_stabilized=flag("rank_stabilized", self.rank_stabilized))

    @property
    def scale(self) -> float:
        """α/r or α/√r."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """The factors, and `magnitude`: the batch and output axes."""
        return super().layout(axes) | {"magnitude": (*axes_with(axes, "b"), *axes_with(axes, "o"))}

    def init(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """Returns the factors as in `LoRA`, and as magnitude the norm of each output of the kernel."""
        check_values(self, kernel)
        factors = super().init(key, kernel, axes, dtype)
        base = base_of(kernel if isinstance(kernel, StoredLeaf) else jnp.asarray(kernel))
        plain = super().apply(base, factors, axes, "")
        return factors | {"magnitude": norms(plain).astype(dtype)}

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> AdaptedKernel:
        """Returns the kernel with its factors and the gain of each output."""
        plain = super().apply(kernel, arrays, axes, path)
        constant = dataclasses.replace(plain, a=lax.stop_gradient(plain.a), b=lax.stop_gradient(plain.b))
        magnitude, norm = arrays["magnitude"], lax.stop_gradient(norms(constant))
        gain = magnitude.astype(widest(magnitude.dtype, norm.dtype)) / norm
        return dataclasses.replace(plain, gain=lax.expand_dims(gain, [axes_of_b(axes).index(RANK)]))
