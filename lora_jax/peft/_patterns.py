"""Matches module names with the regular expressions of an untrusted configuration.

`re2` takes time linear in the length of a name, whatever the expression; Python's `re` can take forever.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import re2

_MAX_LENGTH = 10_000  # characters of an expression; those for one module are one name
_MAX_EXPRESSIONS = 1_000  # without those for one module
_REPEAT = re.compile(r"\{(?:,|[0-9]{4})")  # read as text, or too large
_LITERAL = re.compile(r"\^?(?:[\w-]|\\[^\w])*")  # such as `export` writes


class Patterns:
    r"""Values by the pattern of a module's name, as in PEFT: the first that matches the name, or its end after a dot.

    A pattern matches as in `re.match(rf"(.*\.)?({pattern})$", name)`.

    >>> ranks = Patterns({"^layers": 1, "up|down": 2, "(a+)+b": 3})
    >>> [ranks.find(name, 8) for name in ("layers", "layers.0.down", "layers.0.own", "a" * 99)]
    [1, 2, 8, 8]
    """

    def __init__(self, patterns: Mapping[str, Any]) -> None:
        """Compiles the patterns. Those without operators, which may be as many as modules, are looked up."""
        self._values = list(patterns.values())
        self._whole, self._ends = dict[str, int](), dict[str, int]()
        self._others: list[tuple[int, Any]] = []
        for index, pattern in enumerate(patterns):
            if _LITERAL.fullmatch(pattern):
                text = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^"), flags=re.DOTALL)
                (self._whole if pattern.startswith("^") else self._ends).setdefault(text, index)
            else:
                self._others.append((index, _compiled(rf"(?:.*\.)?(?:{pattern})$")))

    def find(self, name: str, default: Any) -> Any:
        """Returns the value of the first pattern that matches a name."""
        none = len(self._values)
        first = min(self._whole.get(name, none), *(self._ends.get(end, none) for end in ends(name)))
        first = min([first, *(index for index, pattern in self._others if index < first and pattern.match(name))])
        return self._values[first] if first < none else default


def ends(name: str) -> list[str]:
    """Returns the name of a module and its ends after a dot."""
    parts = name.split(".")
    return [".".join(parts[at:]) for at in range(len(parts))]


def fullmatch(pattern: str, name: str) -> bool:
    """Whether a pattern matches a whole name, as `re.fullmatch`."""
    return _compiled(pattern).fullmatch(name) is not None


def problems(patterns: Iterable[str]) -> list[tuple[str, str]]:
    """Returns the patterns that cannot be matched, with the reason."""
    others = [pattern for pattern in patterns if not _LITERAL.fullmatch(pattern)]
    found = [(pattern, reason) for pattern in others[:_MAX_EXPRESSIONS] if (reason := _problem(pattern))]
    if len(others) > _MAX_EXPRESSIONS:
        found.append((others[_MAX_EXPRESSIONS], f"is one of {len(others):,}; at most {_MAX_EXPRESSIONS:,} are read"))
    return found


def _problem(pattern: str) -> str | None:
    if len(pattern) > _MAX_LENGTH:
        return f"has {len(pattern):,} characters; at most {_MAX_LENGTH:,} are read"
    if _REPEAT.search(pattern):
        return "is not a regular expression that is supported (it has a repetition without a start, or over 999)"
    try:
        _compiled(pattern)
    except re2.error as error:
        return f"is not a regular expression that is supported ({_text(error)})"
    return None


@functools.lru_cache(maxsize=_MAX_EXPRESSIONS)
def _compiled(pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    return re2.compile(pattern, options)


def _text(error: Exception) -> str:
    [reason] = error.args
    return reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
