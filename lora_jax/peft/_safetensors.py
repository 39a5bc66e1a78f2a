"""The safetensors format: the size of a header, the header in JSON, and the values of all tensors without gaps.

An untrusted file is read one tensor at a time, after its whole header is checked: nothing is allocated that the file
does not have the bytes for. It is not mapped into memory, where a file that becomes shorter would end the process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from .._errors import AdapterError, listed
from ._json import MAX_BYTES, invalid, parse, shown
from ._layout import Values

FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_NAME = 1_000
_MAX_AXES = 32  # of NumPy 1
_METADATA = "__metadata__"


class _Entry(NamedTuple):
    """What the header states of one tensor; its values are bytes `first` to `last - 1` after the header."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    first: int
    last: int


def write(file: BinaryIO, tensors: Mapping[str, Values], metadata: Mapping[str, str]) -> None:
    """Writes tensors, one at a time.

    Raises:
      UnicodeEncodeError: if a name has no UTF-8.
    """
    # As the library does, wide dtypes first: all values are aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    file.write(header([(name, _NAMES[x.dtype], x.shape, x.nbytes) for name, x in ordered], metadata))
    for _, array in ordered:
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def header(tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """Returns what precedes the values: of each tensor, in their order, the name, dtype, shape and size in bytes."""
    fields: dict[str, Any] = {_METADATA: {"format": "pt", **metadata}}  # transformers requires a format
    first = 0
    for name, dtype, shape, size in tensors:
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [first, first + size]}
        first += size
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def check_dtypes(tensors: Mapping[str, Values]) -> None:
    """Raises `AdapterError` unless `read` reads the dtypes of all tensors."""
    if other := [f"{name!r} in {array.dtype}" for name, array in tensors.items() if array.dtype not in _NAMES]:
        raise AdapterError(
            f"Expected arrays in {', '.join(map(str, _NAMES))} to export; got tensors in other dtypes:\n"
            f"{listed(other)}\n  Convert them first; nothing was written."
        )


def read(file: BufferedReader, size: int, path: Path, most: int | None) -> dict[str, Values]:
    """Reads all tensors.

    Args:
      file: open for reading, at its start.
      size: of the file.
      path: of the file, for errors.
      most: the largest number of bytes of all values; None for any.

    Raises:
      CheckpointError: if the file is not valid safetensors with values in floating point, or one is not finite.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise invalid(path, f"its header states {length} bytes, and the file has {size}")
    if length > MAX_BYTES:
        raise invalid(path, f"its header has {length:,} bytes; at most {MAX_BYTES:,} are read")
    content = file.read(length)
    if not content.startswith(b"{"):
        raise invalid(path, f"its header begins with {content[:8]!r} in place of a JSON object")
    entries = _entries(parse(content, path), size - 8 - length, path)
    if most is not None and size - 8 - length > most:
        have = f"{size - 8 - length:,} bytes of values"
        raise invalid(path, f"it has {have}, and an adapter of these parameters has at most {most:,}")
    tensors = {}
    for name, entry in entries.items():
        values = np.empty(entry.last - entry.first, np.uint8)
        if file.readinto(values.data) != values.size:
            raise invalid(path, "it ended early: it changed while it was read")
        tensors[name] = values.view(entry.dtype).reshape(entry.shape)
    if bad := [f"{name!r}" for name, array in tensors.items() if not _is_finite(array)]:
        raise invalid(path, f"tensors have values that are not finite:\n{listed(bad)}")
    return tensors


def _entries(header: dict[str, Any], size: int, path: Path) -> dict[str, _Entry]:
    """Returns what a header states, in the order of the values; checks that they are `size` bytes without gaps."""
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise invalid(path, f"its {_METADATA} is not a mapping to strings")
    if not header:
        raise invalid(path, "it has no tensors")
    found = [(name, _problem(name, fields)) for name, fields in header.items()]
    if problems := [f"{shown(name)} {problem}" for name, problem in found if problem is not None]:
        raise invalid(path, f"its header is wrong:\n{listed(problems)}")
    entries = {
        name: _Entry(FLOATS[fields["dtype"]], tuple(fields["shape"]), *fields["data_offsets"])
        for name, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }
    end = 0
    for name, entry in entries.items():
        if entry.first != end:
            raise invalid(path, f"the values of {name!r} start at offset {entry.first}; expected {end}")
        end = entry.last
    if end != size:
        raise invalid(path, f"its tensors have {end} bytes, and the file has {size} after its header")
    return entries


def _problem(name: str, fields: Any) -> str | None:
    """Returns what is wrong with the entry of one tensor, by itself."""
    if len(name) > _MAX_NAME:
        return f"is a name of {len(name)} characters; at most {_MAX_NAME} are read"
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        return f"has {shown(fields)}; expected {', '.join(sorted(_FIELDS))}"
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in FLOATS:
        return f"has dtype {shown(dtype)}; {', '.join(FLOATS)} are read"
    if not _are_sizes(shape) or len(shape) > _MAX_AXES:
        return f"has shape {shown(shape)}; expected at most {_MAX_AXES} sizes of at least 0"
    if not _are_sizes(offsets) or len(offsets) != 2:
        return f"has offsets {shown(offsets)}; expected two of at least 0"
    if (needed := math.prod(shape) * FLOATS[dtype].itemsize) != offsets[1] - offsets[0]:
        return f"has shape {shown(shape)} in {dtype}, which needs {shown(needed)} bytes, and offsets {shown(offsets)}"
    return None


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _is_finite(array: Values) -> bool:
    if array.dtype == np.float64:  # JAX reads them as float32
        return bool((np.abs(array) <= np.finfo(np.float32).max).all())
    return bool(np.isfinite(array).all())
