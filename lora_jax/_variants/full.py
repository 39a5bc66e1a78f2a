"""Full: the leaf is trained whole, as a new classifier head is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from .._core.base import as_array, base_of
from .._core.variant import Variant
from .._errors import SpecError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Variant):
    """Trains a leaf whole: its copy lives in the adapter as `value`, and the model sees the copy.

    For heads, norms and biases, of any shape. The model gets it in the dtype of the base's leaf.
    """

    axes: str | None = dataclasses.field(default=None, init=False, repr=False)
    needs_axes: ClassVar[bool] = False
    adds: ClassVar[bool] = False

    def check(self, shape: Sequence[int], axes: str) -> None:
        """Any shape will do."""

    def shapes(self, shape: Sequence[int], axes: str) -> dict[str, tuple[int, ...]]:
        """`value`: the leaf's own shape."""
        return {"value": tuple(shape)}

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """`value` has the leaf's own axes."""
        return {}

    def start(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """A copy of the leaf."""
        if isinstance(kernel, jax.ShapeDtypeStruct):
            raise SpecError(
                "Full() starts from the leaf's values, of which there is a shape alone; "
                "give the parameters themselves, or call `init` under `jax.eval_shape`"
            )
        return {"value": jnp.array(as_array(base_of(kernel)), dtype)}

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> Array:
        """The copy, in the dtype that the model expects."""
        return jnp.asarray(arrays["value"], kernel.dtype)
