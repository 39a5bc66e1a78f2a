"""Groups parameters of one shape whose names differ by numbers only, such as those of all layers."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Index = tuple[int, ...]
Shape = tuple[int, ...]

# Torch's names are written with numbers, and so have none with zeros in front.
_NUMBERED = {"/": re.compile(r"(.*?)(\d+)"), ".": re.compile(r"(.*?(?<!\d))(0|[1-9]\d*)")}
_OF_LAYERS = ("layer", "layers", "block", "blocks", "h")
_LETTERS = "ijkl"


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters of one shape whose names differ by numbers only.

    Attributes:
      name: the common name, with `{i}`, `{j}`, … in place of the numbers.
      shape: of each.
      members: the names by their numbers, in order.
    """

    name: str
    shape: Shape
    members: Mapping[Index, str]

    def single(self) -> Iterator[Group]:
        """Yields a group for each member."""
        for name in self.members.values():
            yield Group(name, self.shape, {(): name})


def groups(shapes: Mapping[str, Shape], separator: str) -> list[Group]:
    """Groups parameters.

    >>> [(group.name, len(group.members)) for group in groups({"h.0.up": (4, 2), "h.1.up": (4, 2), "x": (3,)}, ".")]
    [('h.{i}.up', 2), ('x', 1)]
    """
    found: dict[tuple[str, Shape], dict[Index, str]] = {}
    for segments, template, index in _templates(
        [tuple(name.split(separator)) for name in shapes], _NUMBERED[separator]
    ):
        name = separator.join(segments)
        letters = iter(_LETTERS)
        common = separator.join(part if at is None else f"{part}{{{next(letters)}}}" for part, at in template)
        found.setdefault((common, shapes[name]), {})[index] = name
    return [Group(name, shape, dict(sorted(members.items()))) for (name, shape), members in found.items()]


Template = tuple[tuple[str, "int | None"], ...]  # the text of each segment, and the number after it


def _templates(
    names: Sequence[tuple[str, ...]], numbered: re.Pattern[str]
) -> Iterator[tuple[tuple[str, ...], Template, Index]]:
    numbers = _numbers(names, numbered)
    for segments in names:
        template: list[tuple[str, int | None]] = []
        for at, segment in enumerate(segments):
            template.append(numbers.get(segments[: at + 1], (segment, None)))
        index = tuple(number for _, number in template if number is not None)
        yield (segments, tuple(template), index) if len(index) <= len(_LETTERS) else (segments, _plain(segments), ())


def _plain(segments: Iterable[str]) -> Template:
    return tuple((segment, None) for segment in segments)


def _numbers(names: Sequence[tuple[str, ...]], numbered: re.Pattern[str]) -> dict[tuple[str, ...], tuple[str, int]]:
    """Returns the segments that end in a number of a layer, by their path: their text and the number."""
    below: dict[tuple[str, ...], set[tuple[str, ...]]] = collections.defaultdict(set)
    families: dict[tuple[tuple[str, ...], str], dict[int, tuple[str, ...]]] = collections.defaultdict(dict)
    for segments in names:
        for at, segment in enumerate(segments):
            path = segments[: at + 1]
            below[path].add(segments[at + 1 :])
            if match := numbered.fullmatch(segment):
                families[segments[:at], match[1]][int(match[2])] = path
    found: dict[tuple[str, ...], tuple[str, int]] = {}
    for (_, text), paths in families.items():
        same = len({frozenset(below[path]) for path in paths.values()}) == 1
        counted = sorted(paths) == list(range(len(paths)))
        layers = text.rstrip("_") in _OF_LAYERS and 0 in paths
        if not text or layers or (counted and same and len(paths) > 1):
            found |= {path: (text, number) for number, path in paths.items()}
    return found


def shape_of(value: Any) -> Shape:
    """Returns the shape of an array, or of a shape."""
    return tuple(int(size) for size in (value if isinstance(value, list | tuple) else value.shape))
