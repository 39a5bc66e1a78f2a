"""Opens untrusted files and parses their JSON; the error for a file that is not as expected.

Only regular files are read, and every size is checked before anything is allocated.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import reprlib
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from .._errors import CheckpointError

MAX_BYTES = 32 * 2**20  # enough for 100,000 modules
_MAX_VALUES = 2_000_000  # an empty list of 2 bytes takes 56 in memory
_MAX_DIGITS = 20  # of 64 bits

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


def shown(value: Any) -> str:
    """Returns the representation of a value of a file, shortened for an error.

    >>> shown("k" * 10_000) == repr("k" * 47 + "..." + "k" * 48)
    True
    """
    return _REPR.repr(value)


def invalid(path: Path, reason: str) -> CheckpointError:
    """Returns the error for a file that is damaged."""
    return CheckpointError(
        f"Expected a valid {path.name}; {reason}, in {path.parent}.\n"
        "  The file is damaged, or its writer did not follow the format: copy it again, or save it again."
    )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """Opens a regular file, through links as Hugging Face's cache has them, and yields it with its size.

    Raises:
      CheckpointError: if it is not a regular file, or changes before it is closed.
      OSError: if it cannot be read.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise invalid(path, "it is not a regular file")
        yield file, before.st_size
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise invalid(path, "it changed while it was read")


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file; for a FIFO, without waiting for a process that writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file with a JSON object.

    Raises:
      CheckpointError: as `opened` and `parse`.
      OSError: if it cannot be read.
    """
    with opened(path) as (file, size):
        return parse(file.read(min(size, MAX_BYTES) + 1), path)


def parse(content: bytes, path: Path) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
      CheckpointError: if it is not a JSON object in UTF-8, has a key twice or a number that is not finite, or is larger
        or more deeply nested than a configuration or a header can be.
    """
    if len(content) > MAX_BYTES:
        raise invalid(path, f"it has more than {MAX_BYTES:,} bytes of JSON")
    if sum(map(content.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise invalid(path, f"it has more than {_MAX_VALUES:,} values in JSON")
    try:
        parsed = json.loads(
            content.decode(),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise invalid(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(parsed, dict):
        raise invalid(path, f"it has a {type(parsed).__name__} in place of a JSON object")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {shown(name)} occurs twice")
        name.encode()  # raises a ValueError for half of a surrogate pair, which no module's name has
        found[name] = value
    return found


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer has {len(text)} digits; at most {_MAX_DIGITS} are read")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is not a finite number")
    return value
