"""Tables of figures: the benchmarks print and store them, and `page.py` renders what is stored. Does not import JAX."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Value = float | list[float] | str | None
UNITS = {"G": 1e9, "M": 1e6, "GB": 1e9, "MB": 1e6, "s": 1.0, "ms": 1e-3, "": 1.0}


class Ratio(NamedTuple):
    """A ratio of two figures, and half its interquartile range."""

    value: float
    spread: float = 0.0

    def __str__(self) -> str:
        return f"× {self.value:.2f} ± {self.spread:.2f}" if self.spread else f"× {self.value:.3f}"


def ratio(value: Value, reference: Value) -> Ratio | None:
    """Returns the ratio of figures. Times of interleaved runs are compared one by one: their noise is similar."""
    if not isinstance(value, list) or not isinstance(reference, list) or not value:
        numbers = isinstance(value, float | int) and isinstance(reference, float | int)
        return Ratio(value / reference) if numbers else None  # type: ignore[operator]
    ratios = [one / other for one, other in zip(value, reference, strict=True)]
    if len(ratios) < 4:
        return Ratio(statistics.median(ratios), (max(ratios) - min(ratios)) / 2)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Ratio(middle, (high - low) / 2)


@dataclasses.dataclass(frozen=True)
class Table:
    """Figures of a benchmark.

    Attributes:
      title: what the rows have in common.
      columns: the unit of each column. After "×", only the reference has absolute figures, and the others ratios to it.
      rows: figures by row and column: FLOPs, bytes, seconds or lists of seconds of interleaved runs; or text. A figure
        that is None or missing is left empty.
      across: whether the reference is the first column, and not the first row.
    """

    title: str
    columns: dict[str, str]
    rows: dict[str, dict[str, Any]]
    across: bool = False

    def measured(self) -> Table:
        """Returns the table without columns of which nothing was measured, such as times with `--steps 0`."""
        found = {column for row in self.rows.values() for column, value in row.items() if value not in (None, [], "")}
        columns = {column: unit for column, unit in self.columns.items() if column in found}
        return dataclasses.replace(self, columns=columns)

    def is_time(self, column: str) -> bool:
        """Returns whether a column has times, which depend on the machine; all other figures do not."""
        return self.columns[column].removeprefix("×") in ("s", "ms")

    def relative(self, row: str, column: str) -> Ratio | None:
        """Returns a figure relative to the reference; None if one of the two is missing or text."""
        reference = (row, next(iter(self.columns))) if self.across else (next(iter(self.rows)), column)
        return ratio(self.rows[row].get(column), self.rows[reference[0]].get(reference[1]))

    def cell(self, row: str, column: str) -> str:
        """Returns a figure as text."""
        value, unit = self.rows[row].get(column), self.columns[column]
        is_reference = column == next(iter(self.columns)) if self.across else row == next(iter(self.rows))
        if unit.startswith("×") and not is_reference and (found := self.relative(row, column)):
            return str(found)
        return "" if value in (None, []) else value if isinstance(value, str) else absolute(value, unit)

    def markdown(self) -> str:
        """Returns the table without its title; times are in italics."""
        heads = [f"*{column}*" if self.is_time(column) else column for column in self.columns]
        lines = [[row, *(self.cell(row, column) for column in self.columns)] for row in self.rows]
        return aligned([["", *heads], *lines])

    def __str__(self) -> str:
        return f"### {self.title}\n\n{self.markdown()}"


def absolute(value: float | list[float], unit: str) -> str:
    """Returns a figure with its unit, in three digits or more; that of a list is its median."""
    unit, number = unit.removeprefix("×"), statistics.median(value) if isinstance(value, list) else value
    if not unit:
        return str(number) if isinstance(number, int) else f"{number:.4f}"
    scaled = number / UNITS[unit]
    return f"{scaled:.{2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0}f} {unit}"


def plural(adapters: int) -> str:
    """Returns "1 adapter", "2 adapters", and so on."""
    return f"{adapters} adapter{'s' * (adapters > 1)}"


def aligned(lines: list[list[str]]) -> str:
    """Returns an aligned Markdown table."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    rows = [f"| {' | '.join(line)} |" for line in padded]
    return "\n".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]])


def processor() -> str:
    """Returns the name of the processor, and the number of its cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser of the options that all benchmarks have."""
    found = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    found.add_argument("--json", type=Path, help="store the figures here")
    return found


def publish(tables: Iterable[Table], path: Path | None, *packages: str, **versions: str) -> None:
    """Prints tables as they are measured; stores them with the machine and versions, those of `packages` too."""
    done = []
    for table in (table.measured() for table in tables):
        if table.columns:
            print(f"\n{table}", flush=True)
            done.append(dataclasses.asdict(table))
    if path:
        names = ("jax", "jaxlib", "flax", *packages)
        found = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
        record = {
            "command": command(sys.argv),
            "date": datetime.date.today().isoformat(),
            "machine": processor(),
            "versions": found | versions,
            "tables": done,
        }
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def command(argv: list[str]) -> str:
    """Returns the command without its paths, and without `--json`."""
    words: Iterator[str] = iter(argv[1:])
    kept = [word for word in words if word != "--json" or next(words) is None]
    script = f"benchmarks/{Path(argv[0]).name}"
    return shlex.join(["python", script, *("PYTHON" if "/" in word else word for word in kept)])


def read(path: Path) -> tuple[dict[str, Any], list[Table]]:
    """Returns what `publish` has stored, and its tables."""
    record = json.loads(path.read_text())
    return record, [Table(**table) for table in record["tables"]]


def marks(name: str) -> tuple[str, str]:
    """Returns what begins and ends the part of a page that a benchmark writes."""
    return f"<!-- written by benchmarks/{name} -->", f"<!-- end of what benchmarks/{name} writes -->"


def fill(page: Path, name: str, text: str) -> None:
    """Replaces what is between the marks of a benchmark in a page."""
    begin, end = marks(name)
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}")
