"""Checksums of a directory's files, in lines as `sha256sum` writes them; `sha256sum -c checksums.sha256` reads them.

TensorStore does not check the bytes of an array: one that has changed on the disk would be read as a number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from etils import epath

from .._errors import CheckpointError, listed

NAME = "checksums.sha256"

# What Orbax writes last, after the checksums; nothing in them tells what an array holds.
LATER = frozenset({"_CHECKPOINT_METADATA", "commit_success.txt"})

_HEAD = "# lora_jax; the lines below have the checksum "  # for `sha256sum`, a comment
_BLOCK = 1 << 20


def write(directory: epath.Path) -> None:
    """Writes the checksums of all files in a directory."""
    lines = "".join(f"{_digest_of(directory / name)}  {name}\n" for name in _names(directory))
    (directory / NAME).write_text(f"{_HEAD}{_digest(lines)}\n{lines}")


def verify(directory: epath.Path) -> None:
    """Reads every file in a directory, and compares it with what was written.

    Raises:
      CheckpointError: naming each file that is missing, has changed, or was not there.
    """
    if found := _differences(directory):
        raise CheckpointError(
            f"Expected a whole checkpoint, its files as {NAME!r} lists them; {len(found)} are not, in {directory}.\n"
            f"{listed(found)}\n"
            "  Copy the directory again, whole, or restore another checkpoint."
        )


def _differences(directory: epath.Path) -> list[str]:
    if not (directory / NAME).exists():
        return [f"{NAME!r} is missing"]
    head, _, lines = (directory / NAME).read_bytes().decode(errors="replace").partition("\n")
    if head != _HEAD + _digest(lines):
        return [f"{NAME!r} has changed"]
    promised = {name: digest for digest, _, name in (line.partition("  ") for line in lines.splitlines())}
    there = dict.fromkeys(_names(directory))
    missing = [f"{name!r} is missing" for name in promised if name not in there]
    strange = [f"{name!r} is none of its files" for name in there if name not in promised]
    kept = {name: digest for name, digest in promised.items() if name in there}
    changed = [f"{name!r} has changed" for name, digest in kept.items() if _digest_of(directory / name) != digest]
    return [*missing, *strange, *changed]


def _names(directory: epath.Path, inside: str = "") -> Iterator[str]:
    """All files that are the checkpoint's own; those with a dot are file systems' and file managers'."""
    for entry in sorted(directory.iterdir()):
        name = f"{inside}{entry.name}"
        if entry.name.startswith(".") or name == NAME or entry.name in LATER:
            continue
        if entry.is_dir():
            yield from _names(entry, f"{name}/")
        else:
            yield name


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_of(file: epath.Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
