"""Double quantization: the scales of a quantized kernel, themselves quantized to 8 bits (Dettmers et al. 2023).

The 8-bit values are the dynamic map of Dettmers et al. 2021 (arXiv:2110.02861): a sign, an exponent of base ten whose
length varies, and a linear fraction. QLoRA (arXiv:2305.14314) takes it for the scales, less their mean.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

BLOCK = 256  # scales that share one second-level scale
_EXPONENTS = 7


def dynamic_map() -> np.ndarray:
    """Returns the 256 values of the signed dynamic map, ascending, in float32, `(256,)`.

    For each power of ten 10⁻⁶ … 1 there are 1, 2, 4 … 64 values of each sign, the centers of equal parts of [0.1, 1].
    """
    values = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for exponent in range(_EXPONENTS):
        edges = _edges(2**exponent)
        centers = (edges[:-1] + edges[1:]) / 2 * np.float32(10.0 ** (exponent - _EXPONENTS + 1))
        values += [centers, -centers]
    return np.sort(np.concatenate(values).astype(np.float32))


def _edges(parts: int) -> np.ndarray:
    """Returns the edges of equal parts of [0.1, 1], rounded as in PyTorch: each half is counted from its end."""
    start, end = np.float32(0.1), np.float32(1)
    step, count = float((end - start) / np.float32(parts)), np.arange(parts + 1)
    return np.where(count < (parts + 1) // 2, start + step * count, end - step * count[::-1]).astype(np.float32)


MAP = dynamic_map()
_BOUNDS = (MAP[:-1] + MAP[1:]) / 2


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "largest", "offset"], meta_fields=["order"])
@dataclasses.dataclass(frozen=True, eq=False)
class DoubleScales:
    """Scales as 8-bit codes.

    Attributes:
      codes: `(batch…, …)`, uint8, the index of each scale in the dynamic map.
      largest: `(batch…, blocks)`, float32, the largest magnitude of each block of 256.
      offset: `(batch…)`, float32, the mean of the scales.
      order: the order in which the axes after `batch…` are flattened to blocks.
    """

    codes: Any
    largest: Any
    offset: Any
    order: tuple[int, ...]

    @classmethod
    def quantize(cls, scales: Array, order: tuple[int, ...]) -> DoubleScales:
        """Quantizes scales without batch axes."""
        offset = scales.mean()
        flat = (scales - offset).transpose(order).reshape(-1)
        blocks = jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
        largest = abs(blocks).max(1)
        scaled = blocks / jnp.where(largest == 0, 1, largest)[:, None]
        codes = jnp.searchsorted(jnp.asarray(_BOUNDS), scaled).astype(jnp.uint8).reshape(-1)[: flat.size]
        permuted = codes.reshape([scales.shape[axis] for axis in order])
        return cls(permuted.transpose(np.argsort(order)), largest, offset, order)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the scales."""
        return tuple(self.codes.shape)

    @property
    def sliceable(self) -> bool:
        """Whether slices of the arrays along their leading axes are the same slice of the scales."""
        return self.offset.ndim > 0

    def layout(self, axes: Any) -> DoubleScales:
        """Returns the kernel's axis of each axis of the arrays, given those of the scales."""
        batch: Any = axes[: len(self.offset.shape)]
        return dataclasses.replace(self, codes=axes, largest=(*batch, None), offset=batch)

    def dequantize(self) -> Array:
        """Returns the scales, float32."""
        batch = self.shape[: self.offset.ndim]
        rest = [self.shape[len(batch) + axis] for axis in self.order]
        blocks = jnp.repeat(self.largest, BLOCK, axis=-1)[..., : math.prod(rest)].reshape(*batch, *rest)
        axes = [*range(len(batch)), *(len(batch) + axis for axis in np.argsort(self.order))]
        offset = self.offset.reshape(*batch, *[1] * len(rest))
        return jnp.asarray(MAP)[self.codes] * blocks.transpose(axes) + offset

    def take(self, rows: Array) -> Array:
        """Returns `dequantize()[rows]`, float32, without dequantizing the other rows. `rows` has one axis."""
        rest = [self.shape[axis] for axis in self.order]
        strides = np.ones(len(rest), int)
        strides[list(self.order)] = [math.prod(rest[at + 1 :]) for at in range(len(rest))]
        within = sum(
            stride * jax.lax.broadcasted_iota(int, self.shape[1:], axis) for axis, stride in enumerate(strides[1:])
        )
        position = rows.reshape(-1, *[1] * (len(rest) - 1)) * strides[0] + within
        return jnp.asarray(MAP)[self.codes[rows]] * self.largest[position // BLOCK] + self.offset
