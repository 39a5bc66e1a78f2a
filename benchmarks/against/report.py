"""Tables of the figures, and a page section."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import sizes
from records import Ratio, Table, aligned, ratio

from . import BY_HAND, ENVIRONMENTS

OWN = "lora_jax"
YES, NO_SUCH = "yes", "–"


Row = dict[str, Any]  # the figures of one method, from JSON
COLUMNS = {"step": "×ms", "FLOPs": "×G", "temporary": "×MB", "optimizer": "×MB", "trace + lower + compile": "×s"}
HEADS = dict(zip(COLUMNS, ("steps", "flops", "temporary", "optimizer", "compile"), strict=True))
# The relative difference from which a ratio counts as lower. The first three are deterministic.
MARGIN = {"step": 0.05, "FLOPs": 5e-4, "temporary": 5e-3, "optimizer": 5e-4, "trace + lower + compile": 0.15}


def cases(results: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Row | str]]]:
    """Yields environment, title and rows of each case whose reference was measured."""
    for environment, found in results["environments"].items():
        for title, rows in found.get("cases", {}).items():
            if isinstance(rows.get(BY_HAND), dict):
                yield environment, title, rows


def cost_table(title: str, rows: dict[str, Row | str]) -> str:
    """Returns the table of one case, and why libraries fail."""
    shown = {
        name: {"step": "fails"} if isinstance(row, str) else {head: row[key] for head, key in HEADS.items()}
        for name, row in rows.items()
    }
    reasons = [f"- {name}: {row}" for name, row in rows.items() if isinstance(row, str)]
    return "\n".join([str(Table(title, COLUMNS, shown)), *([""] if reasons else []), *reasons])


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
        for head in COLUMNS
        if (peer_ratio := figure(rows, peer.name, head)) and (own_ratio := figure(own.get(title, {}), OWN, head))
        if own_ratio.value - own_ratio.spread > (peer_ratio.value + peer_ratio.spread) * (1 + MARGIN[head])
    ]


def figure(rows: dict[str, Row | str], name: str, head: str) -> Ratio | None:
    """Returns the ratio of a method, None if it could not be measured."""
    row = rows.get(name)
    key = HEADS[head]
    return ratio(row[key], rows[BY_HAND][key]) if isinstance(row, dict) else None


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
        parts.append(cost_table(heading(results, environment, title), rows))
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
