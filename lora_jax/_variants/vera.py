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
from .._core.numbers import integer, number, share
from .._core.placement import like_kernel
from .._core.variant import Variant, check_axes


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class VeRA(Variant):
    """Two vectors for each kernel, around random matrices that all share (Kopiczko et al. 2023, arXiv:2310.11454).

        W = W0 + A·diag(lambda_d)·B·diag(lambda_b)

    `A` and `B` are frozen, of the entries that Kaiming's uniform start has for the kernel's fan-in and for the rank.
    They are made anew from the seed in each call, and are no part of the adapter: what is trained, kept and sent are
    the vectors, `rank + out` numbers. Kernels of other sizes have the first rows of the same matrices, as large as
    their own fan-in makes them. `lambda_b` starts at zero, so that the model starts as it was.

    >>> VeRA(rank=256, seed=0)
    VeRA(rank=256, seed=0)

    Attributes:
      rank: r, at least 1; the paper takes 256 to 1024, as a rank costs one number alone.
      seed: of `A` and `B`, in [0, 2³²); part of the method, as other matrices make another adapter of the vectors.
      start_d: what `lambda_d` starts at; 0.1 in the paper.
      dropout: as in `LoRA`.
      axes: as in `LoRA`.
    """

    rank: int
    seed: int
    start_d: float = 0.1
    dropout: float = 0.0
    needs_axes: ClassVar[bool] = True
    adds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(
            rank=integer("rank", self.rank, least=1),
            seed=integer("seed", self.seed, least=0, below=2**32),
            start_d=number("start_d", self.start_d),
            dropout=share("dropout", self.dropout),
        )

    def check(self, shape: Sequence[int], axes: str) -> None:
        """Raises if there is no input or no output axis; any kernel can have any rank."""
        check_axes(self, axes)

    def shapes(self, shape: Sequence[int], axes: str) -> dict[str, tuple[int, ...]]:
        """`lambda_b`: (batch…, out…); `lambda_d`: (batch…, rank)."""
        return {name: sizes(its, shape, self.rank) for name, its in self.layout(axes).items()}

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """`lambda_b`: the batch and output axes; `lambda_d`: (batch…, `RANK`)."""
        batch = axes_with(axes, "b")
        return {"lambda_b": (*batch, *axes_with(axes, "o")), "lambda_d": (*batch, RANK)}

    def start(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """`lambda_b` zero, `lambda_d` the same number everywhere; the key is not used."""
        shapes = self.shapes(kernel.shape, axes)
        return {
            "lambda_b": jnp.zeros(shapes["lambda_b"], dtype),
            "lambda_d": jnp.full(shapes["lambda_d"], self.start_d, dtype),
        }

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> AdaptedKernel:
        """The kernel with the frozen matrices as its factors, both vectors on the second, which is small."""
        lambda_b, lambda_d = arrays["lambda_b"], arrays["lambda_d"]
        dtype = widest(lambda_b.dtype, lambda_d.dtype)
        d_in, d_out = (width(axes, kernel.shape, role) for role in "io")
        shape_a, shape_b = (sizes(its(axes), kernel.shape, self.rank) for its in (axes_of_a, axes_of_b))
        batch = len(axes_with(axes, "b"))
        lambda_b, lambda_d = lambda_b.astype(dtype), lambda_d.astype(dtype)
        a = self._frozen(0, d_in, fan_in=d_in).astype(dtype).reshape((1,) * batch + shape_a[batch:])
        b = self._frozen(1, d_out, fan_in=self.rank).astype(dtype).T.reshape((1,) * batch + shape_b[batch:])
        b = b * lax.expand_dims(lambda_d, range(batch + 1, len(shape_b))) * lax.expand_dims(lambda_b, [batch])
        a = like_kernel(jnp.broadcast_to(a, shape_a), axes_of_a(axes), kernel)
        return AdaptedKernel(kernel, a, b, scale=1.0, roles=tuple(axes), paths=(path,))

    def _frozen(self, which: int, rows: int, *, fan_in: int) -> Array:
        """The first rows of a matrix, `(rows, rank)`, uniform in ±√(6/fan_in); each row has a key of its own."""

        def draw(row: Array) -> Array:
            return jax.random.uniform(jax.random.fold_in(key, row), (self.rank,), jnp.float32, minval=-1, maxval=1)

        with jax.threefry_partitionable(True):  # the same numbers whatever the user's own are drawn with
            key = jax.random.fold_in(jax.random.key(self.seed, impl="threefry2x32"), which)
            return jax.vmap(draw)(jnp.arange(rows)) * math.sqrt(6 / fan_in)
