"""The errors of the library: each is a `LoRAError` and also the built-in error it is.

Every text says what was expected, what was got, where, and what to do.
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
    """Any error that this library raises on purpose."""


class SpecError(LoRAError, ValueError):
    """A spec that cannot be meant: a rule that decides nothing, a rank or axes that do not fit the kernel."""


class AdapterError(LoRAError, ValueError):
    """An adapter that does not belong to the parameters: unknown paths, other shapes, leaves never used."""


class UnsupportedError(LoRAError, NotImplementedError):
    """An adapted kernel reaches an operation that has no low-rank form.

    Attributes:
      what: what was expected and what was got.
      line: the line of the model; empty where JAX has not kept it, as inside functions that it has jitted itself; None
        where `what` names several kernels, each with its line.
      advice: what to do.
    """

    def __init__(self, what: str, line: str | None, advice: str) -> None:
        super().__init__(what, line, advice)  # what it is made of, so that it can be pickled
        self.what, self.line, self.advice = what, line, advice

    def __str__(self) -> str:
        at = "" if self.line is None else f"\n  at {self.line or 'a line that is not known'}"
        return f"{self.what}{at}\n  {self.advice}"


class TracingError(LoRAError, TypeError):
    """A function that cannot be traced: its Python code needs the value of an array, or its result hides one."""


class MergeError(LoRAError, ValueError):
    """A merge that would lose something: tied leaves, non-finite factors, a tree that is not the merge of a base."""


class CheckpointError(LoRAError, ValueError):
    """A checkpoint that is not an adapter, is damaged, or belongs to another base."""


SHOWN = 8  # of a longer list


def listed(lines: Sequence[str], most: int = SHOWN) -> str:
    """Indents `lines`, one each, and says how many more there are after the first `most`."""
    shown = [f"  {line}" for line in lines[:most]]
    if len(lines) > most:
        shown.append(f"  … and {len(lines) - most} more")
    return "\n".join(shown)


def refuse_keywords(function: str, unexpected: Mapping[str, Any]) -> None:
    """Raises `TypeError`, as Python does, for keyword arguments that a function does not have; says where they go."""
    if unexpected:
        names = ", ".join(map(repr, unexpected))
        given = ", ".join(f"{name!r}: ..." for name in unexpected)
        raise TypeError(
            f"{function}() got unexpected keyword arguments: {names}.\n"
            f"  Those of the model go into one mapping: {function}(..., kwargs={{{given}}})."
        )
