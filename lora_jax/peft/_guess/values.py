"""Compares the values of leaves with those of torch tensors, as a row says that they correspond."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ..._core.base import dense
from ..._core.values import is_concrete, on_host
from .._layout import Layout, Values, outputs_to_torch
from .._names import to_torch
from .._row import Row
from .._sites import Site, compiled, find, sites

_EQUAL = 1e-4  # of 1 - cosine: the rounding of bfloat16 is less
_FACTOR = 1e-2
_MOST = 2**20  # values to compare of one tensor


class Compared(NamedTuple):
    """The row that fits the values, and the cosine of the values with it; None if nothing was compared."""

    row: Row
    cosine: float | None

    @property
    def equal(self) -> bool:
        """Whether the values are equal."""
        return self.cosine is not None and 1 - self.cosine < _EQUAL

    @property
    def nearness(self) -> float:
        """The cosine without its own rounding, to compare with that of other values; 0 if they are not equal."""
        return round(self.cosine, 9) if self.cosine is not None and self.equal else 0.0


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
        return Compared(row, float(np.min(cosines)) if cosines else None)  # NaN if one of them is

    def _with_parts(self, pattern: str, row: Row, path: str) -> Row:
        """Returns the row with the order of rotary positions and the factors that the values show."""
        plain = list(self._pairs(pattern, row, path, first=True))
        may_be_turned = plain and all(_may_be_permuted(one, other) for one, other, _ in plain)
        turned = self._heads(pattern, row, path) if may_be_turned else []
        for interleaved in (None, *turned):
            parts, pairs = row.parts, plain
            if interleaved is not None:
                parts = tuple(dataclasses.replace(part, interleaved=interleaved) for part in row.parts)
                pairs = list(self._pairs(pattern, dataclasses.replace(row, parts=parts), path, first=True))
            if len(pairs) == len(parts) and all(1 - cosine < _EQUAL for _, _, cosine in pairs):
                factors = [float(np.vdot(other, one) / np.vdot(other, other)) for one, other, _ in pairs]
                found = [
                    part if abs(factor - 1) < _FACTOR else dataclasses.replace(part, factor=factor)
                    for part, factor in zip(parts, factors, strict=True)
                ]
                return dataclasses.replace(row, parts=tuple(found))
        return row

    def _heads(self, pattern: str, row: Row, path: str) -> list[int]:
        """Returns the sizes of heads to try: that of the last axis of outputs, or all that divide the outputs."""
        places = self._sites(pattern, row, path)
        if row.kind != "linear" or not places:
            return []
        layout = places[0].layout
        width = min(site.last - site.first for site in places)
        sizes: Sequence[int] = [layout.shape[axis] for axis in layout.outputs]
        sizes = sizes[-1:] if len(sizes) > 1 else range(4, 513, 2)
        return [size for size in sizes if size > 2 and size % 2 == 0 and width % size == 0]

    def _pairs(self, pattern: str, row: Row, path: str, *, first: bool) -> Iterator[tuple[Values, Values, float]]:
        """Yields the values of a leaf as torch has them, those of torch, and their cosine."""
        leaf = self.leaves[path]
        if isinstance(leaf, jax.ShapeDtypeStruct) or not all(map(is_concrete, jax.tree.leaves(leaf))):
            return
        value, places = dense(leaf), self._sites(pattern, row, path)
        for site in places[: len(row.parts)] if first else places:
            if (tensor := self.tensors.get(f"{site.module}.{row.parameter}".removeprefix("."))) is None or _is_shape(
                tensor
            ):
                continue
            if site.part.of is not None:
                outputs = slice(site.part.of[0], site.part.of[0] + site.last - site.first)
                tensor = tensor[:, outputs] if row.conv1d and row.kind == "linear" else tensor[outputs]
            got, expected = _as_torch(site, value, tensor)
            if got.shape == expected.shape and (cosine := _cosine(got, expected)) is not None:
                yield got, expected, cosine

    def _sites(self, pattern: str, row: Row, path: str) -> list[Site]:
        found = find(path, compiled({pattern: row}))
        if found is None:
            return []
        numbers = {name: str(int(text)) if text.isdecimal() else text for name, text in found.segments.items()}
        places = sites(path, tuple(self.leaves[path].shape), found._replace(segments=numbers))  # torch's are not padded
        return [] if isinstance(places, str) else places


def _as_torch(site: Site, value: Any, tensor: Any) -> tuple[Values, Values]:
    """Returns the values of one torch module, from the leaf and from torch; of large ones, some of the inputs."""
    axes, row, index = site.layout.axes, site.row, iter(site.index)
    layer = value[tuple(next(index) if role == "b" else slice(None) for role in axes)]
    layout, every = Layout(row, axes.replace("b", ""), tuple(layer.shape)), 1
    if row.kind in ("linear", "embedding") and (every := -(-layer.size // _MOST)) > 1:
        axis, width = layout.inputs[0], layout.d_in
        layer = layer[tuple(slice(None, None, every if at == axis else None) for at in range(layer.ndim))]
        first, (rows, columns) = layout.shape[axis], tensor.shape
        if row.kind == "embedding" or row.conv1d:
            tensor = tensor.reshape(first, width // first, columns)[::every].reshape(-1, columns)
        else:
            tensor = tensor.reshape(rows, first, width // first)[:, ::every].reshape(rows, -1)
        layout = dataclasses.replace(layout, shape=tuple(layer.shape))
    matrix = layout.to_matrix("vector" if row.kind == "vector" else "kernel", on_host(layer))
    got = to_torch(f"saved.{row.parameter}", outputs_to_torch(matrix[..., site.outputs], site.part), layout)
    return np.asarray(got, np.float32), _on_host(tensor)


def _is_shape(tensor: Any) -> bool:
    return isinstance(tensor, list | tuple | jax.ShapeDtypeStruct)


def _on_host(tensor: Any) -> Values:
    """Returns the values of an array of torch, JAX or NumPy."""
    detach = getattr(tensor, "detach", None)  # torch's
    return np.asarray(tensor if detach is None else detach().float().cpu().numpy(), np.float32)


def _may_be_permuted(one: Values, other: Values) -> bool:
    """Whether two matrices may have the same rows up to a factor, by the norms of these."""
    norms = [np.sort(np.linalg.norm(matrix.reshape(len(matrix), -1), axis=1)) for matrix in (one, other)]
    first, second = (norm / max(norm.sum(), 1e-30) for norm in norms)
    return np.allclose(first, second, rtol=_FACTOR, atol=0)


def _cosine(one: Values, other: Values) -> float | None:
    """Returns the cosine; None if the values are constant, and show nothing."""
    if one.size < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    one, other = one.astype(np.float64), other.astype(np.float64)  # in which equal values have a cosine of 1
    return float(np.vdot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other)))
