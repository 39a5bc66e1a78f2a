"""Formats tables as text and HTML, and sizes in bytes."""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence

Cells = Sequence[str]


def as_text(head: Cells, rows: Sequence[Cells], *, numbers: Collection[str]) -> str:
    """Formats a table as text; columns in `numbers` are aligned to the right.

    >>> print(as_text(["name", "size"], [["a", "10"], ["b", "9"]], numbers={"size"}))
    name  size
    ────  ────
    a       10
    b        9
    """
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(row: Cells) -> str:
        cells = zip(head, row, widths, strict=True)
        return "  ".join(cell.rjust(width) if name in numbers else cell.ljust(width) for name, cell, width in cells)

    rule = "  ".join("─" * width for width in widths)
    return "\n".join([line(head).rstrip(), rule, *(line(row).rstrip() for row in rows)])


def as_html(head: Cells, rows: Sequence[Cells], notes: Sequence[str]) -> str:
    """Formats a table as HTML, with a paragraph for each note."""
    head, *rows = ([html.escape(cell) for cell in cells] for cells in (head, *rows))
    body = "".join(f"<tr><td>{'</td><td>'.join(cells)}</td></tr>" for cells in rows)
    below = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return f"<table><tr><th>{'</th><th>'.join(head)}</th></tr>{body}</table>{below}"


def size(count: int) -> str:
    """Formats a number of bytes with a unit.

    >>> size(512), size(1_500), size(90_900_000)
    ('512 B', '1.5 kB', '90.9 MB')
    """
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
