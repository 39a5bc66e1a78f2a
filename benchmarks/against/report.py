"""The figures as tables, and as a part of a page."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import sizes

from . import BY_HAND, ENVIRONMENTS

OWN = "lora_jax"
YES, NO_SUCH = "yes", "–"


class Ratio(NamedTuple):
    """A figure over that of LoRA by hand in the same environment, and half the middle half of what it varies by."""

    value: float
    spread: float = 0.0


Row = dict[str, Any]  # the figures of one method, as in JSON
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "steps": ("step", lambda s: f"{1e3 * s:.0f} ms"),
    "operations": ("operations", lambda n: f"{n / 1e9:.3f} G"),
    "temporary": ("temporary", lambda n: f"{n / 1e6:.2f} MB"),
    "optimizer": ("optimizer", lambda n: f"{n / 1e6:.2f} MB"),
    "compile": ("trace + lower + compile", lambda s: f"{s:.1f} s"),
}
# By how much a ratio must be lower to count: the first three are exact, the others vary from run to run.
MARGIN = {"operations": 5e-4, "temporary": 5e-3, "optimizer": 5e-4, "steps": 0.05, "compile": 0.15}


def ratio(column: str, row: Row, reference: Row) -> Ratio | None:
    """Of one figure; times are compared step by step, since those of one turn met the same machine."""
    if row[column] is None or reference[column] is None:
        return None
    if not isinstance(row[column], list):
        return Ratio(row[column] / reference[column])
    ratios = [one / other for one, other in zip(row[column], reference[column], strict=True)]
    if len(ratios) < 4:
        return Ratio(statistics.median(ratios), (max(ratios) - min(ratios)) / 2)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Ratio(middle, (high - low) / 2)


def cases(results: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Row | str]]]:
    """Environment, title and rows of each case that has its reference."""
    for environment, found in results["environments"].items():
        for title, rows in found.get("cases", {}).items():
            if isinstance(rows.get(BY_HAND), dict):
                yield environment, title, rows


def aligned(lines: list[list[str]]) -> str:
    """A table in Markdown that reads well as text, too."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    rows = [f"| {' | '.join(line)} |" for line in padded]
    return "\n".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]])


def costs(rows: dict[str, Row | str]) -> str:
    """The table of one case: LoRA by hand as it is, the others as ratios to it."""
    reference = rows[BY_HAND]
    lines = [["", *(head for head, _ in COLUMNS.values())]]
    for name, row in rows.items():
        if isinstance(row, str):
            lines.append([name, "cannot", *[""] * (len(COLUMNS) - 1)])
            continue
        cells = []
        for column, (_, show) in COLUMNS.items():
            its = ratio(column, row, reference)
            value = statistics.median(row[column]) if isinstance(row[column], list) else row[column]
            if its is None:
                cells.append("–")
            elif row is reference:
                cells.append(show(value))
            else:
                cells.append(f"× {its.value:.3f}" + (f" ± {its.spread:.3f}" if its.spread else ""))
        lines.append([name, *cells])
    reasons = [f"- {name}: {row}" for name, row in rows.items() if isinstance(row, str)]
    return "\n".join([aligned(lines), *([""] if reasons else []), *reasons])


def abilities(results: dict[str, Any]) -> str:
    """The table of what each library adapts, and below it the reasons why not."""
    found = {
        name: its
        for environment in results["environments"].values()
        for name, its in environment.get("capabilities", {}).items()
    }
    if not found:
        return "Not tried."
    reasons: dict[str, int] = {}
    lines = [["", *found]]
    for what in next(iter(found.values())):
        cells = []
        for its in found.values():
            answer = its.get(what, NO_SUCH)
            number = reasons.setdefault(answer, len(reasons) + 1) if answer not in (YES, NO_SUCH) else None
            cells.append(f"no ({number})" if number else answer)
        lines.append([what, *cells])
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([aligned(lines), "", *notes])


def behind(results: dict[str, Any]) -> list[str]:
    """Where another library has a lower ratio to LoRA by hand than this one, by more than what the figure varies by."""
    own = {title: rows for environment, title, rows in cases(results) if environment == "jax"}
    return [
        f"{head}, {title}: {peer.name} × {theirs.value:.3f}, {OWN} × {ours.value:.3f}"
        for environment, title, rows in cases(results)
        for peer in ENVIRONMENTS[environment]
        for column, (head, _) in COLUMNS.items()
        if (theirs := figure(rows, peer.name, column)) and (ours := figure(own.get(title, {}), OWN, column))
        if ours.value - ours.spread > (theirs.value + theirs.spread) * (1 + MARGIN[column])
    ]


def figure(rows: dict[str, Row | str], name: str, column: str) -> Ratio | None:
    """The ratio of a method that could be measured."""
    row = rows.get(name)
    return ratio(column, row, rows[BY_HAND]) if isinstance(row, dict) else None


def losses(results: dict[str, Any]) -> str:
    """The first loss of LoRA by hand in every environment: one number, if they measure the same thing."""
    found: dict[str, list[str]] = {}
    for _, title, rows in cases(results):
        found.setdefault(title, []).append(f"{rows[BY_HAND]['loss']:.5f}")
    each = "; ".join(f"{title}: {', '.join(values)}" for title, values in found.items())
    return f"The first loss of LoRA by hand in each environment: {each}."


def tables(results: dict[str, Any]) -> str:
    """All that was found, as text."""
    parts = []
    for environment, title, rows in cases(results):
        parts.append(f"### {heading(results, environment, title)}\n\n{costs(rows)}")
    for environment, found in results["environments"].items():
        if "missing" in found:
            names = ", ".join(peer.name for peer in ENVIRONMENTS[environment])
            parts.append(f"{names}: not measured, {found['missing']}")
    parts.append(f"### What each adapts\n\n{abilities(results)}")
    lines = [f"- {line}" for line in behind(results)] or ["Nowhere."]
    return "\n\n".join([*parts, "### Where another has a lower ratio", "\n".join(lines)])


def heading(results: dict[str, Any], environment: str, title: str) -> str:
    """The title of a table, with the versions that matter."""
    versions = results["environments"][environment]["versions"]
    library = f"PyTorch {versions['torch']}" if environment == "torch" else f"JAX {versions['jax']}"
    return f"{title[0].upper()}{title[1:]}, {library}"


def document(results: dict[str, Any], picture: str) -> str:
    """The part of the page: with what it was measured, the picture, the tables."""
    size = dataclasses.asdict(getattr(sizes, results["size"].upper()))
    versions = [
        "- " + ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        for found in results["environments"].values()
        if "versions" in found
    ]
    about = [
        "```sh",
        f"make peers SIZE={results['size']}    # {results['command']}",
        "```",
        "",
        f"Machine: {results['machine']}. Sizes: {', '.join(f'{name} {value}' for name, value in size.items())}.",
        "",
        "Versions, one line for each environment:",
        "",
        *versions,
        "",
        losses(results),
        "",
        f"![Ratios to LoRA by hand]({picture})",
    ]
    return "\n".join(about) + "\n\n" + tables(results)
