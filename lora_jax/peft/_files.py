"""Reads and writes the two files of an adapter: tensors in safetensors, and a configuration in JSON. Never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from .._errors import CheckpointError, listed
from ._layout import Values

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PICKLES = ("adapter_model.bin", "adapter_model.pt")

_DTYPES: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_MAX_HEADER = 100_000_000  # bytes, as the format limits it


class Files(NamedTuple):
    """What is written: a file of tensors, with its metadata, and a configuration unless it is None."""

    tensors: Mapping[str, Values]
    config: Mapping[str, Any] | None
    name: str = TENSORS
    metadata: Mapping[str, str] = MappingProxyType({})


def write(directory: Path, files: Files) -> None:
    """Writes the files; each replaces an older one only when it is complete."""
    contiguous = {name: np.asarray(array, order="C") for name, array in sorted(files.tensors.items())}
    metadata = {"format": "pt", **files.metadata}  # transformers requires a format
    contents = {files.name: safetensors.numpy.save(contiguous, metadata=metadata)}
    if files.config is not None:
        contents[CONFIG] = (json.dumps(files.config, indent=2, sort_keys=True) + "\n").encode()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            new = directory / f".{name}.new"
            new.write_bytes(content)
            os.replace(new, directory / name)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write a PEFT adapter to {directory}.\n  {type(error).__name__}: {error}\n"
            "  Make the directory writable or free space, and export again."
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """Reads the configuration.

    Raises:
      CheckpointError: if there is none, or if it is not a JSON object without duplicate keys.
    """
    return _parsed(_read(directory, CONFIG), directory / CONFIG)


def read_tensors(directory: Path, name: str = TENSORS) -> dict[str, Values]:
    """Reads the tensors of a file.

    Raises:
      CheckpointError: if there is no safetensors file, or it is invalid, or a value is not finite.
    """
    path = directory / name
    content = _read(directory, name)
    _check_header(content, path)
    try:
        entries = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise _invalid(path, str(error)) from error
    if other := [f"{name!r} has dtype {entry['dtype']}" for name, entry in entries if entry["dtype"] not in _DTYPES]:
        raise _invalid(path, f"tensors are not in {', '.join(_DTYPES)}:\n{listed(other)}")
    tensors = {
        name: np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"]) for name, entry in entries
    }
    if bad := [f"{name!r}" for name, array in tensors.items() if not np.isfinite(array).all()]:
        raise _invalid(path, f"tensors have values that are not finite:\n{listed(bad)}")
    return tensors


def _read(directory: Path, name: str) -> bytes:
    path = directory / name
    try:
        return path.read_bytes()
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


def _check_header(content: bytes, path: Path) -> None:
    """Raises if a name occurs twice, which the library does not see."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > min(len(content) - 8, _MAX_HEADER):
        raise _invalid(path, f"its header states {size} bytes, and the file has {len(content)}")
    _parsed(content[8 : 8 + size], path)


def _parsed(content: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"the key {name!r} occurs twice")
            found[name] = value
        return found

    try:
        parsed = json.loads(content, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _invalid(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(parsed, dict):
        raise _invalid(path, f"it has a {type(parsed).__name__} in place of a JSON object")
    return parsed


def _invalid(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"Expected a valid {path.name}; {reason}, in {path.parent}.\n"
        "  The file is damaged, or was not written by PEFT: copy it again."
    )
