"""Matches module names with the regular expressions of an untrusted configuration, in bounded time.

Python's `re` tries one way after another: `(a+)+b` takes time exponential in the length of a name. Here an expression
is a function from all positions where it may start to all positions where it may end, as bits of an integer, so no
position is tried twice. What matches is the same; which group matched what is not known, and not needed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

_MAX_STEPS = 200_000  # of all patterns of a configuration, for one module; a step takes 0.1 µs at most
_MAX_DEPTH = 50  # of groups
_LENGTH = 100  # of a module's name, to count steps

_LITERAL = re.compile(r"\^?(?:[\w-]|\\[^\w])*")  # such as `export` writes
_TOKEN = re.compile(r"\((?:\?(?:P<\w+>|[:=!]))?|\[\^?\]?(?:\\.|[^\]\\])*\]|\\[^0-9xuUN]|[^\\\[]", re.DOTALL)
_REPEAT = re.compile(r"(?:([*+?])|\{(?!\})([0-9]*)(,?)([0-9]*)\})\??")
_ANCHORS = ("^", "$", r"\A", r"\Z", r"\b", r"\B")


class _Name(NamedTuple):
    """The name of a module, and for each of its characters the positions that have it."""

    text: str
    places: dict[str, int]


class _Pattern(NamedTuple):
    """From the positions where it starts to those where it can end, and how many steps that takes at most."""

    ends: Callable[[_Name, int], int]
    steps: int


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
        self._others: list[tuple[int, _Pattern]] = []
        for index, pattern in enumerate(patterns):
            if _LITERAL.fullmatch(pattern):
                text = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^"), flags=re.DOTALL)
                (self._whole if pattern.startswith("^") else self._ends).setdefault(text, index)
            else:
                self._others.append((index, _compiled(pattern)))

    def find(self, name: str, default: Any) -> Any:
        """Returns the value of the first pattern that matches a name."""
        none = len(self._values)
        first = min(self._whole.get(name, none), *(self._ends.get(end, none) for end in ends(name)))
        known = _name(name)
        starts = 1 | known.places.get(".", 0) << 1
        for index, pattern in self._others:
            if index < first and pattern.ends(known, starts) >> len(name):
                first = index
        return self._values[first] if first < none else default


def ends(name: str) -> list[str]:
    """Returns the name of a module and its ends after a dot."""
    parts = name.split(".")
    return [".".join(parts[at:]) for at in range(len(parts))]


def fullmatch(pattern: str, name: str) -> bool:
    """Whether a pattern matches a whole name, as `re.fullmatch`."""
    return bool(_compiled_once(pattern).ends(_name(name), 1) >> len(name))


def problems(patterns: Iterable[str]) -> list[tuple[str, str]]:
    """Returns the patterns that cannot be matched, with the reason."""
    found, steps = [], 0
    for pattern in patterns:
        try:
            steps += 0 if _LITERAL.fullmatch(pattern) else _compiled(pattern).steps
        except ValueError as error:
            found.append((pattern, str(error)))
            steps += len(pattern)  # reading it took time, too
        if steps > _MAX_STEPS:
            why = f"may take {steps:,} steps for each module, with those before it; at most {_MAX_STEPS:,} are allowed"
            return [*found, (pattern, why)]
    return found


def _compiled(pattern: str) -> _Pattern:
    if len(pattern) > _MAX_STEPS:
        raise ValueError(f"has {len(pattern):,} characters; at most {_MAX_STEPS:,} are allowed")
    reader = _Reader(pattern)
    compiled = reader.alternatives(0)
    if reader.at < len(pattern):
        raise ValueError(f"is not a regular expression (it has an unbalanced ')' at {reader.at})")
    return compiled


_compiled_once = functools.lru_cache(maxsize=2)(_compiled)


@functools.lru_cache(maxsize=16)
def _name(text: str) -> _Name:
    places: dict[str, int] = {}
    for at, character in enumerate(text):
        places[character] = places.get(character, 0) | 1 << at
    return _Name(text, places)


class _Reader:
    """Reads an expression from the left."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.at = pattern, 0

    def alternatives(self, depth: int) -> _Pattern:
        """Reads alternatives, up to a closing parenthesis or the end."""
        if depth > _MAX_DEPTH:
            raise ValueError(f"has groups nested more than {_MAX_DEPTH} deep")
        found = [self._sequence(depth)]
        while self.pattern.startswith("|", self.at):
            self.at += 1
            found.append(self._sequence(depth))
        return found[0] if len(found) == 1 else _either(found)

    def _sequence(self, depth: int) -> _Pattern:
        parts = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            parts.append(self._repeated(depth))
        return _in_turn(parts)

    def _repeated(self, depth: int) -> _Pattern:
        token = _TOKEN.match(self.pattern, self.at)
        if token is None or _REPEAT.match(self.pattern, self.at):
            raise ValueError(
                f"is not a regular expression that is supported (it has {self.pattern[self.at : self.at + 4]!r} at "
                f"{self.at})"
            )
        self.at = token.end()
        if token[0].startswith("("):
            part = self._group(token[0], depth)
        else:
            part = _anchor(token[0]) if token[0] in _ANCHORS else _any_of(token[0])
        if repeat := _REPEAT.match(self.pattern, self.at):
            self.at = repeat.end()
            if _REPEAT.match(self.pattern, self.at):
                raise ValueError(f"is not a regular expression that is supported (it repeats twice at {self.at})")
            part = _repeat(part, *_counts(repeat))
        return part

    def _group(self, opening: str, depth: int) -> _Pattern:
        if opening == "(" and self.pattern.startswith("?", self.at):
            unsupported = self.pattern[self.at - 1 : self.at + 3]
            raise ValueError(f"is not a regular expression that is supported (it has {unsupported!r})")
        part = self.alternatives(depth + 1)
        if not self.pattern.startswith(")", self.at):
            raise ValueError("is not a regular expression (a ')' is missing)")
        self.at += 1
        return part if opening[-1] not in "=!" else _lookahead(part, opening.endswith("="))


def _counts(repeat: re.Match[str]) -> tuple[int, int | None]:
    sign, least, comma, most = repeat.groups()
    if sign:
        return (1 if sign == "+" else 0), (1 if sign == "?" else None)
    low = int(least or 0)
    high = int(most) if most else (None if comma else low)
    if high is not None and high < low:
        raise ValueError(f"is not a regular expression (it has {repeat[0]!r})")
    return low, high


def _any_of(token: str) -> _Pattern:
    """Returns the pattern of one character: itself, an escape or a set."""
    if token == ".":
        return _Pattern(lambda name, at: (at & ((1 << len(name.text)) - 1) & ~name.places.get("\n", 0)) << 1, 1)
    if len(token) == 1:
        return _Pattern(lambda name, at: (at & name.places.get(token, 0)) << 1, 1)
    if re.search(r"^\[\^?\[|--|&&|~~|\|\|", token):  # Python may read these sets otherwise one day, and warns
        raise ValueError(f"is not a regular expression that is supported (it has the set {token[:20]!r})")
    try:
        allowed = functools.cache(re.compile(token).fullmatch)
    except re.error as error:
        raise ValueError(f"is not a regular expression ({error})") from error

    def ends(name: _Name, at: int) -> int:
        return (at & sum(places for character, places in name.places.items() if allowed(character))) << 1

    return _Pattern(ends, 20)


def _anchor(token: str) -> _Pattern:
    test = re.compile(token)

    def ends(name: _Name, at: int) -> int:
        return sum(1 << place for place in _places(at) if test.match(name.text, place))

    return _Pattern(ends, _LENGTH)


def _in_turn(parts: list[_Pattern]) -> _Pattern:
    def ends(name: _Name, at: int) -> int:
        for part in parts:
            if not (at := part.ends(name, at)):
                break
        return at

    return _Pattern(ends, 1 + sum(part.steps for part in parts))


def _either(parts: list[_Pattern]) -> _Pattern:
    def ends(name: _Name, at: int) -> int:
        found = 0
        for part in parts:
            found |= part.ends(name, at)
        return found

    return _Pattern(ends, 1 + sum(part.steps for part in parts))


def _repeat(part: _Pattern, least: int, most: int | None) -> _Pattern:
    def ends(name: _Name, at: int) -> int:
        enough = len(name.text) + 1  # more repetitions than characters change nothing
        for _ in range(min(least, enough)):
            at = part.ends(name, at) if at else 0
        found = new = at
        for _ in range(enough if most is None else min(most - least, enough)):
            new = part.ends(name, new) & ~found if new else 0
            found |= new
        return found

    extra = _LENGTH if most is None else min(most - least, _LENGTH)
    return _Pattern(ends, 20 + part.steps * (min(least, _LENGTH) + extra))


def _lookahead(part: _Pattern, wanted: bool) -> _Pattern:
    def ends(name: _Name, at: int) -> int:
        return sum(1 << place for place in _places(at) if bool(part.ends(name, 1 << place)) == wanted)

    return _Pattern(ends, _LENGTH * part.steps)


def _places(at: int) -> Iterator[int]:
    """Yields the positions of an integer's bits."""
    while at:
        yield (at & -at).bit_length() - 1
        at &= at - 1
