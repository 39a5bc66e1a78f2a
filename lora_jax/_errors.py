"""Exceptions. Each is a `LoRAError` and a subclass of a built-in exception.

Every message states what was expected, what was got, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "AdapterError",
    "CheckpointError",
    "LoRAError",
    "MergeError",
    "SpecError",
    "TracingError",
    "UnsupportedError",
    "listed",
    "refuse_keywords",
]


class LoRAError(Exception):
    """Base class of all exceptions that lora_jax raises."""


class SpecError(LoRAError, ValueError):
    """An invalid spec: a rule without effect, or a rank or axes that do not fit the kernel."""


class AdapterError(LoRAError, ValueError):
    """An adapter that does not match the parameters: unknown paths, wrong shapes, or leaves that are never used."""


class UnsupportedError(LoRAError, NotImplementedError):
    """An adapted kernel reaches an operation without a low-rank rule; or JAX or a backend lacks what is needed.

    Attributes:
      what: what was expected and what was got.
      line: the line of the model. Empty if JAX does not keep it, as inside JAX's own jitted functions. None if `what`
        names several kernels with their lines, or if no line is the cause.
      advice: what to do.
    """

    def __init__(self, what: str, line: str | None, advice: str) -> None:
        super().__init__(what, line, advice)  # pickling passes `args` to `__init__`
        self.what, self.line, self.advice = what, line, advice

    def __str__(self) -> str:
        at = "" if self.line is None else f"\n  at {self.line or 'an unknown line'}"
        return f"{self.what}{at}\n  {self.advice}"


class TracingError(LoRAError, TypeError):
    """A function that cannot be traced: it needs the value of an array, or its result hides a traced array."""


class MergeError(LoRAError, ValueError):
    """A merge that would lose something: tied leaves, non-finite factors, or a tree that is not a merged base."""


class CheckpointError(LoRAError, ValueError):
    """A checkpoint that is damaged, is not an adapter, or belongs to another base."""


SHOWN = 8  # how many lines of a list an error shows


def counted(count: int, noun: str) -> str:
    """Returns the count and the noun, such as `2 differences`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def listed(lines: Sequence[str], most: int = SHOWN) -> str:
    """Formats the first `most` of `lines` as an indented list, followed by the number of the others."""
    shown = [f"  {line}" for line in lines[:most]]
    if len(lines) > most:
        shown.append(f"  … and {len(lines) - most} more")
    return "\n".join(shown)


def sections(*parts: tuple[str, str, Sequence[str]]) -> str:
    """Formats lists that are not empty, each `(noun, what, lines)` below a line such as `2 paths that are missing:`."""
    return "\n".join(f"  {counted(len(lines), noun)}{what}:\n{listed(lines)}" for noun, what, lines in parts if lines)


def refuse_keywords(function: str, unexpected: Mapping[str, Any]) -> None:
    """Raises `TypeError` for unexpected keyword arguments, with advice to pass the model's in `kwargs`."""
    if unexpected:
        names = ", ".join(map(repr, unexpected))
        given = ", ".join(f"{name!r}: ..." for name in unexpected)
        raise TypeError(
            f"{function}() got unexpected keyword arguments: {names}.\n"
            f"  Pass the model's keyword arguments as one mapping: {function}(..., kwargs={{{given}}})."
        )
