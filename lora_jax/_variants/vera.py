"""VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al. 2023, arXiv:2310.11454)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._core.axes import RANK, axes_of_a, axes_of_b, axes_with, sizes, width
from .._core.contract import widest
from .._core.kernel import AdaptedKernel
from .._core.numbers import fraction, integer, number
from .._core.placement import like_kernel
from .._core.variant import Ranked, check_axes


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class VeRA(Ranked):
    """Two trained vectors for each kernel, with shared random matrices (Kopiczko et al. 2023, arXiv:2310.11454).

        W = W0 + A·diag(lambda_d)·B·diag(lambda_b)

    `A` and `B` are frozen, Kaiming-uniform for the kernel's fan-in and the rank. They are generated from the seed in
    each call and are not part of the adapter, which only holds the vectors, `rank + out` parameters. All kernels use
    the first rows of the same matrices, scaled for their fan-in. `lambda_b` is initialized to zero, so the model is
    initially unchanged.

    >>> VeRA(rank=256, seed=0)
    VeRA(rank=256, seed=0)

    Attributes:
      rank: r, at least 1. The paper uses 256 to 1024, as each rank adds only one parameter.
      seed: seed of `A` and `B`, in [0, 2³²). The vectors are valid only for the matrices that they were trained with.
      start_d: initial value of `lambda_d`; 0.1 in the paper.
      dropout: as in `LoRA`.
      axes: as in `LoRA`.
    """

    seed: int
    start_d: float = 0.1
    dropout: float = 0.0
    needs_all: ClassVar[str] = "io"  # to number the rows of the matrices

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(
            seed=integer("seed", self.seed, least=0, below=2**32),
            start_d=number("start_d", self.start_d),
            dropout=fraction("dropout", self.dropout),
        )

    def check(self, shape: Sequence[int], axes: str) -> None:
        """Raises if there is no input axis or no output axis; any rank is valid."""
        check_axes(self, axes)

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """`lambda_b`: the batch and output axes; `lambda_d`: (batch…, `RANK`)."""
        batch = axes_with(axes, "b")
        return {"lambda_b": (*batch, *axes_with(axes, "o")), "lambda_d": (*batch, RANK)}

    def init(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """Returns `lambda_b` zero and `lambda_d` constant; the key is not used."""
        shapes = self.shapes(kernel.shape, axes)
        return {
            "lambda_b": jnp.zeros(shapes["lambda_b"], dtype),
            "lambda_d": jnp.full(shapes["lambda_d"], self.start_d, dtype),
        }

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> AdaptedKernel:
        """Returns the kernel with the frozen matrices as factors, and both vectors multiplied into the second."""
        lambda_b, lambda_d = arrays["lambda_b"], arrays["lambda_d"]
        dtype = widest(lambda_b.dtype, lambda_d.dtype, jnp.float32)
        d_in, d_out = (width(axes, kernel.shape, role) for role in "io")
        shape_a, shape_b = (sizes(axes_of(axes), kernel.shape, self.rank) for axes_of in (axes_of_a, axes_of_b))
        batch = len(axes_with(axes, "b"))
        lambda_b, lambda_d = lambda_b.astype(dtype), lambda_d.astype(dtype)
        a = self.frozen(0, d_in, fan_in=d_in).astype(dtype).reshape((1,) * batch + shape_a[batch:])
        b = self.frozen(1, d_out, fan_in=self.rank).astype(dtype).T.reshape((1,) * batch + shape_b[batch:])
        b = b * lax.expand_dims(lambda_d, range(batch + 1, len(shape_b))) * lax.expand_dims(lambda_b, [batch])
        a = like_kernel(jnp.broadcast_to(a, shape_a), axes_of_a(axes), kernel)
        return AdaptedKernel(kernel, a, b, scale=1.0, roles=tuple(axes), paths=(path,))

    def frozen(self, index: int, rows: int, *, fan_in: int) -> Array:
        """Returns the first rows of a frozen matrix, `(rows, rank)`, uniform in ±√(6/fan_in), with one key per row."""

        def draw(row: Array) -> Array:
            return jax.random.uniform(jax.random.fold_in(key, row), (self.rank,), jnp.float32, minval=-1, maxval=1)

        with jax.threefry_partitionable(True):  # the same values whatever the user's setting is
            key = jax.random.fold_in(jax.random.key(self.seed, impl="threefry2x32"), index)
            return jax.vmap(draw)(jnp.arange(rows)) * math.sqrt(6 / fan_in)
