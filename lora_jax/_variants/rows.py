"""Rows: selected rows of a table are trained, such as the embeddings of new tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from .._core.axes import axes_of_a, axes_of_b, axes_with, sizes
from .._core.kernel import AdaptedKernel
from .._core.numbers import integers
from .._core.placement import like_kernel
from .._core.variant import Variant
from .._errors import SpecError


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Rows(Variant):
    """Trains some rows of an embedding table, and of an output head that is tied to it.

        W = W0 + onehot(ids)·rows

    This is a low-rank update with a fixed `A`, so the table is not copied and has no gradient. `rows` is initialized to
    zero. Weight decay pulls the trained rows to their values in the base.

    >>> Rows(ids=[32000, 32001])
    Rows(ids=(32000, 32001))

    Attributes:
      ids: the indices of the rows, without duplicates. Every token is multiplied with all of them, so `Full` is faster
        for many rows.
      axes: as in `LoRA`. The rows are the indices of the only input axis.
    """

    ids: tuple[int, ...]
    needs_axes: ClassVar[bool] = True
    adds: ClassVar[bool] = True
    needs_all: ClassVar[str] = "i"  # to number the rows

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(ids=integers("ids", self.ids))  # a list, as from JSON, cannot be hashed
        if len(set(self.ids)) < len(self.ids):
            raise SpecError(f"Expected no duplicates in `ids`; got ids={self.ids}.")

    def check(self, shape: Sequence[int], axes: str) -> None:
        """Raises unless there is one input axis, and it has all rows."""
        inputs = axes_with(axes, "i")
        if len(inputs) != 1 or "o" not in axes:
            raise SpecError(f"Rows needs one input axis, the axis of the rows, and output axes; the axes are {axes!r}")
        self.check_numbers(shape, axes)

    def check_numbers(self, shape: Sequence[int], axes: str) -> None:
        """Raises unless the table has all rows."""
        size = shape[axes.index("i")]
        if max(self.ids) >= size:
            raise SpecError(f"the table has {size} rows, with axes {axes!r}; got ids={self.ids}")

    def shapes(self, shape: Sequence[int], axes: str) -> dict[str, tuple[int, ...]]:
        """`rows`: (batch…, number of ids, out…)."""
        return {name: sizes(array_axes, shape, len(self.ids)) for name, array_axes in self.layout(axes).items()}

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """`rows`: (batch…, `RANK`, out…), where the rank is the number of ids."""
        return {"rows": axes_of_b(axes)}

    def init(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """Returns zeros."""
        return {name: jnp.zeros(shape, dtype) for name, shape in self.shapes(kernel.shape, axes).items()}

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> AdaptedKernel:
        """Returns the table with the factors onehot(ids) and `rows`."""
        rows = arrays["rows"]
        shape = sizes(axes_of_a(axes), kernel.shape, len(self.ids))
        one_hot = jnp.arange(shape[-2])[:, None] == jnp.array(self.ids)[None]
        a = like_kernel(jnp.broadcast_to(one_hot.astype(rows.dtype), shape), axes_of_a(axes), kernel)
        return AdaptedKernel(kernel, a, rows, scale=1.0, roles=tuple(axes), paths=(path,))
