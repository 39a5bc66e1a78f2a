"""Compares the values of leaves with those of torch tensors, as a row says that they correspond."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ..._core.base import dense
from ..._core.values import is_concrete, on_host
from .._layout import Values
from .._module import module_value
from .._names import to_torch
from .._rows import Part, Row
from .._sites import Site, compiled, find, sites

_EQUAL = 1e-4  # of 1 - cosine: the rounding of bfloat16 is less
_FACTOR = 1e-2


class Compared(NamedTuple):
    """The row that fits the values, and the cosine of the values with it; None if nothing was compared."""

    row: Row
    cosine: float | None

    @property
    def equal(self) -> bool:
        """Whether the values are equal."""
        return self.cosine is not None and 1 - self.cosine < _EQUAL


class Both:
    """The values of both frameworks, by name."""

    def __init__(self, leaves: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        self.leaves, self.tensors = leaves, tensors

    def compare(self, pattern: str, row: Row, paths: list[str], *, all_of_them: bool) -> Compared:
        """Compares leaves with the tensors that a row says they are: the first, or all; may state more in the row."""
        row = self._with_parts(pattern, row, paths[0])
        cosines = []
        for path in paths if all_of_them else paths[:1]:
            cosines += [cosine for _, _, cosine in self._pairs(pattern, row, path, first=not all_of_them)]
        return Compared(row, min(cosines, default=None))

    def _with_parts(self, pattern: str, row: Row, path: str) -> Row:
        """Returns the row with the order of rotary positions and the factors that the values show."""
        for interleaved in (None, *self._heads(pattern, row, path)):
            parts = tuple(dataclasses.replace(part, interleaved=interleaved) for part in row.parts)
            changed, found = dataclasses.replace(row, parts=parts), list[Part]()
            for part, (got, expected, cosine) in zip(
                parts, self._pairs(pattern, changed, path, first=True), strict=False
            ):
                if 1 - cosine < _EQUAL:
                    factor = float(np.vdot(expected, got) / np.vdot(expected, expected))
                    found.append(part if abs(factor - 1) < _FACTOR else dataclasses.replace(part, factor=factor))
            if len(found) == len(parts):
                return dataclasses.replace(row, parts=tuple(found))
        return row

    def _heads(self, pattern: str, row: Row, path: str) -> list[int]:
        """Returns the sizes of heads to try: that of the last axis of outputs, or all that divide the outputs."""
        places = self._sites(pattern, row, path)
        if row.kind == "embedding" or not places:
            return []
        layout = places[0].layout
        width = min(site.last - site.first for site in places)
        sizes = [layout.shape[axis] for axis in layout.outputs]
        return [size for size in (sizes[-1:] if len(sizes) > 1 else range(4, 513, 2)) if size > 2 and width % size == 0]

    def _pairs(self, pattern: str, row: Row, path: str, *, first: bool) -> Iterator[tuple[Values, Values, float]]:
        """Yields the values of a leaf as torch has them, those of torch, and their cosine."""
        leaf = self.leaves[path]
        if isinstance(leaf, jax.ShapeDtypeStruct) or not all(map(is_concrete, jax.tree.leaves(leaf))):
            return
        value = on_host(dense(leaf))
        places = self._sites(pattern, row, path)
        for site in places[: len(row.parts)] if first else places:
            if (tensor := _array(self.tensors.get(f"{site.module}.{row.parameter}"))) is None:
                continue
            got = _as_float(to_torch(f"saved.{row.parameter}", module_value(site, value), site.layout))
            expected = _as_float(tensor)
            if site.part.of is not None:
                axis = -1 if row.conv1d else 0
                expected = np.take(expected, range(site.part.of[0], site.part.of[0] + site.last - site.first), axis)
            if got.shape == expected.shape and (cosine := _cosine(got, expected)) is not None:
                yield got, expected, cosine

    def _sites(self, pattern: str, row: Row, path: str) -> list[Site]:
        found = find(path, compiled({pattern: row}))
        places = "" if found is None else sites(path, tuple(self.leaves[path].shape), found)
        return [] if isinstance(places, str) else places


def _array(tensor: Any) -> Values | None:
    """Returns the values of a tensor of torch, JAX or NumPy; None for a shape."""
    if tensor is None or isinstance(tensor, list | tuple | jax.ShapeDtypeStruct):
        return None
    detach = getattr(tensor, "detach", None)  # torch's
    return np.asarray(tensor if detach is None else detach().float().cpu().numpy())


def _as_float(array: Values) -> Values:
    return np.asarray(array, np.float32)


def _cosine(one: Values, other: Values) -> float | None:
    """Returns the cosine; None if the values are constant, and show nothing."""
    if one.size < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.vdot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other)))
