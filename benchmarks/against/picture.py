"""A plot of the ratios to LoRA by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from records import ratio

from . import BY_HAND, ENVIRONMENTS
from .report import OWN, cases

PANELS = {"flops": "FLOPs", "temporary": "temporary bytes", "steps": "time of a step"}
WIDEST = 2.5  # larger ratios are truncated; the label has the value


def bars(results: dict[str, Any]) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Returns, by case and method, its figures and those of LoRA by hand in its environment."""
    found: dict[str, dict[str, tuple[Any, Any]]] = {}
    for environment, title, rows in cases(results):
        peers = {peer.name for peer in ENVIRONMENTS[environment]}
        for name, row in rows.items():
            if name in peers or (environment == "jax" and name != BY_HAND):
                found.setdefault(title, {})[name] = row, rows[BY_HAND]
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    """Plots a row of panels for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = bars(results)
    height = 0.6 + sum(0.7 + 0.23 * len(rows) for rows in drawn.values())
    options = {"sharex": "col", "squeeze": False, "layout": "constrained"}
    figure, grid = plt.subplots(len(drawn), len(PANELS), figsize=(10, height), **options)
    for line, (title, rows) in zip(grid, drawn.items(), strict=True):
        for axis, (column, head) in zip(line, PANELS.items(), strict=True):
            panel(axis, column, rows)
            axis.set_title(head, fontsize=9)
        line[0].set_ylabel(title, fontsize=9)
        for axis in line[1:]:
            axis.set_yticklabels([])
    figure.suptitle("A training step, as a ratio to LoRA by hand in the same environment", fontsize=10)
    figure.savefig(path, dpi=110)


def panel(axis: Any, column: str, rows: dict[str, tuple[Any, Any]]) -> None:
    """Plots one figure of all methods."""
    libraries = {peer.name for peers in ENVIRONMENTS.values() for peer in peers}
    for place, (name, (row, reference)) in enumerate(rows.items()):
        found = ratio(row[column], reference[column]) if isinstance(row, dict) else None
        if found is None:
            axis.text(0, place, " fails" if isinstance(row, str) else " not measured", va="center", fontsize=7)
            continue
        color = "C0" if name == OWN else "C1" if name in libraries else "0.75"
        end = min(found.value, WIDEST)
        axis.barh(place, end, color=color, xerr=found.spread or None, error_kw={"linewidth": 0.8})
        axis.text(min(end + found.spread, WIDEST), place, f" {found.value:.2f}", va="center", fontsize=7)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, min(max(axis.get_xlim()[1] * 1.08, 1.2), WIDEST * 1.1))
    axis.axvline(1, color="black", linewidth=0.8)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
