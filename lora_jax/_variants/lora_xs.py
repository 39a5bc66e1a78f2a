"""LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters (Bałazy et al. 2024, arXiv:2405.17604)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from .._core.axes import RANK, axes_of_a, axes_of_b, axes_with
from .._core.base import dense
from .._core.contract import Labeled, contract, widest
from .._core.kernel import AdaptedKernel
from .._core.linalg import as_factors, kernel_matrix
from .._core.numbers import fraction, number
from .._core.variant import Ranked, check_values


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class LoRAXS(Ranked):
    """A trained matrix, rank × rank, between the singular vectors of the kernel (Bałazy et al. 2024, arXiv:2405.17604).

        W = W0 + (alpha / rank)·A·R·B        A = U·Σ and B = Vᵀ, of the truncated W0 ≈ U·Σ·Vᵀ

    Only `r` is trained. The adapter holds `A` and `B` as `frozen_a` and `frozen_b`, because another decomposition may
    differ in signs. They have a gradient of zero; with the mask `optim.select("r")` they have no optimizer state and no
    weight decay either. `r` is initialized to zero, so the model is initially unchanged; in the paper it is normal with
    standard deviation 1e-5.

    >>> LoRAXS(rank=32, alpha=16).scale
    0.5

    Attributes:
      rank: r, in [1, min(in, out)]; each kernel has rank² parameters.
      alpha: α; the update is multiplied by α/r.
      dropout: as in `LoRA`.
      axes: as in `LoRA`.
    """

    alpha: float
    dropout: float = 0.0
    constants: ClassVar[tuple[str, ...]] = ("frozen_a", "frozen_b")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(alpha=number("alpha", self.alpha), dropout=fraction("dropout", self.dropout))

    @property
    def scale(self) -> float:
        """α/r."""
        return self.alpha / self.rank

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """The frozen factors, and `r`: (batch…, `RANK`, `RANK`)."""
        return {"frozen_a": axes_of_a(axes), "frozen_b": axes_of_b(axes), "r": (*axes_with(axes, "b"), RANK, RANK)}

    def init(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """Returns the frozen factors from the kernel, and `r` zero; the key is not used."""
        check_values(self, kernel)
        u, s, vt = jnp.linalg.svd(kernel_matrix(dense(kernel), axes), full_matrices=False)
        a, b = u[..., : self.rank] * s[..., None, : self.rank], vt[..., : self.rank, :]
        factors = as_factors(a.astype(dtype), b.astype(dtype), axes, kernel.shape)
        r = jnp.zeros(self.shapes(kernel.shape, axes)["r"], dtype)
        return {"frozen_a": factors["a"], "frozen_b": factors["b"], "r": r}

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> AdaptedKernel:
        """Returns the kernel with the factors A and R·B."""
        a, b = (lax.stop_gradient(arrays[name]) for name in self.constants)
        dtype, batch = widest(b.dtype, arrays["r"].dtype, jnp.float32), axes_with(axes, "b")
        r = Labeled(arrays["r"].astype(dtype), (*batch, RANK - 1, RANK))
        product = contract(r, Labeled(b.astype(dtype), axes_of_b(axes)), keep=batch, precision=lax.Precision.HIGHEST)
        return AdaptedKernel(kernel, a, product.array, scale=self.scale, roles=tuple(axes), paths=(path,))
