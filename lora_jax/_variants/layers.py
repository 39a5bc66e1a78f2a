"""Layers: some layers of a stack are adapted, such as the upper half of a scanned model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from .._core.adapter import Adapter
from .._core.base import Base, Recorded, apply_change, as_array, base_of
from .._core.kernel import AdaptedKernel
from .._core.numbers import integers
from .._core.placement import explicit_sharding, like_kernel
from .._core.stored import Change, StoredLeaf
from .._core.values import on_host
from .._core.variant import Variant, Wrapper
from .._errors import SpecError


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Layers(Wrapper):
    """Another variant for some layers of a stack, as of a model that scans its layers (PEFT's `layers_to_transform`).

    The other layers have no parameters, and their kernels are exactly those of the base. A loop over the stack is one
    program for all layers, so it multiplies them with factors of zero: the FLOPs are those of adapting all layers.

    >>> from lora_jax import LoRA
    >>> Layers(layers=range(2, 4), variant=LoRA(rank=8, alpha=16))
    Layers(variant=LoRA(rank=8, alpha=16), layers=(2, 3))

    Attributes:
      variant: the variant of these layers; its `axes` hold for the stack.
      layers: the numbers of the layers along the first batch axis, or the leading axis for a variant without roles of
        axes, such as `Full`. Without duplicates.
      axes: as in `LoRA`.
    """

    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.variant, Variant) or isinstance(self.variant, Wrapper):
            raise SpecError(f"Expected a variant such as {Variant.example} for `variant`; got {self.variant!r}.")
        layers = integers("layers", self.layers)
        if len(set(layers)) < len(layers):
            raise SpecError(f"Expected no duplicates in `layers`; got layers={layers}.")
        self._set(layers=tuple(sorted(layers)), axes=self.axes or self.variant.axes)

    @property
    def title(self) -> str:
        """The title of the variant, and the layers as ranges."""
        starts = [layer for layer in self.layers if layer - 1 not in self.layers]
        ends = [layer for layer in self.layers if layer + 1 not in self.layers]
        ranges = (f"{start}" if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))
        return f"{self.variant.title}, layers {','.join(ranges)}"

    @property
    def needs_all(self) -> str:  # type: ignore[override]
        """All layers, to number them, and as in the variant."""
        return f"b{self.variant.needs_all}"

    @property
    def rank(self) -> int | None:
        """The rank of the variant, if it has one."""
        return getattr(self.variant, "rank", None)

    @property
    def scale(self) -> float | None:
        """The scale of the variant, if it has one."""
        return getattr(self.variant, "scale", None)

    def check(self, shape: Sequence[int], axes: str) -> None:
        """Raises if there is no axis of layers, if it has too few, or where the variant raises."""
        if self.needs_axes and "b" not in axes:
            raise SpecError(f"Layers needs a batch axis, the axis of the layers; the axes are {axes!r}")
        self.check_numbers(shape, axes)
        self.variant.check(self.shape_of_layers(shape, axes), axes)

    def check_numbers(self, shape: Sequence[int], axes: str) -> None:
        """Raises unless the leaf has these layers, and what the variant names."""
        if not shape or max(self.layers) >= shape[_axis(axes)]:
            raise SpecError(f"expected layers of a leaf of shape {tuple(shape)}, axis {_axis(axes)}; got {self}")
        self.variant.check_numbers(self.shape_of_layers(shape, axes), axes)

    def fitted(self, shape: Sequence[int], axes: str) -> Self:
        """Applies that of the variant."""
        fitted = self.variant.fitted(self.shape_of_layers(shape, axes), axes)
        return dataclasses.replace(self, variant=fitted, axes=None)

    def shapes(self, shape: Sequence[int], axes: str) -> dict[str, tuple[int, ...]]:
        """Those of the variant, for these layers only."""
        return self.variant.shapes(self.shape_of_layers(shape, axes), axes)

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """As in the variant."""
        return self.variant.layout(axes)

    def init(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """Returns the arrays of the variant for these layers."""
        if isinstance(kernel, jax.ShapeDtypeStruct):
            part: Any = jax.ShapeDtypeStruct(self.shape_of_layers(kernel.shape, axes), kernel.dtype)
        else:
            base = base_of(kernel if isinstance(kernel, StoredLeaf) else jnp.asarray(kernel))
            part = as_array(self._part(base, axes))
        return self.variant.init(key, part, axes, dtype)

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> AdaptedKernel | Array:
        """Returns what the variant returns for these layers, and for the others factors of 0 and gains of 1."""
        at = _axis(axes)
        adapted = self.variant.apply(self._part(kernel, axes), arrays, axes, path)
        # The position of each layer among those that are adapted; for the others a position out of range.
        where = [self.layers.index(x) if x in self.layers else len(self.layers) for x in range(kernel.shape[at])]
        if not isinstance(adapted, AdaptedKernel):
            shape = [size if axis == at else 1 for axis, size in enumerate(kernel.shape)]
            is_adapted = (jnp.array(where) < len(self.layers)).reshape(shape)
            return jnp.where(is_adapted, _take(adapted, where, at, 0), as_array(kernel))
        whole: dict[str, Any] = {}
        for name, (array, layout) in adapted.factors.items():
            factor_axes = layout(axes)
            factor = _take(array, where, factor_axes.index(at), name == "gain")
            whole[name] = like_kernel(factor, factor_axes, kernel)
        return dataclasses.replace(adapted, w=kernel, **whole)

    def shape_of_layers(self, shape: Sequence[int], axes: str) -> tuple[int, ...]:
        """Returns the shape of these layers of a kernel of shape `shape`."""
        return tuple(len(self.layers) if axis == _axis(axes) else size for axis, size in enumerate(shape))

    def _part(self, kernel: Base, axes: str) -> Base:
        """Returns these layers of a kernel."""
        part = kernel.take(jnp.array(self.layers)) if isinstance(kernel, Recorded) and _axis(axes) == 0 else None
        return apply_change(kernel, Change(_take, (self.layers, _axis(axes), 0))) if part is None else part


def without_layers(variant: Variant) -> Variant:
    """Returns the variant of the layers, of `Layers`; of others, the variant itself."""
    return variant.variant if isinstance(variant, Layers) else variant


def in_stack(part: Adapter, shape: Sequence[int]) -> Adapter:
    """Returns the arrays of `Layers` as those of a stack of the shape, with zeros for the other layers."""
    assert isinstance(part.variant, Layers)
    variant, arrays = part.variant.variant, {}
    layout = variant.layout(part.axes)
    for name, own in variant.shapes(shape, part.axes).items():
        array = on_host(part.arrays[name])
        arrays[name] = np.zeros(own, array.dtype)
        at: Any = (*[slice(None)] * layout[name].index(_axis(part.axes)), list(part.variant.layers))
        arrays[name][at] = array
    return Adapter(variant, part.axes, **arrays)


def _axis(axes: str) -> int:
    """The axis of the layers."""
    return axes.index("b") if axes else 0


def _take(array: Array, where: Sequence[int], axis: int, fill: float) -> Array:
    """Returns the elements of an array along an axis, and `fill` for those out of range."""
    sharding = explicit_sharding(jax.typeof(array))
    if sharding is not None:
        names = [None if at == axis else name for at, name in enumerate(sharding.spec)]
        sharding = sharding.update(spec=PartitionSpec(*names))
    index = (*[slice(None)] * axis, jnp.array(where))
    return array.at[index].get(mode="fill", fill_value=fill, out_sharding=sharding)
