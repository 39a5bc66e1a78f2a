"""Reads the tensors of a model one at a time: those of one safetensors file, or of the shards that an index names."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from .._errors import CheckpointError
from ._layout import Values
from ._safetensors import FLOATS as FLOATS

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"

# The dtypes whose values can be read. Tensors of others can be copied.
DTYPES: dict[str, Any] = {
    **FLOATS,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_PIECE = 2**22  # bytes that are read at once
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
      name: in the file.
      file: the safetensors file.
      dtype: its name in the format, such as `"BF16"`.
      shape: of the tensor.
      start: the offset of its first byte in the file.
      size: in bytes.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self) -> Values:
        """Reads the values; no other tensor of the file comes into memory.

        Raises:
          CheckpointError: if the file is shorter than its header states.
        """
        dtype = DTYPES[self.dtype]
        array = np.fromfile(self.file, dtype, math.prod(self.shape), offset=self.start)
        if array.nbytes != self.size:
            raise invalid(self.file, f"a tensor has {array.nbytes} of its {self.size} bytes")
        return array.reshape(self.shape)

    def pieces(self) -> Iterator[bytes]:
        """Yields the bytes of the tensor, a few at a time.

        Raises:
          CheckpointError: as `read`.
        """
        left = self.size
        with self.file.open("rb") as file:
            file.seek(self.start)
            while left:
                if not (piece := file.read(min(left, _PIECE))):
                    raise invalid(self.file, f"a tensor lacks {left} of its {self.size} bytes")
                yield piece
                left -= len(piece)


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Returns the tensors of a model by name, in the order of its files.

    Raises:
      CheckpointError: if there are no safetensors files, or they or their index are damaged.
    """
    if not (directory / INDEX).exists():
        return _tensors_of(directory / MODEL)
    files = _shards(directory / INDEX)
    tensors = {name: _tensors_of(directory / name) for name in sorted(set(files.values()))}
    for name, file in files.items():
        if name not in tensors[file]:
            raise invalid(directory / INDEX, f"it states that {name!r} is in {file}, which lacks it")
    return {name: tensor for file, some in tensors.items() for name, tensor in some.items() if files.get(name) == file}


def named_for(modules: Collection[str], tensors: Mapping[str, Stored]) -> Mapping[str, Stored]:
    """Returns the tensors under the names that a torch model with these modules has for them.

    A file of a model without a head may lack the first segment, such as `transformer.`, or have it where the model
    does not, because `transformers` adds or removes it when it loads the file.
    """
    found = {name.rpartition(".")[0] for name in tensors}
    if found.issuperset(modules):
        return tensors
    own = {module.partition(".")[0] for module in modules}
    for first in own if len(own) == 1 else ():
        if found.issuperset(module.removeprefix(f"{first}.") for module in modules):
            return {f"{first}.{name}": tensor for name, tensor in tensors.items()}
    for first in sorted({module.partition(".")[0] for module in found}):
        if found.issuperset(f"{first}.{module}" for module in modules):
            return {name.removeprefix(f"{first}."): tensor for name, tensor in tensors.items()}
    return tensors


def _shards(index: Path) -> dict[str, str]:
    """Returns the name of the file of each tensor."""
    try:
        files = json.loads(index.read_bytes())["weight_map"]
        names = dict(files.items())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise invalid(index, f"it has no weight_map ({type(error).__name__}: {error})") from error
    for file in names.values():
        if not isinstance(file, str) or file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise invalid(index, f"it names {file!r}, which is not a safetensors file of its directory")
    return names


def _tensors_of(path: Path) -> dict[str, Stored]:
    try:
        with safetensors.safe_open(path, framework="np"):  # checks the header: offsets, shapes and sizes
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"Expected a model in safetensors files, {MODEL} or {INDEX}, in {path.parent}; {path.name} cannot be "
            f"read.\n  {type(error).__name__}: {error}"
        ) from error
    header.pop("__metadata__", None)
    return {
        name: Stored(name, path, entry["dtype"], tuple(entry["shape"]), 8 + size + first, last - first)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        for first, last in [entry["data_offsets"]]
    }


def invalid(path: Path, reason: str) -> CheckpointError:
    """Returns the error for a damaged file."""
    return CheckpointError(f"Expected a valid {path.name} in {path.parent}; {reason}.\n  Copy the model again.")
