"""Rows: chosen rows of a table are trained and the others are not, as those of new tokens in an embedding."""

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
    """Trains some rows of an embedding, and of the head that is tied to it.

        W = W0 + onehot(ids)·rows

    That is a low-rank update whose `A` is known: the table is neither copied nor formed, and has no gradient. `rows` is
    what is added to the rows, and starts at zero; weight decay draws it there, and the rows to the base's.

    >>> Rows(ids=[32000, 32001])
    Rows(ids=(32000, 32001))

    Attributes:
      ids: the rows, each once, by number; many are better trained whole, as for each token looked up or predicted a
        product with all of them is taken.
      axes: as in `LoRA`; a row is one place of the only input axis.
    """

    ids: tuple[int, ...]
    needs_axes: ClassVar[bool] = True
    adds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(ids=integers("ids", self.ids))  # a list, as JSON has, could not be hashed
        if len(set(self.ids)) < len(self.ids):
            raise SpecError(f"Expected each row once in `ids`; got ids={self.ids}.")

    def check(self, shape: Sequence[int], axes: str) -> None:
        """Raises if there is not one input axis that has all the rows."""
        inputs = axes_with(axes, "i")
        if len(inputs) != 1 or "o" not in axes:
            raise SpecError(
                f"Rows needs a table with one input axis, that of the rows, and output axes; its axes are {axes!r}"
            )
        size = shape[inputs[0]]
        if max(self.ids) >= size:
            raise SpecError(f"there are {size} rows with axes {axes!r}; got ids={self.ids}")

    def shapes(self, shape: Sequence[int], axes: str) -> dict[str, tuple[int, ...]]:
        """`rows`: (batch…, number of ids, out…)."""
        return {name: sizes(its, shape, len(self.ids)) for name, its in self.layout(axes).items()}

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """`rows`: (batch…, `RANK`, out…), the ids in place of the rank."""
        return {"rows": axes_of_b(axes)}

    def start(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """Zeros."""
        return {name: jnp.zeros(shape, dtype) for name, shape in self.shapes(kernel.shape, axes).items()}

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> AdaptedKernel:
        """The table with its rows as a factor, and the other factor, which says where they are."""
        rows = arrays["rows"]
        shape = sizes(axes_of_a(axes), kernel.shape, len(self.ids))
        where = jnp.arange(shape[-2])[:, None] == jnp.array(self.ids)[None]
        a = like_kernel(jnp.broadcast_to(where.astype(rows.dtype), shape), axes_of_a(axes), kernel)
        return AdaptedKernel(kernel, a, rows, scale=1.0, roles=tuple(axes), paths=(path,))
