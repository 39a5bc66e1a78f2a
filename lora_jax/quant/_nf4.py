"""NF4: the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .._core.numbers import flag, integer
from .._errors import SpecError
from ._double import DoubleScales
from ._format import Format
from ._leaf import QuantizedLeaf

# Appendix E of the paper: quantiles of the normal distribution, scaled to [-1, 1], zero among them.
CODEBOOK = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
_BOUNDS = (CODEBOOK[:-1] + CODEBOOK[1:]) / 2


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["axis", "inputs", "dtype"]
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NF4Leaf(QuantizedLeaf):
    """A kernel in NF4. The arrays keep the order of the kernel's axes, so that they are sliced and sharded as it is.

    Attributes:
      codes: `(…, n/2, …)`, uint8: two neighbors along the input axis of size n in a byte, the first in the high bits.
      scales: `(…, n/block, …)`: the largest magnitude of each block, float32 or quantized again.
      axis: the axis of the blocks in `codes` and `scales`, negative.
      inputs: the kernel's axes that are flattened to the axis of the blocks; empty if it is one axis. In a shard, the
        first is smaller.
      dtype: the dtype of the represented kernel.
    """

    codes: Array
    scales: Array | DoubleScales
    axis: int
    inputs: tuple[int, ...]
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        before, (half, *after) = self.codes.shape[: self._at], self.codes.shape[self._at :]
        rest = self.inputs[1:]
        return (*before, 2 * half // max(math.prod(rest), 1), *rest, *after)

    @property
    def _at(self) -> int:
        return len(self.codes.shape) + self.axis

    @property
    def sliceable(self) -> bool:
        """Whether the leading axis is before that of the blocks, and the scales are not one sequence of blocks."""
        return self._at > 0 and (not isinstance(self.scales, DoubleScales) or self.scales.sliceable)

    def take(self, rows: Array) -> NF4Leaf | None:
        """Returns the named rows; None if the leading axis is that of the blocks."""
        if self.sliceable:
            return jax.tree.map(lambda x: x[rows], self)
        if self._at == 0:
            return None
        assert isinstance(self.scales, DoubleScales)
        return dataclasses.replace(self, codes=self.codes[rows], scales=self.scales.take(rows))

    def with_single_scales(self) -> NF4Leaf:
        """Returns the leaf with scales in float32."""
        scales = self.scales
        return dataclasses.replace(self, scales=scales.dequantize()) if isinstance(scales, DoubleScales) else self

    @property
    def format(self) -> NF4:
        """NF4 with the block size, and with the axes that were quantized separately and along which the blocks run."""
        double = isinstance(self.scales, DoubleScales)
        batch = self.scales.offset.ndim if isinstance(self.scales, DoubleScales) else 0
        inputs = range(self._at, self._at + max(len(self.inputs), 1))
        roles = ("b" if axis < batch else "i" if axis in inputs else "o" for axis in range(self.ndim))
        block = 2 * self.codes.shape[self.axis] // max(self.scales.shape[self.axis], 1)
        return NF4(block=block, double=double, axes="".join(roles))

    def layout(self) -> NF4Leaf:
        """Returns the kernel's axis of each axis of the arrays."""
        more = max(len(self.inputs) - 1, 0)
        axes: Any = tuple(axis + (more if axis > self._at else 0) for axis in range(len(self.codes.shape)))
        scales = self.scales.layout(axes) if isinstance(self.scales, DoubleScales) else axes
        return dataclasses.replace(self, codes=axes, scales=scales)

    def decode(self) -> Array:
        """Returns the kernel."""
        at = self._at
        scales = self.scales.dequantize() if isinstance(self.scales, DoubleScales) else self.scales
        blocks = scales.shape[at]
        codes = jnp.stack([self.codes >> 4, self.codes & 15], axis=at + 1)
        codes = codes.reshape(*codes.shape[:at], blocks, 2 * codes.shape[at] // max(blocks, 1), *codes.shape[at + 2 :])
        w = codebook_values(codes) * jnp.expand_dims(scales, at + 1)
        return w.astype(self.dtype).reshape(self.shape)


def codebook_values(codes: Array, dtype: Any = jnp.float32) -> Array:
    """Returns the value of each code by a tree of selects, which vector units have; a table they read one by one.

    The values are rounded to `dtype`; the array has at least 32 bits.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    values: list[Any] = [jnp.asarray(value, wide) for value in CODEBOOK.astype(dtype)]
    for bit in range(4):
        is_set = (codes & (1 << bit)) != 0
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class NF4(Format):
    """4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314), code for code that of bitsandbytes.

    A block of inputs of one output has a scale, its largest magnitude. Each element is the nearest of 16 values, the
    quantiles of a normal distribution, times that scale. With `double`, scales are stored in 8 bits: 4.127 bits per
    weight instead of 4.5, at a block of 64.

    Attributes:
      block: inputs that share a scale; even.
      double: whether the scales are quantized, in blocks of 256.
      axes: as for every format.
    """

    block: int = 64
    double: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        block = integer("block", self.block, least=2)
        if block % 2:
            raise SpecError(f"Expected an even `block`, because two codes share a byte; got {block}.")
        self._set(block=block, double=flag("double", self.double))

    def check(self, shape: Sequence[int], axes: str) -> None:
        """Raises if there is no input axis, or if blocks do not divide it."""
        self.block_axes(shape, axes)

    def block_axes(self, shape: Sequence[int], axes: str) -> tuple[int, int]:
        """Returns the range of axes along which the blocks run: the last input axis, or the inputs before it too."""
        if "i" not in axes:
            raise SpecError(f"NF4 needs an input axis; the axes are {axes!r}")
        end = axes.rindex("i") + 1
        start = end - 1
        while shape[start] and math.prod(shape[start:end]) % self.block and start and axes[start - 1] == "i":
            start -= 1
        if (inputs := math.prod(shape[start:end])) % self.block:
            raise SpecError(f"expected its inputs to be a multiple of block={self.block}; there are {inputs}")
        return start, end

    def quantize(self, w: Array, axes: str) -> NF4Leaf:
        """Quantizes a kernel without batch axes."""
        start, end = self.block_axes(w.shape, axes)
        before, inputs, after = w.shape[:start], w.shape[start:end], w.shape[end:]
        blocks = w.astype(jnp.float32).reshape(*before, -1, self.block, *after)
        scales = abs(blocks).max(start + 1)
        scales = jnp.where(scales < jnp.inf, scales, jnp.nan)  # so that a block that is not finite is not hidden
        scaled = blocks / jnp.expand_dims(jnp.where(scales == 0, 1, scales), start + 1)
        codes = sum((scaled > bound).astype(jnp.uint8) for bound in _BOUNDS)
        pairs = jnp.asarray(codes).reshape(*before, -1, 2, *after)
        high, low = (jnp.take(pairs, at, axis=start + 1) for at in (0, 1))
        # Blocks of scales run along the inputs first, as they do in PyTorch's (out, in).
        order = (*(axis for axis in range(scales.ndim) if axis != start), start)
        return NF4Leaf(
            codes=high << 4 | low,
            scales=DoubleScales.quantize(scales, order) if self.double else scales,
            axis=start - scales.ndim,
            inputs=tuple(inputs) if len(inputs) > 1 else (),
            dtype=jnp.dtype(w.dtype),
        )
