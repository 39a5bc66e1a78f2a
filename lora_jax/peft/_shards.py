"""Writes a model in safetensors files, tensor by tensor: shards and their index, as Hugging Face's libraries read them.

Files have temporary names until all of them are complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._errors import CheckpointError, SpecError
from ._stored import INDEX, MODEL
from ._write import Entry, write

Progress = Callable[[int, int], None]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def as_bytes(size: int | str) -> int:
    """Returns a size in bytes.

    >>> as_bytes("5GB"), as_bytes("1.5 MiB"), as_bytes(100)
    (5000000000, 1572864, 100)

    Raises:
      SpecError: if it is not a positive integer or such a text.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", str(size).upper())
    if isinstance(size, bool) or match is None or match[2] not in _UNITS or float(match[1]) * _UNITS[match[2]] < 1:
        raise SpecError(f'Expected a number of bytes, or a text such as "5GB", for `max_shard_size`; got {size!r}.')
    return int(float(match[1]) * _UNITS[match[2]])


def grouped(entries: Sequence[Entry], most: int) -> list[list[Entry]]:
    """Divides tensors into shards of at most `most` bytes; a larger tensor has a shard of its own."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for one in entries:
        if shards[-1] and size + one.size > most:
            shards.append([])
            size = 0
        shards[-1].append(one)
        size += one.size
    return shards


def write_model(
    directory: Path,
    entries: Sequence[Entry],
    contents: Iterable[Iterable[Any]],
    *,
    max_shard_size: int | str,
    others: Mapping[str, Path | bytes],
    overwrite: bool,
    progress: Progress | None = None,
) -> None:
    """Writes the tensors of a model, and other files.

    Args:
      directory: created if missing.
      entries: the tensors, in the order in which they are written.
      contents: for each tensor its bytes, in pieces.
      max_shard_size: in bytes, or a text such as `"5GB"`.
      others: by name, the content of other files or the path to copy.
      overwrite: whether `directory` may have files. A model in it is replaced.
      progress: called with the bytes written so far and the total, after each tensor.

    Raises:
      CheckpointError: if `directory` has files, or cannot be written.
    """
    shards = grouped(entries, as_bytes(max_shard_size))
    count = len(shards)
    names = [f"model-{at + 1:05}-of-{count:05}.safetensors" for at in range(count)] if count > 1 else [MODEL]
    total = sum(one.size for one in entries)
    check_empty(directory, overwrite)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _temporary(directory) as new:
            done, pieces = 0, iter(contents)
            for name, shard in zip(names, shards, strict=True):
                with new(name).open("wb") as file:
                    for one in write(file, shard, pieces, {}):
                        done += one.size
                        if progress is not None:
                            progress(done, total)
            for name, content in others.items():
                if isinstance(content, bytes):
                    new(name).write_bytes(content)
                else:
                    shutil.copyfile(content, new(name))
            if count > 1:
                files = {one.name: name for name, shard in zip(names, shards, strict=True) for one in shard}
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
                new(INDEX).write_text(json.dumps(index, indent=2) + "\n")
            for old in (directory / INDEX, *directory.glob("model*.safetensors")) if overwrite else ():
                old.unlink(missing_ok=True)
            for name in (*others, *names, *([INDEX] if count > 1 else [])):  # what makes the model complete is last
                os.replace(new(name), directory / name)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write a model to {directory}.\n  {type(error).__name__}: {error}\n"
            "  Make the directory writable or free space, and write again."
        ) from error


def check_empty(directory: Path, overwrite: bool) -> None:
    """Raises if a directory has files, unless they may be overwritten. Those of an interrupted write do not count."""
    if overwrite or not directory.exists():
        return
    found = (
        sorted(path.name for path in directory.iterdir() if not _is_temporary(path))
        if directory.is_dir()
        else ["a file"]
    )
    if found:
        raise CheckpointError(
            f"Expected a new or empty directory; {directory} has {found[0]}"
            f"{f' and {len(found) - 1} more' if len(found) > 1 else ''}.\n"
            "  Choose another directory, or pass overwrite=True to replace the model in it."
        )


@contextlib.contextmanager
def _temporary(directory: Path) -> Iterator[Callable[[str], Path]]:
    """Gives temporary paths for names; what is not renamed is deleted."""
    made: set[Path] = set()

    def new(name: str) -> Path:
        path = directory / f".{name}.new"
        made.add(path)
        return path

    try:
        yield new
    finally:
        for path in made:
            path.unlink(missing_ok=True)


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".new")
