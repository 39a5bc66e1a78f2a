"""The safetensors format: the size of a header, the header in JSON, and the values of all tensors without gaps.

Files are untrusted, and are read one tensor at a time, after the whole header is checked: nothing is allocated that
the file does not have the bytes for. None is mapped into memory, where a file that becomes shorter would end the
process.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .._errors import listed
from ._layout import Values
from ._untrusted import MAX_BYTES, invalid, opened, parse, shown

FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
# The dtypes whose values can be read. Tensors of others can be copied.
DTYPES: dict[str, np.dtype[Any]] = {
    **FLOATS,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}
_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "U32": 32, "U64": 64, "C64": 64}
_BITS |= dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8)
_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_NAME = 1_000
_MAX_AXES = 32  # of NumPy 1
METADATA = "__metadata__"
_PIECE = 2**22  # bytes that are read at once


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
      name: in the file.
      file: the safetensors file.
      dtype: its name in the format, such as `"BF16"`.
      shape: of the tensor.
      start: the offset of its first byte in the file.
      size: in bytes.
      time: when the file was last modified, in nanoseconds.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int
    time: int

    def read(self) -> Values:
        """Reads the values; no other tensor of the file comes into memory.

        Raises:
          CheckpointError: if the file is shorter than its header states, or is another one by now.
        """
        with self._opened() as file:
            return self.read_from(file)

    def read_from(self, file: BufferedReader) -> Values:
        """Reads the values from the file, open at their start."""
        values = np.empty(self.size, np.uint8)
        if file.readinto(values.data) != values.size:
            raise invalid(self.file, "it ended early: it changed while it was read")
        return values.view(DTYPES[self.dtype]).reshape(self.shape)

    def pieces(self) -> Iterator[bytes]:
        """Yields the bytes of the tensor, a few at a time.

        Raises:
          CheckpointError: as `read`.
        """
        left = self.size
        with self._opened() as file:
            while left:
                if not (piece := file.read(min(left, _PIECE))):
                    raise invalid(self.file, f"a tensor lacks {left} of its {self.size} bytes")
                yield piece
                left -= len(piece)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[BufferedReader]:
        """Opens the file at the first byte; another file of the name has other values there, or another header."""
        with opened(self.file) as (file, _):
            if os.fstat(file.fileno()).st_mtime_ns != self.time:
                raise invalid(self.file, "it changed after its header was read")
            file.seek(self.start)
            yield file


class Header(NamedTuple):
    """What the header of a file states: its tensors by name, in the order of their values, and its metadata."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


class Contents(NamedTuple):
    """The tensors of a file, and its metadata."""

    tensors: dict[str, Values]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Reads the header of a file.

    Raises:
      CheckpointError: if the file is not valid safetensors.
      OSError: if it cannot be read.
    """
    with opened(path) as (file, size):
        return _header(file, size, path)


def read_arrays(path: Path, most: int | None) -> Contents:
    """Reads all tensors of an adapter.

    Args:
      path: of the file.
      most: the largest number of bytes of all values; None for any.

    Raises:
      CheckpointError: if the file is not valid safetensors with values in floating point, or one is not finite.
      OSError: if it cannot be read.
    """
    with opened(path) as (file, size):
        stored, metadata = _header(file, size, path)
        if other := [name for name, one in stored.items() if one.dtype not in FLOATS]:
            lines = [f"{name!r} has dtype {stored[name].dtype!r}; {', '.join(FLOATS)} are read" for name in other]
            raise invalid(path, f"tensors have no values in floating point:\n{listed(lines)}")
        if most is not None and (found := sum(one.size for one in stored.values())) > most:
            have = f"{found:,} bytes of values"
            raise invalid(path, f"it has {have}, and an adapter of these parameters has at most {most:,}")
        tensors = {name: one.read_from(file) for name, one in stored.items()}
    if bad := [f"{name!r}" for name, array in tensors.items() if not _is_finite(array)]:
        raise invalid(path, f"tensors have values that are not finite:\n{listed(bad)}")
    return Contents(tensors, metadata)


def _header(file: BufferedReader, size: int, path: Path) -> Header:
    """Reads the header of an open file of this size, up to the first value."""
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise invalid(path, f"its header states {length} bytes, and the file has {size}")
    if length > MAX_BYTES:
        raise invalid(path, f"its header has {length:,} bytes; at most {MAX_BYTES:,} are read")
    content = file.read(length)
    if not content.startswith(b"{"):
        raise invalid(path, f"its header begins with {content[:8]!r} in place of a JSON object")
    fields = parse(content, path)
    metadata = fields.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise invalid(path, f"its {METADATA} is not a mapping to strings")
    if not fields:
        raise invalid(path, "it has no tensors")
    return Header(_stored(fields, 8 + length, size, path, os.fstat(file.fileno()).st_mtime_ns), metadata)


def _stored(header: Mapping[str, Any], start: int, size: int, path: Path, time: int) -> dict[str, Stored]:
    """Returns the tensors in the order of their values, which must be bytes `start` to `size` without gaps."""
    found = [(name, _problem(name, fields)) for name, fields in header.items()]
    if problems := [f"{shown(name)} {problem}" for name, problem in found if problem is not None]:
        raise invalid(path, f"its header is wrong:\n{listed(problems)}")
    tensors: dict[str, Stored] = {}
    end = 0
    for name, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = fields["data_offsets"]
        if first != end:
            raise invalid(path, f"the values of {name!r} start at offset {first}; expected {end}")
        tensors[name] = Stored(name, path, fields["dtype"], tuple(fields["shape"]), start + first, last - first, time)
        end = last
    if start + end != size:
        raise invalid(path, f"its tensors have {end} bytes, and the file has {size - start} after its header")
    return tensors


def _problem(name: str, fields: Any) -> str | None:
    """Returns what is wrong with the entry of one tensor, by itself."""
    if len(name) > _MAX_NAME:
        return f"is a name of {len(name)} characters; at most {_MAX_NAME} are read"
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        return f"has {shown(fields)}; expected {', '.join(sorted(_FIELDS))}"
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        return f"has dtype {shown(dtype)}, which the format does not have"
    if not _are_sizes(shape) or len(shape) > _MAX_AXES:
        return f"has shape {shown(shape)}; expected at most {_MAX_AXES} sizes of at least 0"
    if not _are_sizes(offsets) or len(offsets) != 2:
        return f"has offsets {shown(offsets)}; expected two of at least 0"
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        needed = shown(-(-bits // 8))
        return f"has shape {shown(shape)} in {dtype}, which needs {needed} bytes, and offsets {shown(offsets)}"
    return None


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _is_finite(array: Values) -> bool:
    if array.dtype == np.float64:  # JAX reads them as float32
        return bool((np.abs(array) <= np.finfo(np.float32).max).all())
    return bool(np.isfinite(array).all())
