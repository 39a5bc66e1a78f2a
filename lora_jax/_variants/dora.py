"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._core.axes import RANK, axes_of_b, axes_with
from .._core.base import StoredLeaf, base_of
from .._core.contract import widest
from .._core.kernel import AdaptedKernel
from .._core.norms import norms
from .._core.numbers import flag
from .._core.variant import LowRank
from .._errors import SpecError


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class DoRA(LowRank):
    """A low-rank update of each output's direction, and a magnitude (Liu et al. 2024, arXiv:2402.09353).

        W = magnitude ⊙ (W0 + s·A·B) / ‖W0 + s·A·B‖

    The norm is one for each output, over the inputs, taken from the factors; to the gradient it is a constant, as in
    the paper (section 4.3). `magnitude` starts as the norm of `W0`, so that the model starts as it was.

    >>> DoRA(rank=8, alpha=16).scale, DoRA(rank=16, alpha=16, rank_stabilized=True).scale
    (2.0, 4.0)

    Attributes:
      rank: r, in [1, min(in, out)].
      alpha: α; the update is multiplied by α/r.
      clip_rank: as in `LoRA`.
      dropout: as in `LoRA`; as in DoRA's own code, what the magnitude changes of the base's result sees it, too.
      rank_stabilized: whether the scale is rsLoRA's, α/√r.
      axes: as in `LoRA`.
    """

    rank_stabilized: bool = False
    adds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(rank_stabilized=flag("rank_stabilized", self.rank_stabilized))

    @property
    def scale(self) -> float:
        """α/r or α/√r."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """Beside the factors `magnitude`: the batch and output axes."""
        return super().layout(axes) | {"magnitude": (*axes_with(axes, "b"), *axes_with(axes, "o"))}

    def start(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """The factors as in `LoRA`; the magnitude is the norm of each output of the kernel."""
        if isinstance(kernel, jax.ShapeDtypeStruct):
            raise SpecError(
                "DoRA starts from the norms of the kernel's values, of which there is a shape alone; "
                "give the parameters themselves, or call `init` under `jax.eval_shape`"
            )
        factors = super().start(key, kernel, axes, dtype)
        base = base_of(kernel) if isinstance(kernel, StoredLeaf) else jnp.asarray(kernel)
        plain = super().apply(base, factors, axes, "")
        return factors | {"magnitude": norms(plain).astype(dtype)}

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> AdaptedKernel:
        """The kernel with its factors, and the gain of each output."""
        plain = super().apply(kernel, arrays, axes, path)
        magnitude, norm = arrays["magnitude"], lax.stop_gradient(norms(plain))
        gain = magnitude.astype(widest(magnitude.dtype, norm.dtype)) / norm
        return dataclasses.replace(plain, gain=lax.expand_dims(gain, [axes_of_b(axes).index(RANK)]))
