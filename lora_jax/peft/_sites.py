"""Resolves a mapping: which torch modules hold a leaf, and which of its outputs and layers each holds."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from .._core.axes import axes_with
from .._errors import SpecError
from ._layout import Layout, bounds, default_axes
from ._row import Part, Row

MappingOfRows = Mapping[str, Row]

Rows = list[tuple[re.Pattern[str], Row]]  # the rows of a mapping, compiled

_PLACEHOLDER = re.compile(r"\{(\*\*|[A-Za-z]\w*)\}")


@dataclasses.dataclass(frozen=True)
class Site:
    """The part of a leaf that one torch module holds.

    Attributes:
      path: the leaf.
      module: the name of the torch module; of a parameter without one, that of its module and its own.
      layout: the axes of the leaf.
      part: the torch module's part of the row.
      index: index along the batch axes.
      first: the first output of the leaf, flattened in torch's order, that the module has.
      last: the one after its last output.
    """

    path: str
    module: str
    layout: Layout
    part: Part
    index: tuple[Any, ...]
    first: int
    last: int

    @property
    def outputs(self) -> slice:
        """The outputs of the leaf that the module has."""
        return slice(self.first, self.last)

    def of_module(self, array: Any) -> Any:
        """Returns the leaf's outputs of an array of all outputs of the module, the last axis."""
        first = 0 if self.part.of is None else self.part.of[0]
        return array[..., first : first + self.last - self.first]

    @property
    def row(self) -> Row:
        """The row of the leaf."""
        return self.layout.row


class Found(NamedTuple):
    """The row of a leaf, and the segments of the path that its placeholders stand for."""

    row: Row
    segments: dict[str, str]


def compiled(mapping: Any) -> Rows:
    """Compiles the patterns of a mapping.

    Raises:
      SpecError: if it is not a mapping from patterns to rows.
    """
    if not isinstance(mapping, Mapping) or not all(isinstance(row, Row) for row in mapping.values()):
        raise SpecError(
            f"Expected a mapping from paths to rows, such as `peft.presets.bert()`; got {type(mapping).__name__}.\n"
            '  A row is made by `peft.linear("the.torch.module")`, `embedding`, `conv` or `vector`.'
        )
    return [(_matcher(pattern), row) for pattern, row in mapping.items()]


def without_own_heads(rows: Rows, leaves: Mapping[str, Any]) -> Rows:
    """Returns the rows without heads that are leaves of the tree, and so are not tied to a table."""
    heads = {row.head for _, row in rows} - {None}
    found = [one for path in leaves if heads and (one := find(path, rows)) is not None]
    kernels = [one for one in found if one.row.kind == "linear" and not _free(one.row.parts[0].module, one.segments)]
    own = {filled(part.module, one.segments) for one in kernels for part in one.row.parts}
    return [(pattern, dataclasses.replace(row, head=None) if row.head in own else row) for pattern, row in rows]


@functools.cache
def _matcher(pattern: str) -> re.Pattern[str]:
    """Returns the expression for the paths of a pattern, with a slash at their end.

    `params/`, the collection of Linen, may precede the path.
    """
    seen: set[str] = set()

    def group(name: str) -> str:
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>[^/]+)"

    expression = r"(?:params/)?"
    for segment in pattern.split("/"):
        if segment == "{**}":
            expression += r"(?:(?P<_rest>.+)/)?"
        elif segment == "**":
            expression += r"(?:.+/)?"
        else:
            pieces = _PLACEHOLDER.split(segment)  # text, name, text, …
            expression += "".join(
                group(piece) if at % 2 else re.escape(piece).replace(r"\*", "[^/]*") for at, piece in enumerate(pieces)
            )
            expression += "/"
    return re.compile(expression)


def find(path: str, rows: Rows) -> Found | None:
    """Returns the first row that matches a path."""
    for pattern, row in rows:
        if match := pattern.fullmatch(f"{path}/"):
            return Found(row, {name: text or "" for name, text in match.groupdict().items()})
    return None


def sites(path: str, shape: tuple[int, ...], found: Found, axes: str | None = None) -> list[Site] | str:
    """Returns the torch modules of a leaf, or what is wrong.

    Args:
      path: the leaf.
      shape: of the leaf.
      found: the row of the leaf.
      axes: the roles of the adapter; None if they are those of the row.
    """
    row = found.row
    free = list(dict.fromkeys(name for part in row.parts for name in _free(part.module, found.segments)))
    expected = default_axes(row, len(shape), len(free))
    if expected is None:
        stack = f", with {len(free)} batch axes for {', '.join(free)}" if free else ""
        return f"its shape is {shape}{stack}, and its row has axes {row.axes!r}; state its axes in the row"
    if axes and axes != expected:
        return f"the adapter has axes {axes!r}, and its row {expected!r}"
    batch = [shape[axis] for axis in axes_with(expected, "b")]
    experts = batch[0 if row.experts_first else -1] if len(batch) > len(free) else None
    layout = Layout(row, expected, shape, experts)
    for order, roles in ((row.inputs, "i"), (row.outputs, "o")):
        if order is not None and len(order) != expected.count(roles):
            return f"its row orders {len(order)} axes, and axes {expected!r} have {expected.count(roles)} {roles!r}"
    if (ends := bounds(row.parts, layout.d_out)) is None:
        return f"it has {layout.d_out} outputs, which its row does not divide into {len(row.parts)} parts"
    for part, (first, last) in zip(row.parts, ends, strict=True):
        if part.interleaved is not None and (last - first) % part.interleaved:
            return f"{part.module!r} has {last - first} outputs, which are not heads of size {part.interleaved}"
        if part.of is not None and part.of[0] + last - first > part.of[1]:
            return f"{part.module!r} has {last - first} outputs from {part.of[0]}, more than its {part.of[1]}"
    return list(_sites(path, layout, found.segments, free, ends))


def _sites(
    path: str, layout: Layout, segments: dict[str, str], free: list[str], ends: list[tuple[int, int]]
) -> Iterator[Site]:
    for index in itertools.product(*map(range, layout.batch[: len(free)])):
        names = segments | dict(zip(free, map(str, index), strict=True))
        for part, (first, last) in zip(layout.row.parts, ends, strict=True):
            module = filled(part.module, names)
            if layout.row.is_parameter:
                module += f".{layout.row.parameter}"
            yield Site(path, module, layout, part, index, first, last)


def _free(module: str, segments: Mapping[str, str]) -> list[str]:
    """Returns the placeholders of a module's name that the path does not have."""
    names = [name for name in _PLACEHOLDER.findall(module) if name not in segments]
    return [name for name in names if name != "**"]


def filled(module: str, names: Mapping[str, str]) -> str:
    """Returns the name of a torch module with its placeholders replaced."""
    rest = names.get("_rest", "").replace("/", ".")
    module = module.replace("{**}.", f"{rest}." if rest else "").replace("{**}", rest)
    return _PLACEHOLDER.sub(lambda match: names[match[1]], module)
