"""Full: all parameters of a leaf are trained, as for a new classifier head."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from .._core.base import dense
from .._core.stored import StoredLeaf
from .._core.variant import Variant
from .._errors import SpecError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Variant):
    """Trains all parameters of a leaf, such as a head, a norm or a bias.

    The adapter holds a copy of the leaf as `value`. The model receives the copy, in the dtype of the leaf.
    """

    axes: str | None = dataclasses.field(default=None, init=False, repr=False)
    needs_axes: ClassVar[bool] = False
    adds: ClassVar[bool] = False

    def check(self, shape: Sequence[int], axes: str) -> None:
        """Accepts any shape."""

    def shapes(self, shape: Sequence[int], axes: str) -> dict[str, tuple[int, ...]]:
        """`value`: the shape of the leaf."""
        return {"value": tuple(shape)}

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """`value` has the axes of the leaf."""
        return {}

    def init(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """Returns a copy of the leaf."""
        if isinstance(kernel, jax.ShapeDtypeStruct):
            raise SpecError(
                "Full() is initialized from the values of the leaf, and got a shape only; "
                "pass the parameters, or call `init` under `jax.eval_shape`"
            )
        if isinstance(kernel, StoredLeaf):
            raise SpecError(
                "it is quantized, and Full() trains all of its values; "
                "dequantize it first: init(key, quant.dequantize(params, [path]), spec)"
            )
        return {"value": jnp.array(dense(kernel), dtype)}

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> Array:
        """Returns the copy in the dtype of the leaf."""
        return jnp.asarray(arrays["value"], kernel.dtype)
