"""DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation (Bini et al. 2025, arXiv:2503.18225)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from .._core.axes import axes_of_a, axes_of_b, axes_with
from .._core.contract import widest
from .._core.kernel import AdaptedKernel
from .._core.norms import input_norms
from .._core.numbers import fraction, number
from .._core.variant import Ranked

_LEAST = 1e-4  # the least norm that a direction is divided by, as in PEFT


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class DeLoRA(Ranked):
    """A low-rank update of normalized directions, and a trained bound of its norm (Bini et al. 2025, arXiv:2503.18225).

        W = W0 + (λ / rank)·‖W0‖ ⊙ Σ_k A_k·B_k / (‖A_k‖·‖B_k‖)

    A_k is a column of `A`, and B_k a row of `B`. λ is the array `bound`, one number for each layer. ‖W0‖ is the norm of
    each input over the outputs, as in the authors' code and in PEFT; it is computed from the base in each call. `b` is
    initialized to zero and norms below 1e-4 count as 1e-4, so the model is initially unchanged.

    >>> DeLoRA(rank=8)
    DeLoRA(rank=8)

    Attributes:
      rank: r, in [1, min(in, out)].
      start_bound: initial value of λ; 15 in PEFT.
      dropout: as in `LoRA`.
      axes: as in `LoRA`.
    """

    start_bound: float = 15.0
    dropout: float = 0.0
    adds: ClassVar[bool] = False  # the update depends on the base
    needs_all: ClassVar[str] = "io"  # for the norms of the inputs and of the directions

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(start_bound=number("start_bound", self.start_bound), dropout=fraction("dropout", self.dropout))

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """The factors as in `LoRA`, and `bound`: the batch axes."""
        return {"a": axes_of_a(axes), "b": axes_of_b(axes), "bound": axes_with(axes, "b")}

    def init(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """Returns the factors as in `LoRA`, and `bound` constant."""
        bound = jnp.full(self.shapes(kernel.shape, axes)["bound"], self.start_bound, dtype)
        return super().init(key, kernel, axes, dtype) | {"bound": bound}

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> AdaptedKernel:
        """Returns the kernel with normalized factors, the norms of the inputs in `a` and the bound in `b`."""
        dtype = widest(*(array.dtype for array in arrays.values()), jnp.float32)
        a, b, bound = (arrays[name].astype(dtype) for name in ("a", "b", "bound"))
        norms = lax.stop_gradient(input_norms(kernel, axes)).astype(dtype)
        a = _normalized(a, [at for at, axis in enumerate(axes_of_a(axes)) if axis in axes_with(axes, "i")])
        b = _normalized(b, [at for at, axis in enumerate(axes_of_b(axes)) if axis in axes_with(axes, "o")])
        a *= norms[..., None]
        b *= lax.expand_dims(bound / self.rank, range(bound.ndim, b.ndim))
        return AdaptedKernel(kernel, a, b, scale=1.0, roles=tuple(axes), paths=(path,))


def _normalized(factor: Array, axes: Sequence[int]) -> Array:
    """Divides a factor by its norm over some axes."""
    squared = jnp.sum(jnp.square(factor), axes, keepdims=True)
    return factor * lax.rsqrt(jnp.maximum(squared, _LEAST**2))
