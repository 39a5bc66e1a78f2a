"""Checksums of the files of a directory, in the format of `sha256sum`; `sha256sum -c checksums.sha256` checks them.

TensorStore does not check the contents of an array: a byte that changes on disk would be read as a wrong value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from etils import epath

from .._errors import CheckpointError, listed

NAME = "checksums.sha256"

# Orbax writes these after the checksums. Their contents do not affect the values of arrays.
UNCHECKED = frozenset({"_CHECKPOINT_METADATA", "commit_success.txt"})

_HEADER = "# lora_jax; the lines below have the checksum "  # a comment for `sha256sum`
_BLOCK_SIZE = 1 << 20


def write(directory: epath.Path) -> None:
    """Writes the checksums of all files in a directory."""
    lines = "".join(f"{_file_digest(directory / name)}  {name}\n" for name in _file_names(directory))
    (directory / NAME).write_text(f"{_HEADER}{_digest(lines)}\n{lines}")


def verify(directory: epath.Path) -> None:
    """Compares every file in a directory with its checksum.

    Raises:
      CheckpointError: if a file is missing, has changed, or was added; names each of them.
    """
    if found := _differences(directory):
        raise CheckpointError(
            f"Expected a complete checkpoint, with the files in {NAME!r}; {len(found)} differ, in {directory}.\n"
            f"{listed(found)}\n  Copy the complete directory again, or restore another checkpoint."
        )


def _differences(directory: epath.Path) -> list[str]:
    if not (directory / NAME).exists():
        return [f"{NAME!r} is missing"]
    header, _, lines = (directory / NAME).read_bytes().decode(errors="replace").partition("\n")
    if header != _HEADER + _digest(lines):
        return [f"{NAME!r} has changed"]
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines.splitlines())}
    found = dict.fromkeys(_file_names(directory))
    missing = [f"{name!r} is missing" for name in expected if name not in found]
    added = [f"{name!r} is not a file of this checkpoint" for name in found if name not in expected]
    common = {name: digest for name, digest in expected.items() if name in found}
    changed = [f"{name!r} has changed" for name, digest in common.items() if _file_digest(directory / name) != digest]
    return [*missing, *added, *changed]


def _file_names(directory: epath.Path, prefix: str = "") -> Iterator[str]:
    """Yields the files to check. File systems and file managers add files whose names begin with a dot."""
    for entry in sorted(directory.iterdir()):
        name = f"{prefix}{entry.name}"
        if entry.name.startswith(".") or name == NAME or entry.name in UNCHECKED:
            continue
        if entry.is_dir():
            yield from _file_names(entry, f"{name}/")
        else:
            yield name


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _file_digest(file: epath.Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_SIZE):
            digest.update(block)
    return digest.hexdigest()
