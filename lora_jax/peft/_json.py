"""JSON of an untrusted file, and the error for a file that is not as expected."""

from __future__ import annotations

import json
import math
import reprlib
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
        "  The file is damaged, or was not written by PEFT: copy it again."
    )


def parse(content: bytes, path: Path) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
      CheckpointError: if it is not a JSON object in UTF-8, has a key twice or a number that is not finite, or is larger
        or more deeply nested than the configuration or the header of an adapter can be.
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
