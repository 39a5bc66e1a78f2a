"""Tables of the figures, and a page section."""

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
    """The ratio of a figure to LoRA by hand in the same environment, and half its interquartile range."""

    value: float
    spread: float = 0.0


Row = dict[str, Any]  # the figures of one method, from JSON
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "steps": ("step", lambda s: f"{1e3 * s:.0f} ms"),
    "flops": ("FLOPs", lambda n: f"{n / 1e9:.3f} G"),
    "temporary": ("temporary", lambda n: f"{n / 1e6:.2f} MB"),
    "optimizer": ("optimizer", lambda n: f"{n / 1e6:.2f} MB"),
    "compile": ("trace + lower + compile", lambda s: f"{s:.1f} s"),
}
# The relative difference from which a ratio counts as lower. The first three are deterministic.
MARGIN = {"flops": 5e-4, "temporary": 5e-3, "optimizer": 5e-4, "steps": 0.05, "compile": 0.15}


def ratio(column: str, row: Row, reference: Row) -> Ratio | None:
    """Returns the ratio of one figure. Times are compared step by step, because adjacent steps have similar noise."""
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
    """Yields environment, title and rows of each case whose reference was measured."""
    for environment, found in results["environments"].items():
        for title, rows in found.get("cases", {}).items():
            if isinstance(rows.get(BY_HAND), dict):
                yield environment, title, rows


def aligned(lines: list[list[str]]) -> str:
    """Returns an aligned Markdown table."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    rows = [f"| {' | '.join(line)} |" for line in padded]
    return "\n".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]])


def cost_table(rows: dict[str, Row | str]) -> str:
    """Returns the table of one case: absolute figures of LoRA by hand, ratios for the others."""
    reference = rows[BY_HAND]
    lines = [["", *(head for head, _ in COLUMNS.values())]]
    for name, row in rows.items():
        if isinstance(row, str):
            lines.append([name, "fails", *[""] * (len(COLUMNS) - 1)])
            continue
        cells = []
        for column, (_, show) in COLUMNS.items():
            found = ratio(column, row, reference)
            value = statistics.median(row[column]) if isinstance(row[column], list) else row[column]
            if found is None:
                cells.append("–")
            elif row is reference:
                cells.append(show(value))
            else:
                cells.append(f"× {found.value:.3f}" + (f" ± {found.spread:.3f}" if found.spread else ""))
        lines.append([name, *cells])
    reasons = [f"- {name}: {row}" for name, row in rows.items() if isinstance(row, str)]
    return "\n".join([aligned(lines), *([""] if reasons else []), *reasons])


def capability_table(results: dict[str, Any]) -> str:
    """Returns the table of what each library can adapt, with numbered reasons for "no"."""
    found = {
        name: answers
        for environment in results["environments"].values()
        for name, answers in environment.get("capabilities", {}).items()
    }
    if not found:
        return "Not measured."
    reasons: dict[str, int] = {}
    lines = [["", *found]]
    for program in next(iter(found.values())):
        cells = []
        for answers in found.values():
            answer = answers.get(program, NO_SUCH)
            number = reasons.setdefault(answer, len(reasons) + 1) if answer not in (YES, NO_SUCH) else None
            cells.append(f"no ({number})" if number else answer)
        lines.append([program, *cells])
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([aligned(lines), "", *notes])


def disadvantages(results: dict[str, Any]) -> list[str]:
    """Returns a line for each figure in which another library has a lower ratio than this one, beyond the noise."""
    own = {title: rows for environment, title, rows in cases(results) if environment == "jax"}
    return [
        f"{head}, {title}: {peer.name} × {peer_ratio.value:.3f}, {OWN} × {own_ratio.value:.3f}"
        for environment, title, rows in cases(results)
        for peer in ENVIRONMENTS[environment]
        for column, (head, _) in COLUMNS.items()
        if (peer_ratio := figure(rows, peer.name, column)) and (own_ratio := figure(own.get(title, {}), OWN, column))
        if own_ratio.value - own_ratio.spread > (peer_ratio.value + peer_ratio.spread) * (1 + MARGIN[column])
    ]


def figure(rows: dict[str, Row | str], name: str, column: str) -> Ratio | None:
    """Returns the ratio of a method, None if it could not be measured."""
    row = rows.get(name)
    return ratio(column, row, rows[BY_HAND]) if isinstance(row, dict) else None


def losses(results: dict[str, Any]) -> str:
    """Returns the first losses of LoRA by hand, which are equal if all environments measure the same step."""
    found: dict[str, list[str]] = {}
    for _, title, rows in cases(results):
        found.setdefault(title, []).append(f"{rows[BY_HAND]['loss']:.5f}")
    per_case = "; ".join(f"{title}: {', '.join(values)}" for title, values in found.items())
    return f"The first loss of LoRA by hand in each environment: {per_case}."


def tables(results: dict[str, Any]) -> str:
    """Returns all tables."""
    parts = []
    for environment, title, rows in cases(results):
        parts.append(f"### {heading(results, environment, title)}\n\n{cost_table(rows)}")
    for environment, found in results["environments"].items():
        if "missing" in found:
            names = ", ".join(peer.name for peer in ENVIRONMENTS[environment])
            parts.append(f"{names}: not measured, {found['missing']}")
    parts.append(f"### What each library can adapt\n\n{capability_table(results)}")
    lines = [f"- {line}" for line in disadvantages(results)] or ["Nowhere."]
    return "\n\n".join([*parts, "### Where another library has a lower ratio", "\n".join(lines)])


def heading(results: dict[str, Any], environment: str, title: str) -> str:
    """Returns the title of a table, with the version of the framework."""
    versions = results["environments"][environment]["versions"]
    library = f"PyTorch {versions['torch']}" if environment == "torch" else f"JAX {versions['jax']}"
    return f"{title[0].upper()}{title[1:]}, {library}"


def document(results: dict[str, Any], picture: str) -> str:
    """Returns the generated section of the page: setup, plot and tables."""
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
        "Versions, one line per environment:",
        "",
        *versions,
        "",
        losses(results),
        "",
        f"![Ratios to LoRA by hand]({picture})",
    ]
    return "\n".join(about) + "\n\n" + tables(results)
