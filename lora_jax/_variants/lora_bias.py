"""The bias of `B`, as PEFT's `lora_bias` has it."""

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
    """A bias on `B`, for the bias of a layer whose kernel has LoRA: PEFT's `lora_bias`.

        y = x·W0 + bias0 + s·((x·A)·B + bias)        so the layer's own is  bias0 + s·bias

    A rule for the leaf that the layer adds: `{"**/kernel": LoRA(rank=8, alpha=16), "**/bias": LoRABias(scale=2)}`. It
    starts at zero and merges into that leaf; a layer without one has nowhere to keep it. (`Full` trains the same bias
    as it is: weight decay then draws it to zero, and not to the base's.)

    >>> LoRABias(scale=2)
    LoRABias(scale=2)

    Attributes:
      scale: s, that of the kernel's variant, α/r or α/√r.
    """

    axes: str | None = dataclasses.field(default=None, init=False, repr=False)
    scale: float
    needs_axes: ClassVar[bool] = False
    adds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(scale=number("scale", self.scale))
        if not self.scale:
            raise SpecError(f"Expected a scale that is not 0, with which nothing could be learnt; got {self}.")

    def check(self, shape: Sequence[int], axes: str) -> None:
        """Any shape will do."""

    def shapes(self, shape: Sequence[int], axes: str) -> dict[str, tuple[int, ...]]:
        """`bias`: the leaf's own shape."""
        return {"bias": tuple(shape)}

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """`bias` has the leaf's own axes."""
        return {}

    def start(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """Zeros."""
        return {"bias": jnp.zeros(kernel.shape, dtype)}

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> Array:
        """The sum, in the dtype that the model expects."""
        dtype = widest(kernel.dtype, arrays["bias"].dtype)
        return (as_array(kernel).astype(dtype) + self.scale * arrays["bias"].astype(dtype)).astype(kernel.dtype)
