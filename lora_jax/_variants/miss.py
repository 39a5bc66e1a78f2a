"""MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure (Kang and Yin 2024)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from .._core.axes import axes_of_a, axes_of_b, sizes, width
from .._core.kernel import AdaptedKernel
from .._core.numbers import fraction
from .._core.placement import like_kernel
from .._core.variant import Ranked, check_axes
from .._errors import SpecError


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class MiSS(Ranked):
    """One trained matrix, rank × out, that all shards of the inputs share (Kang and Yin 2024, arXiv:2409.15371).

        W[i] = W0[i] + B[i mod rank]        for each input i

    This is a low-rank update with a fixed `A`, A[i, k] = [i mod rank = k], so only `b` is stored and trained: half the
    parameters of LoRA, with the same FLOPs. Several input axes are counted as one. `b` is initialized to zero, so the
    model is initially unchanged. PEFT's modes `"bat"` and `"mini"` are other methods.

    >>> MiSS(rank=64)
    MiSS(rank=64)

    Attributes:
      rank: r, in [1, in].
      dropout: as in `LoRA`.
      axes: as in `LoRA`.
    """

    dropout: float = 0.0
    needs_all: ClassVar[str] = "i"  # to number the inputs

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(dropout=fraction("dropout", self.dropout))

    def check(self, shape: Sequence[int], axes: str) -> None:
        """Raises if there is no input or output axis, or if there are fewer inputs than the rank."""
        check_axes(self, axes)
        if self.rank > (inputs := width(axes, shape, "i")):
            raise SpecError(f"rank={self.rank} is too large; with axes {axes!r} it can be at most {inputs}")

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """`b`: (batch…, `RANK`, out…)."""
        return {"b": axes_of_b(axes)}

    def init(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """Returns zeros; the key is not used."""
        return {"b": jnp.zeros(self.shapes(kernel.shape, axes)["b"], dtype)}

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> AdaptedKernel:
        """Returns the kernel with the factors A and `b`."""
        b, shape = arrays["b"], sizes(axes_of_a(axes), kernel.shape, self.rank)
        inputs = shape[axes.count("b") : -1]
        which = jnp.arange(math.prod(inputs)).reshape(inputs) % self.rank
        one_hot = jax.nn.one_hot(which, self.rank, dtype=b.dtype)
        a = like_kernel(jnp.broadcast_to(one_hot, shape), axes_of_a(axes), kernel)
        return AdaptedKernel(kernel, a, b, scale=1.0, roles=tuple(axes), paths=(path,))
