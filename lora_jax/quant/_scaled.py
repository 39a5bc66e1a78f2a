"""Kernels as codes times scales: 8 bits per channel, and the arrays of Qwix."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._core.axes import axes_with
from .._errors import SpecError
from ._format import Format
from ._leaf import QuantizedLeaf
from ._nf4 import codebook_values


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "scales", "zero_point"], meta_fields=["dtype", "codebook"]
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ScaledLeaf(QuantizedLeaf):
    """A kernel `(codes - zero_point)·scales`.

    Attributes:
      codes: of the shape of the kernel, in few bits.
      scales: float, with as many axes as the kernel. An element belongs to a tile: the sizes divide the kernel's.
      zero_point: like `scales`, or None for zero.
      dtype: the dtype of the represented kernel.
      codebook: whether the codes are those of NF4, and not numbers.
    """

    codes: Array
    scales: Array
    zero_point: Array | None
    dtype: Any
    codebook: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        return tuple(self.codes.shape)

    @property
    def sliceable(self) -> bool:
        """Whether each slice has scales and zero points of its own."""
        return bool(self.shape) and {array.shape[0] for array in jax.tree.leaves(self)} == {self.codes.shape[0]}

    @property
    def format(self) -> Format | None:
        """`Int8` or `Float8` if there is one scale for each output; otherwise None."""
        if self.codebook or self.zero_point is not None:
            return None
        sizes = tuple(zip(self.shape, self.scales.shape, strict=True))
        axes = "".join("i" if count == 1 else "o" for _, count in sizes)
        formats = {format_.code_dtype: format_ for format_ in (Int8, Float8)}
        made = formats.get(self.codes.dtype.type)
        per_channel = all(count in (1, size) for size, count in sizes)
        return made(axes=axes) if made and per_channel else None

    def layout(self) -> ScaledLeaf:
        """Returns the kernel's axis of each axis of the arrays: the same; None if a scale is for all of the axis."""

        def axes(array: Any) -> tuple[int | None, ...]:
            sizes = enumerate(zip(array.shape, self.shape, strict=True))
            return tuple(None if count == 1 < size else axis for axis, (count, size) in sizes)

        return jax.tree.map(axes, self)

    def decode(self) -> Array:
        """Returns the kernel."""
        wide = self.scales.dtype if self.scales.dtype == jnp.float64 else jnp.float32
        # Qwix multiplies the values of NF4 in the dtype of the kernel. Rounded as constants, no compiler undoes it.
        values = codebook_values(self.codes.astype(jnp.uint8), self.dtype) if self.codebook else self.codes.astype(wide)
        if self.zero_point is not None:
            values = values - self._spread(self.zero_point.astype(wide))
        return (values * self._spread(self.scales.astype(wide))).astype(self.dtype)

    def plus(self, change: Array) -> ScaledLeaf | None:
        """Subtracts the change from the zero points; None if a tile of it has more than one scale."""
        if any(count % scales for count, scales in zip(change.shape, self.scales.shape, strict=True)):
            return None
        zero_point = jnp.zeros((1,) * self.ndim) if self.zero_point is None else self.zero_point
        tiles = tuple(map(math.lcm, change.shape, zero_point.shape))
        scales = jnp.where(self.scales == 0, 1, self.scales)  # the codes of zeros are 0 for any scale
        change, old, divisor = (_spread(x.astype(change.dtype), tiles) for x in (change, zero_point, scales))
        return dataclasses.replace(self, scales=scales, zero_point=old - change / divisor)

    def _spread(self, tiles: Array) -> Array:
        """Repeats each element over its tile."""
        return _spread(tiles, self.shape)


def _spread(tiles: Array, shape: Sequence[int]) -> Array:
    """Repeats each element over its part of a shape; an axis of size 1 is left to broadcasting."""
    for axis, (size, count) in enumerate(zip(shape, tiles.shape, strict=True)):
        if count not in (1, size):
            tiles = jnp.repeat(tiles, size // count, axis=axis)
    return tiles


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class _PerChannel(Format):
    """One scale for each output: the largest magnitude of its inputs over the largest code."""

    code_dtype: ClassVar[Any]
    largest: ClassVar[float]

    def check(self, shape: Sequence[int], axes: str) -> None:
        """Raises if there is no input axis or no output axis."""
        if not {"i", "o"} <= set(axes):
            raise SpecError(f"{type(self).__name__} needs input and output axes; the axes are {axes!r}")

    def quantize(self, w: Array, axes: str) -> ScaledLeaf:
        """Quantizes a kernel without batch axes."""
        inputs = axes_with(axes, "i")
        wide = w.astype(jnp.promote_types(w.dtype, jnp.float32))
        scales = (abs(wide).max(inputs, keepdims=True) / self.largest).astype(jnp.float32)
        scales = jnp.where(scales < jnp.inf, scales, jnp.nan)  # so that a channel that is not finite is not hidden
        scaled = wide.astype(jnp.float32) / jnp.where(scales == 0, 1, scales)
        return ScaledLeaf(self._round(scaled).astype(self.code_dtype), scales, None, jnp.dtype(w.dtype))

    def _round(self, scaled: Array) -> Array:
        return jnp.clip(scaled, -self.largest, self.largest)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Int8(_PerChannel):
    """8-bit integers from -127 to 127, with one float32 scale for each output: |w|max/127.

    Attributes:
      axes: as for every format.
    """

    code_dtype: ClassVar[Any] = jnp.int8
    largest: ClassVar[float] = 127

    def _round(self, scaled: Array) -> Array:
        return lax.round(super()._round(scaled), lax.RoundingMethod.TO_NEAREST_EVEN)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Float8(_PerChannel):
    """8-bit floats, e4m3 (Micikevicius et al. 2022, arXiv:2209.05433), with a scale for each output: |w|max/448.

    Attributes:
      axes: as for every format.
    """

    code_dtype: ClassVar[Any] = jnp.float8_e4m3fn
    largest: ClassVar[float] = 448
