"""Writes the safetensors format: the header first, from shapes and dtypes, and then the tensors as they come."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .._errors import AdapterError, listed
from ._layout import Values
from ._safetensors import DTYPES, FLOATS, METADATA, NAMES


class Entry(NamedTuple):
    """A tensor to write: its name, the name of its dtype in the format, its shape and its size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


def entry(name: str, dtype: str, shape: Sequence[int]) -> Entry:
    """Returns the entry of a tensor whose dtype has values that can be read."""
    return Entry(name, dtype, tuple(shape), math.prod(shape) * DTYPES[dtype].itemsize)


def bytes_of(array: Any) -> memoryview:
    """Returns the bytes of an array, in the order of its elements."""
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def write(
    file: BinaryIO,
    entries: Sequence[Entry],
    contents: Iterator[Iterable[Any]],
    metadata: Mapping[str, str],
) -> Iterator[Entry]:
    """Writes tensors, and yields each when it is complete.

    Args:
      file: open for writing, at its start.
      entries: the tensors, in the order of their contents.
      contents: for each tensor its bytes, in pieces; of these only as many are taken.
      metadata: in addition to the format, which transformers requires.

    Raises:
      UnicodeEncodeError: if a name has no UTF-8.
    """
    ordered = sorted(entries, key=lambda one: -_alignment(one))  # torch needs offsets that are multiples of the size
    file.write(_header(ordered, metadata))
    starts = itertools.accumulate((one.size for one in ordered), initial=file.tell())
    offsets = {one.name: start for one, start in zip(ordered, starts, strict=False)}
    for one in entries:
        file.seek(offsets[one.name])
        for piece in next(contents):
            file.write(piece)
        assert file.tell() == offsets[one.name] + one.size, one
        yield one


def write_arrays(file: BinaryIO, arrays: Mapping[str, Values], metadata: Mapping[str, str]) -> None:
    """Writes arrays in floating point, one at a time; raises as `write`."""
    ordered = sorted(arrays.items())
    entries = [entry(name, NAMES[array.dtype], array.shape) for name, array in ordered]
    for _ in write(file, entries, ([bytes_of(array)] for _, array in ordered), metadata):
        pass


def check_dtypes(arrays: Mapping[str, Values]) -> None:
    """Raises `AdapterError` unless the dtypes of all arrays can be read as those of an adapter."""
    known = FLOATS.values()
    if other := [f"{name!r} in {array.dtype}" for name, array in arrays.items() if array.dtype not in known]:
        raise AdapterError(
            f"Expected arrays in {', '.join(map(str, known))} to export; got tensors in other dtypes:\n"
            f"{listed(other)}\n  Convert them first; nothing was written."
        )


def _header(ordered: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    fields: dict[str, Any] = {METADATA: {"format": "pt", **metadata}}
    first = 0
    for one in ordered:
        fields[one.name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [first, first + one.size]}
        first += one.size
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _alignment(one: Entry) -> int:
    """Returns the size of an element in bytes, from that of the tensor."""
    return one.size // (math.prod(one.shape) or 1)
