"""Reads and writes the two files of an adapter: tensors in safetensors, and a configuration in JSON. Never pickle."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from .._errors import CheckpointError
from ._layout import Values
from ._safetensors import Contents, read_arrays
from ._untrusted import read_json
from ._write import check_dtypes, write_arrays

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
    check_dtypes(files.tensors)
    names = [files.name] if files.config is None else [files.name, CONFIG]
    # A name that nobody can guess: links of other names are neither followed nor replaced.
    new = {name: directory / f".{name}.{secrets.token_hex(8)}" for name in names}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with new[files.name].open("xb") as file:
                write_arrays(file, files.tensors, files.metadata)
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
    with _readable(directory, CONFIG):
        return read_json(directory / CONFIG)


def read_tensors(directory: Path, name: str = TENSORS, *, most: int | None = None) -> Contents:
    """Reads the tensors and the metadata of a file.

    Args:
      directory: of the adapter.
      name: of the file.
      most: the largest number of bytes of all values; None for any.

    Raises:
      CheckpointError: if there is no safetensors file, or it is invalid, or a value is not finite.
    """
    with _readable(directory, name):
        return read_arrays(directory / name, most)


@contextlib.contextmanager
def _readable(directory: Path, name: str) -> Iterator[None]:
    """Raises `CheckpointError` if a file of an adapter cannot be read."""
    try:
        yield
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
