"""A bias of `B`, as PEFT's `lora_bias`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from .._core.base import as_array
from .._core.contract import widest
from .._core.numbers import number
from .._core.variant import Variant
from .._errors import SpecError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRABias(Variant):
    """A bias of `B`, for the bias of a layer whose kernel has LoRA (PEFT's `lora_bias`).

        y = x·W0 + bias0 + s·((x·A)·B + bias)        that is, the bias of the layer becomes bias0 + s·bias

    It is the variant of the layer's bias: `{"**/kernel": LoRA(rank=8, alpha=16), "**/bias": LoRABias(scale=2)}`. `bias`
    is initialized to zero and can be merged. A layer without a bias cannot have it. Unlike with `Full`, weight decay
    pulls the bias of the layer to its value in the base, not to zero.

    >>> LoRABias(scale=2)
    LoRABias(scale=2)

    Attributes:
      scale: s, the scale of the kernel's variant: α/r or α/√r.
    """

    axes: str | None = dataclasses.field(default=None, init=False, repr=False)
    scale: float
    needs_axes: ClassVar[bool] = False
    adds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(scale=number("scale", self.scale))
        if not self.scale:
            raise SpecError(f"Expected a scale other than 0, because a scale of 0 has no effect; got {self}.")

    def check(self, shape: Sequence[int], axes: str) -> None:
        """Accepts any shape."""

    def shapes(self, shape: Sequence[int], axes: str) -> dict[str, tuple[int, ...]]:
        """`bias`: the shape of the leaf."""
        return {"bias": tuple(shape)}

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """`bias` has the axes of the leaf."""
        return {}

    def init(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """Returns zeros."""
        return {"bias": jnp.zeros(kernel.shape, dtype)}

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> Array:
        """Returns the sum in the dtype of the leaf."""
        dtype = widest(kernel.dtype, arrays["bias"].dtype)
        return (as_array(kernel).astype(dtype) + self.scale * arrays["bias"].astype(dtype)).astype(kernel.dtype)
