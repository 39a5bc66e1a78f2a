"""The layers of an adapter, one for each torch module or element of a stack, and norms of what they change.

Norms are computed in float64 from the factors, without materializing their product:

    ‖s·A·B‖² = s²·Σ (AᵀA) ⊙ (BBᵀ)        ⟨s·A·B, t·C·D⟩ = s·t·Σ (AᵀC) ⊙ (BDᵀ)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .._core.adapter import Adapter, Adapters
from .._core.axes import axes_with
from .._core.values import on_host
from .._core.variant import LowRank, Variant
from .._variants import Layers

Values = np.ndarray[Any, Any]

_NUMBER = re.compile(r"(?<![^./\[])\d+(?![^./\]])")  # a whole segment of a name, or an index
_NUMBERED = re.compile(r"_\d+(?![^./])")


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One torch module, or one element of a stack.

    Attributes:
      name: of the module, or the path with the index in the stack.
      variant: of the leaf.
      arrays: the arrays of the adapter, without batch axes.
    """

    name: str
    variant: Variant
    arrays: Mapping[str, Values]

    @property
    def has_factors(self) -> bool:
        """Whether the update is s·A·B."""
        return isinstance(self.variant, LowRank) and {"a", "b"} <= self.arrays.keys()

    @property
    def factors(self) -> tuple[Values, Values]:
        """A, (in, rank), and B, (rank, out), in float64, without the scale."""
        assert isinstance(self.variant, LowRank)
        a, b = (self.arrays[name].astype(np.float64) for name in "ab")
        diagonal: Any = self.variant.diagonal(dict[str, Any](self.arrays))
        a = a.reshape(-1, a.shape[-1])
        return a if diagonal is None else a * np.asarray(diagonal, np.float64), b.reshape(b.shape[0], -1)

    @property
    def shape(self) -> list[int] | None:
        """The number of inputs and outputs of the factors; None if there are none."""
        return (
            [math.prod(self.arrays["a"].shape[:-1]), math.prod(self.arrays["b"].shape[1:])]
            if self.has_factors
            else None
        )

    @property
    def scale(self) -> float | None:
        """s; None if the variant has none."""
        return getattr(self.variant, "scale", None)

    @property
    def others(self) -> dict[str, Values]:
        """The arrays that are not factors, as what they add or store, in float64."""
        rest = {name: array for name, array in self.arrays.items() if not self.has_factors or name not in _FACTORS}
        wide = {name: array.astype(np.float64) for name, array in rest.items()}
        return {name: array * (self.scale or 0.0) if name == "bias" else array for name, array in wide.items()}

    def norm(self) -> float | None:
        """Returns the norm of the update; None if it depends on the base."""
        if self.has_factors:
            return math.sqrt(max(_dot(self, self), 0.0))
        added = [array for name, array in self.others.items() if name in ("bias", "rows")]
        return float(np.linalg.norm(added[0])) if added else None


_FACTORS = ("a", "b", "e")  # e is the diagonal of AdaLoRA


def kind_of(name: str) -> str:
    """Returns the name of a layer with `*` for its numbers, which all layers of one kind have in common.

    >>> kind_of("model.layers.3.self_attn.q_proj"), kind_of("h/0/c_attn/kernel[2]"), kind_of("Block_3/Dense_1/kernel")
    ('model.layers.*.self_attn.q_proj', 'h/*/c_attn/kernel[*]', 'Block_*/Dense_1/kernel')
    """
    return _NUMBERED.sub("_*", _NUMBER.sub("*", name), count=1)


def layers_of(adapter: Adapters) -> dict[str, Layer]:
    """Returns the layers of an adapter by name."""
    return {layer.name: layer for path, part in adapter.items() for layer in _layers(path, part)}


def difference(one: Layer, other: Layer) -> float | None:
    """Returns the norm of the difference of two layers relative to the larger norm; the largest of all arrays.

    None if they cannot be compared, because their arrays are others or of other shapes.
    """
    first, second = one.others, other.others
    if one.shape != other.shape or first.keys() != second.keys():
        return None
    found = [0.0]
    if one.has_factors and not _are_same(one, other):
        squares = _dot(one, one), _dot(other, other)
        found.append(_relative(squares[0] + squares[1] - 2 * _dot(one, other), *squares))
    for name, array in first.items():
        if array.shape != second[name].shape:
            return None
        found.append(_relative(*(float(np.vdot(x, x)) for x in (array - second[name], array, second[name]))))
    return max(found)


def _layers(path: str, part: Adapter) -> Iterator[Layer]:
    arrays = {name: on_host(array) for name, array in part.arrays.items()}
    variant, batch = part.variant, len(axes_with(part.axes, "b"))
    sizes = next(iter(arrays.values())).shape[:batch] if batch else ()
    numbers: list[Sequence[int]] = [range(size) for size in sizes]  # of each element of the stack
    if isinstance(variant, Layers) and batch:
        numbers[0] = variant.layers
        variant = variant.variant
    for index in np.ndindex(sizes):
        own = {name: array[index] for name, array in arrays.items()}
        at = "".join(f"[{of_axis[place]}]" for of_axis, place in zip(numbers, index, strict=True))
        yield Layer(path + at, variant, own)


def _dot(one: Layer, other: Layer) -> float:
    """Returns the inner product of two updates."""
    assert one.scale is not None and other.scale is not None
    (a, b), (c, d) = one.factors, other.factors
    return one.scale * other.scale * float(np.sum((a.T @ c) * (b @ d.T)))


def _are_same(one: Layer, other: Layer) -> bool:
    return one.scale == other.scale and all(map(np.array_equal, one.factors, other.factors))


def _relative(square: float, *squares: float) -> float:
    most = max(squares)
    return math.sqrt(max(square, 0.0) / most) if most else 0.0
