"""QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models (Xu et al. 2023, arXiv:2309.14717)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from .._core.axes import axes_of_a, axes_of_b, sizes
from .._core.contract import widest
from .._core.kernel import AdaptedKernel, materialize
from .._core.numbers import fraction, integer, number
from .._core.stored import StoredLeaf
from .._core.variant import Ranked
from .._errors import SpecError


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class QALoRA(Ranked):
    """A low-rank update that is constant in each group of inputs (Xu et al. 2023, arXiv:2309.14717).

        W = W0 + (alpha / rank)·repeat(A, group)·B        that is, y = x·W0 + s·(sum of x in each group)·A·B

    `a` has a row for each group of consecutive inputs, along the last input axis; `b` is initialized to zero, so the
    model is initially unchanged. `merge` keeps a kernel quantized if its format has a zero point for each group, or can
    get one: `quant.Int8`, `quant.Float8`, and arrays of Qwix whose tiles consist of groups.

    >>> QALoRA(rank=8, alpha=16, group=32)
    QALoRA(rank=8, alpha=16, group=32)

    Attributes:
      rank: r, in [1, min(in, out)].
      alpha: α; the update is multiplied by α/r.
      group: how many inputs share a row of `A`; divides the last input axis.
      dropout: as in `LoRA`.
      axes: as in `LoRA`.
    """

    alpha: float
    group: int
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(
            alpha=number("alpha", self.alpha),
            group=integer("group", self.group, least=1),
            dropout=fraction("dropout", self.dropout),
        )

    @property
    def scale(self) -> float:
        """α/r."""
        return self.alpha / self.rank

    def check(self, shape: Sequence[int], axes: str) -> None:
        """Raises as in `LoRA`, or if the groups do not divide the last input axis."""
        super().check(shape, axes)
        if (inputs := shape[axes.rindex("i")]) % self.group:
            raise SpecError(f"expected its last input axis to be a multiple of group={self.group}; it is {inputs}")

    def shapes(self, shape: Sequence[int], axes: str) -> dict[str, tuple[int, ...]]:
        """`a`: (batch…, in…, rank), with a group for each input of the last axis; `b`: (batch…, rank, out…)."""
        return super().shapes(self._groups(shape, axes), axes)

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """The factors as in `LoRA`."""
        return {"a": axes_of_a(axes), "b": axes_of_b(axes)}

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> AdaptedKernel:
        """Returns the kernel with its factors, `a` repeated."""
        at = axes_of_a(axes).index(axes.rindex("i"))
        # Not `jnp.repeat`, which does not keep an explicit sharding of the groups.
        groups = jnp.expand_dims(arrays["a"], at + 1)
        repeated = jnp.broadcast_to(groups, [*groups.shape[: at + 1], self.group, *groups.shape[at + 2 :]])
        a = repeated.reshape(sizes(axes_of_a(axes), kernel.shape, self.rank))
        return AdaptedKernel(kernel, a, arrays["b"], scale=self.scale, roles=tuple(axes), paths=(path,))

    def merged_into(self, leaf: StoredLeaf, arrays: dict[str, Array], axes: str) -> StoredLeaf | None:
        """Adds the update of each group to a leaf whose format has zero points."""
        groups = jnp.zeros(self._groups(leaf.shape, axes), widest(*(x.dtype for x in arrays.values()), jnp.float32))
        of_groups = AdaptedKernel(groups, arrays["a"], arrays["b"], self.scale, tuple(axes), paths=("",))
        return leaf.plus(materialize(of_groups))

    def _groups(self, shape: Sequence[int], axes: str) -> tuple[int, ...]:
        """The shape of a kernel with one input for each group."""
        last = axes.rindex("i")
        return tuple(size // self.group if axis == last else size for axis, size in enumerate(shape))
