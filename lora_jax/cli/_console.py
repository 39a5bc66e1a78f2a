"""The streams: results on stdout; errors, notes and progress bars on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ._report import Report, printable

_WIDE = 240  # columns where stdout is not a terminal: a table is not folded


def print_report(report: Report) -> None:
    """Prints a report on stdout."""
    width = None if sys.stdout.isatty() else _WIDE
    console = Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)
    for shown in report.shown():
        console.print(printable(shown) if isinstance(shown, str) else shown)


def print_json(data: Any) -> None:
    """Prints JSON on stdout. Values that JSON does not have, such as infinities, are errors."""
    print(json.dumps(data, indent=2, allow_nan=False))


def error(text: str) -> None:
    """Prints an error or a note on stderr. Lines after the first are details, and are indented."""
    first, *rest = map(printable, text.splitlines() or [""])
    details = (line if line.startswith(" ") else f"  {line}" for line in rest)
    print("\n".join([f"lora-jax: {first}", *details]), file=sys.stderr)


@contextlib.contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar on stderr while the context is open, if stderr is a terminal."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)

        def step(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield step
