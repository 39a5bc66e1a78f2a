"""Results that are tables: as text, as HTML for notebooks, and for rich."""

from __future__ import annotations

import abc
import dataclasses
import html
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import jax
from jax.tree_util import DictKey

Cells = Sequence[str]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts, with lines below it.

    >>> print(Table(["name", "size"], [["a", "10"], ["b", "9"]], numbers={"size"}, notes=["2 rows"]).text())
    name  size
    ────  ────
    a       10
    b        9
    <BLANKLINE>
    2 rows

    Attributes:
      head: the name of each column.
      rows: the cells of each row.
      numbers: the names of columns that are aligned to the right.
      notes: lines below the table.
    """

    head: Cells
    rows: Sequence[Cells]
    numbers: Collection[str] = ()
    notes: Cells = ()

    def text(self) -> str:
        """Formats the table as text, in columns of a fixed width."""
        widths = [max(len(row[column]) for row in (self.head, *self.rows)) for column in range(len(self.head))]

        def line(row: Cells) -> str:
            cells = zip(self.head, row, widths, strict=True)
            padded = (text.rjust(width) if name in self.numbers else text.ljust(width) for name, text, width in cells)
            return "  ".join(padded).rstrip()

        lines = [line(self.head), "  ".join("─" * width for width in widths), *map(line, self.rows)]
        return "\n".join([*lines, "", *self.notes] if self.notes else lines)

    def html(self) -> str:
        """Formats the table as HTML in the colors of the page around it: without scripts, classes and colors."""
        # Jupyter aligns all cells to the right. The styles are in each cell, as some viewers remove style sheets.
        styles = [f"text-align:{'right' if name in self.numbers else 'left'};white-space:nowrap" for name in self.head]

        def row(tag: str, cells: Cells) -> str:
            pairs = zip(styles, cells, strict=True)
            texts = (f'<{tag} style="{style}">{html.escape(cell)}</{tag}>' for style, cell in pairs)
            return f"<tr>{''.join(texts)}</tr>"

        body = "".join(row("td", cells) for cells in self.rows)
        notes = "<br>".join(map(html.escape, self.notes))
        table = f"<table><thead>{row('th', self.head)}</thead><tbody>{body}</tbody></table>"
        return f'<div style="overflow-x:auto">{table}</div>' + (f"<p>{notes}</p>" if notes else "")

    def rich(self) -> Any:
        """Returns the text for rich, which must be installed, with a bold head. A narrow terminal wraps its lines."""
        from rich.text import Text

        text = Text(self.text())
        text.stylize("bold", 0, text.plain.index("\n"))
        return text


class Tabular(abc.ABC):
    """A result that is shown as a table: by `print`, in IPython and notebooks, and by `rich.print`."""

    __slots__ = ()

    @abc.abstractmethod
    def _table(self) -> Table:
        """Returns what is shown."""

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        del include, exclude  # IPython selects
        return {"text/plain": str(self), "text/html": self._repr_html_()}  # in a terminal, the text

    def __rich__(self) -> Any:
        return self._table().rich()


@runtime_checkable
class Row(Protocol):
    """A value of a `Report`, unless the report is a result of `jax.tree.map`."""

    def cells(self) -> dict[str, str]:
        """Returns the text of each column."""


RowT = TypeVar("RowT")


@jax.tree_util.register_pytree_with_keys_class
class Report(dict[str, RowT], Tabular):
    """A dict from paths to values, shown as a table with a row for each. To JAX, it is a pytree as any dict."""

    __slots__ = ()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        del cycle  # there is none
        printer.text(str(self))  # IPython's own text for a dict has precedence over `_repr_mimebundle_`

    def _table(self) -> Table:
        rows = {
            path: value.cells() if isinstance(value, Row) else {"value": str(value)} for path, value in self.items()
        }
        head = list(next(iter(rows.values()), {}))
        numbers = [name for name in head if name not in _TEXTS]
        return Table(["path", *head], [[path, *row.values()] for path, row in rows.items()], numbers)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[DictKey, RowT]], tuple[str, ...]]:
        """Returns the values by path, and the paths, sorted as JAX sorts those of a dict."""
        paths = tuple(sorted(self))
        return [(DictKey(path), self[path]) for path in paths], paths

    @classmethod
    def tree_unflatten(cls, paths: Sequence[str], values: Iterable[RowT]) -> Self:
        """Rebuilds a report."""
        return cls(zip(paths, values, strict=True))


_TEXTS = {"shape", "dtype", "axes", "kind", "used", "value"}  # the columns of reports that are not numbers


def size(count: int) -> str:
    """Formats a number of bytes with a unit.

    >>> size(512), size(1_500), size(90_900_000)
    ('512 B', '1.5 kB', '90.9 MB')
    """
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
