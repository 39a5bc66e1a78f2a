"""Reads and writes the two files of an adapter: tensors in safetensors, and a configuration in JSON. Never pickle.

The files are untrusted: only regular files are read, and every size is checked before anything is allocated.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from .._errors import CheckpointError
from . import _safetensors
from ._json import MAX_BYTES, invalid, parse
from ._layout import Values

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PICKLES = ("adapter_model.bin", "adapter_model.pt")


class Files(NamedTuple):
    """What is written: a file of tensors, with its metadata, and a configuration unless it is None."""

    tensors: Mapping[str, Values]
    config: Mapping[str, Any] | None
    name: str = TENSORS
    metadata: Mapping[str, str] = MappingProxyType({})


def write(directory: Path, files: Files) -> None:
    """Writes the files; they replace older ones when all are complete.

    Raises:
      AdapterError: if a tensor has a dtype that is not read.
      CheckpointError: if the files cannot be written.
    """
    _safetensors.check_dtypes(files.tensors)
    names = [files.name] if files.config is None else [files.name, CONFIG]
    # A name that nobody can guess: links of other names are neither followed nor replaced.
    new = {name: directory / f".{name}.{secrets.token_hex(8)}" for name in names}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with new[files.name].open("xb") as file:
                _safetensors.write(file, files.tensors, files.metadata)
            if files.config is not None:
                with new[CONFIG].open("xb") as file:
                    file.write((json.dumps(files.config, indent=2, sort_keys=True) + "\n").encode())
            for name, path in new.items():
                os.replace(path, directory / name)  # replaces a link, not what it points to
        finally:
            for path in new.values():
                path.unlink(missing_ok=True)
    except (OSError, UnicodeEncodeError) as error:
        raise CheckpointError(
            f"Cannot write a PEFT adapter to {directory}.\n  {type(error).__name__}: {error}\n"
            "  Make the directory writable or free space, and export again."
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """Reads the configuration.

    Raises:
      CheckpointError: if there is none, or if it is not a JSON object without duplicate keys.
    """
    with _opened(directory, CONFIG) as (file, size):
        return parse(file.read(min(size, MAX_BYTES) + 1), directory / CONFIG)


def read_tensors(directory: Path, name: str = TENSORS, *, most: int | None = None) -> dict[str, Values]:
    """Reads the tensors of a file.

    Args:
      directory: of the adapter.
      name: of the file.
      most: the largest number of bytes of all values; None for any.

    Raises:
      CheckpointError: if there is no safetensors file, or it is invalid, or a value is not finite.
    """
    with _opened(directory, name) as (file, size):
        return _safetensors.read(file, size, directory / name, most)


@contextlib.contextmanager
def _opened(directory: Path, name: str) -> Iterator[tuple[BufferedReader, int]]:
    """Opens a regular file, through links as Hugging Face's cache has them, and yields it with its size."""
    path = directory / name
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise invalid(path, "it is not a regular file")
            yield file, before.st_size
            after = os.fstat(file.fileno())
    except OSError as error:
        pickles = [pickle for pickle in _PICKLES if (directory / pickle).exists()]
        if name == TENSORS and pickles:
            raise CheckpointError(
                f"Expected {TENSORS} in {directory}; got {pickles[0]}, which is a pickle. Reading a pickle can run "
                "any code, so it is not read.\n"
                "  Load it with PEFT, and save it again: save_pretrained writes safetensors."
            ) from error
        raise CheckpointError(
            f"Expected a PEFT adapter, with {CONFIG} and {TENSORS}, in {directory}; {name} cannot be read.\n"
            f"  {type(error).__name__}: {error}"
        ) from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise invalid(path, "it changed while it was read")


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file; for a FIFO, without waiting for a process that writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
