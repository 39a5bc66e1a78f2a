"""What a command returns: plain data, how it is shown, and the exit code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table


class UsageError(Exception):
    """Arguments that do not make sense together, or a target that must not be written to; exit code 2."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a command.

    Attributes:
      data: what `--json` prints; its keys are stable.
      shown: what is printed without `--json`.
      code: the exit code.
    """

    data: dict[str, Any]
    shown: Callable[[], Iterable[RenderableType]]
    code: int = 0


def check_options(what: str, given: Mapping[str, Any], allowed: Collection[str]) -> None:
    """Raises if an option is given that has no effect.

    Args:
      what: what is done.
      given: the values of options by name; those that are not given are None.
      allowed: the names of those that have an effect.

    Raises:
      UsageError: if there is one.
    """
    if unused := [f"--{name}" for name, value in given.items() if value is not None and name not in allowed]:
        names = ", ".join(f"--{name}" for name in allowed) or "none"
        raise UsageError(f"Expected options of {what} ({names}); got {', '.join(unused)}.")


def table(*heads: str) -> Table:
    """Makes a table; a column whose head starts with `#` has numbers."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for head in heads:
        justify: Any = "right" if head.startswith("#") else "left"
        made.add_column(head.removeprefix("#"), justify=justify, no_wrap=justify == "right", overflow="fold")
    return made


def add_row(shown: Table, *cells: str, style: str | None = None) -> None:
    """Adds a row to a table."""
    shown.add_row(*map(printable, cells), style=style)


def printable(text: str) -> str:
    r"""Returns a text with what would control a terminal escaped; files that others wrote may have it in names.

    >>> print(printable("fc1" + chr(27) + "[31m, ‖s·A·B‖"))
    fc1\x1b[31m, ‖s·A·B‖
    """
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


# What the library's errors advise, as the options that do it.
_OPTIONS = {"`base=`": "--base", "base=params": "--base", "untie=": "--untie "}


def advice(text: str) -> str:
    """Returns the text of an error of the library, with options of the command in place of arguments."""
    for argument, option in _OPTIONS.items():
        text = text.replace(argument, option)
    return text


def number(value: float | None) -> str:
    """Formats a number with three digits.

    >>> number(None), number(8), number(0.5), number(0.123456)
    ('', '8', '0.5', '0.123')
    """
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def spans(values: Iterable[float | None]) -> str:
    """Formats the least and the largest of several numbers.

    >>> spans([0.1, 0.1]), spans([0.5, None, 2.0, 0.1]), spans([None])
    ('0.1', '0.1–2', '')
    """
    known = [value for value in values if value is not None]
    return "–".join(dict.fromkeys(map(number, (min(known), max(known))))) if known else ""


def grouped(every: Iterable[dict[str, Any]], by: str) -> dict[str, list[dict[str, Any]]]:
    """Groups layers by one of their values."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for layer in every:
        groups.setdefault(layer[by], []).append(layer)
    return groups


def few(values: Iterable[str], most: int = 4) -> str:
    """Joins values, and leaves out what is more than `most`.

    >>> few(["8", "16"]), few("abcdef")
    ('8, 16', 'a, b, c, d, …')
    """
    found = list(values)
    return ", ".join([*found[:most], *(["…"] if len(found) > most else [])])
