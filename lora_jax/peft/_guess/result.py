"""What `guess` returns: rows with the reasons for them, and what has no partner."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from ..._core.table import Table, Tabular
from .._row import Row
from .._sites import compiled, filled, find
from .groups import Index, Shape

Confidence = Literal["sure", "likely", "unsure"]


@dataclasses.dataclass(frozen=True)
class GuessedRow:
    """A row of a proposed mapping.

    Attributes:
      pattern: the pattern of the paths.
      row: the row.
      confidence: `"sure"` if values are equal, or if names agree and shapes and axes leave no other choice; `"likely"`
        if names or conventions decide; `"unsure"` if nothing does.
      reasons: what the choice rests on.
      paths: the leaves, by their numbers in the pattern.
    """

    pattern: str
    row: Row
    confidence: Confidence
    reasons: tuple[str, ...]
    paths: Mapping[Index, str]


@dataclasses.dataclass(frozen=True, repr=False)
class Guess(Tabular):
    """A proposed mapping, and how sure it is. Printed, it is a table.

    Attributes:
      rows: the rows.
      leaves: the leaves without a partner, with their shapes.
      tensors: the tensors without a partner, with their shapes.
    """

    rows: tuple[GuessedRow, ...]
    leaves: Mapping[str, Shape]
    tensors: Mapping[str, Shape]

    @property
    def mapping(self) -> dict[str, Row]:
        """The mapping, for `export` and `load`, with the rows that are unsure."""
        own: dict[str, dict[str, dict[str, str]]] = {}  # the leaves of each pattern, and their numbers
        for guessed in self.rows:
            numbers = {path: dict(zip("ijkl", map(str, index), strict=False)) for index, path in guessed.paths.items()}
            own[guessed.pattern] = own.get(guessed.pattern, {}) | numbers
        leaves = [*self.leaves, *(path for guessed in self.rows for path in guessed.paths.values())]
        result: dict[str, Row] = {}
        for guessed in self.rows:
            rows = compiled({guessed.pattern: guessed.row})
            matched = {path: found.segments for path in leaves if (found := find(path, rows)) is not None}
            same = all(one.row == guessed.row for one in self.rows if one.pattern == guessed.pattern)
            if same and matched == own[guessed.pattern]:
                result[guessed.pattern] = guessed.row
                continue
            # Leaves of one pattern that are unlike in torch, or whose numbers are written in another way, such as
            # `layer_00`; or the pattern also matches other leaves, as `fc{i}` does `fc_out`.
            for path in guessed.paths.values():
                result[path] = _at(guessed.row, own[guessed.pattern][path])
        return result

    @property
    def unsure(self) -> tuple[GuessedRow, ...]:
        """The rows to check."""
        return tuple(row for row in self.rows if row.confidence == "unsure")

    def _table(self) -> Table:
        head = ["leaf", "torch", "axes", "confidence", "because"]
        cells = [
            [
                guessed.pattern,
                " + ".join(f"{part.module}.{guessed.row.parameter}" for part in guessed.row.parts)
                + (f", tied {guessed.row.head}" if guessed.row.head else ""),
                guessed.row.axes or "",
                guessed.confidence,
                "; ".join(guessed.reasons),
            ]
            for guessed in self.rows
        ]
        notes: list[str] = []
        for what, names in (("leaves", self.leaves), ("tensors", self.tensors)):
            if names:
                notes += [*([""] if notes else []), f"{what} without a partner:"]
                notes += [f"  {name} {shape}" for name, shape in names.items()]
        return Table(head, cells, notes=notes)

    def __repr__(self) -> str:
        return str(self)


def _at(row: Row, names: Mapping[str, str]) -> Row:
    """Returns the row of one leaf of a pattern; the placeholders of a stack stay."""
    parts = []
    for part in row.parts:
        kept = {letter: names.get(letter, f"{{{letter}}}") for letter in "ijkl"}
        parts.append(dataclasses.replace(part, module=filled(part.module, kept)))
    return dataclasses.replace(row, parts=tuple(parts))
