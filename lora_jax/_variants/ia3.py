"""IA³: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning (Liu et al. 2022)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from .._core.axes import RANK, axes_of_a, axes_of_b, sizes
from .._core.contract import widest
from .._core.kernel import AdaptedKernel
from .._core.numbers import flag
from .._core.variant import Variant, check_axes


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class IA3(Variant):
    """A trained factor of each output, or of each input, of a kernel (Liu et al. 2022, arXiv:2205.05638).

        W = W0 ⊙ (1 + gain)

    The paper's l is 1 + gain. `gain` is initialized to zero, so the model is initially unchanged, and weight decay
    pulls the kernel to that of the base. The paper has factors of the keys and values, which are outputs, and of the
    activations inside a feed-forward layer, which are inputs of its second kernel. A bias is not scaled.

    >>> IA3(), IA3(inputs=True)
    (IA3(), IA3(inputs=True))

    Attributes:
      inputs: whether the inputs have factors, and not the outputs.
      axes: as in `LoRA`.
    """

    inputs: bool = False
    needs_axes: ClassVar[bool] = True
    adds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(inputs=flag("inputs", self.inputs))

    def check(self, shape: Sequence[int], axes: str) -> None:
        """Raises if there is no input or output axis."""
        check_axes(self, axes)

    def shapes(self, shape: Sequence[int], axes: str) -> dict[str, tuple[int, ...]]:
        """`gain`: (batch…, out…), or (batch…, in…)."""
        return {"gain": sizes(self.layout(axes)["gain"], shape, 0)}

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """`gain`: the batch axes, and the output or input axes."""
        return {"gain": tuple(axis for axis in self._axes(axes) if axis != RANK)}

    def init(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """Returns zeros; the key is not used."""
        return {"gain": jnp.zeros(self.shapes(kernel.shape, axes)["gain"], dtype)}

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> AdaptedKernel:
        """Returns the kernel with factors of rank 0 and the gain."""
        gain = 1 + arrays["gain"].astype(widest(arrays["gain"].dtype, jnp.float32))
        a, b = (jnp.zeros(sizes(of(axes), kernel.shape, 0), gain.dtype) for of in (axes_of_a, axes_of_b))
        gain = lax.expand_dims(gain, [self._axes(axes).index(RANK)])
        role = "i" if self.inputs else "o"
        return AdaptedKernel(kernel, a, b, scale=1.0, roles=tuple(axes), paths=(path,), gain=gain, gain_role=role)

    def _axes(self, axes: str) -> tuple[int, ...]:
        """The axes of the factor whose axes the gain has."""
        return axes_of_a(axes) if self.inputs else axes_of_b(axes)
