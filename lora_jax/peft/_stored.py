"""The tensors of a model: those of one safetensors file, or of the shards that an index names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from .._errors import CheckpointError
from ._safetensors import Stored, read_header
from ._untrusted import invalid, read_json, shown

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"


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
            raise invalid(directory / INDEX, f"it states that {shown(name)} is in {file}, which lacks it")
    return {name: tensor for file, some in tensors.items() for name, tensor in some.items() if files.get(name) == file}


def named_for(modules: Collection[str], tensors: Mapping[str, Stored]) -> Mapping[str, Stored]:
    """Returns the tensors under the names that a torch model with these modules has for them.

    A file of a model without a head may lack the first segment, such as `transformer.`, or have it where the model
    does not, because `transformers` adds or removes it when it loads the file. If several fit, none is removed.
    """
    found = {name.rpartition(".")[0] for name in tensors}
    if found.issuperset(modules):
        return tensors
    own = {module.partition(".")[0] for module in modules}
    for first in own if len(own) == 1 else ():
        if found.issuperset(module.removeprefix(f"{first}.") for module in modules):
            return {f"{first}.{name}": tensor for name, tensor in tensors.items()}
    prefixes = {module.partition(".")[0] for module in found}
    fitting = [first for first in prefixes if found.issuperset(f"{first}.{module}" for module in modules)]
    renamed = {name.removeprefix(f"{first}."): tensor for first in fitting[:1] for name, tensor in tensors.items()}
    return renamed if len(fitting) == 1 and len(renamed) == len(tensors) else tensors  # else, two have one name


def _shards(index: Path) -> dict[str, str]:
    """Returns the name of the file of each tensor."""
    with _readable(index):
        names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise invalid(index, "it has no weight_map")
    for file in names.values():
        if not isinstance(file, str) or file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise invalid(index, f"it names {shown(file)}, which is not a safetensors file of its directory")
    return names


def _tensors_of(path: Path) -> dict[str, Stored]:
    with _readable(path):
        return read_header(path).tensors


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raises `CheckpointError` if a file of a model cannot be read."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"Expected a model in safetensors files, {MODEL} or {INDEX}, in {path.parent}; {path.name} cannot be "
            f"read.\n  {type(error).__name__}: {error}"
        ) from error
