"""What the runs of `reproduce_paper.py` come to: statistics, tables in Markdown, figures, and their places in the docs.

It reads results alone, the dictionary that `reproduce_paper.py` writes as JSON; nothing is trained or loaded here.
"""

import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from numpy.typing import NDArray

import lora_jax as lj
from paper_configurations import COMPARISONS, CONFIGURATIONS, Configuration

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, KEPT = DOCS / "findings.md", DOCS / "findings.json"
ACCURACIES, SUBSPACES = "findings.png", "findings_subspaces.png"
LEAST = 2.0  # points of accuracy below which no difference is called one, whatever its error
PANELS = {
    "Which matrices, at one budget": COMPARISONS["matrices"],
    "Which rank": COMPARISONS["ranks"],
    "LoRA and other methods": COMPARISONS["methods"],
    "LoRA and its variants": COMPARISONS["variants"] + COMPARISONS["stabilized"],
}

Results = dict[str, Any]
Run = dict[str, Any]


class Estimate(NamedTuple):
    """A number and what it is uncertain by, both in points of accuracy."""

    value: float
    error: float

    def __str__(self) -> str:
        """Such as `82.4 ± 0.6`."""
        return f"{self.value:.1f} ± {self.error:.1f}".replace("-", "−")


def accuracy(runs: list[Run]) -> Estimate:
    """The mean over seeds, and the standard deviation of one seed; not a number where there is but one."""
    values = [100 * run["accuracy"] for run in runs]
    return Estimate(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan)


def difference(runs: list[Run], reference: list[Run]) -> Estimate:
    """How many points more than the reference, paired by seed and question, and the standard error of that.

    The error has two parts, added as squares: that of the mean over these seeds, and that of the mean over these
    questions, as both are samples of others. It is rather too large than too small, since the first holds some of the
    second.
    """
    gained = np.stack([100.0 * (_right(one) - _right(other)) for one, other in zip(runs, reference, strict=True)])
    errors = [_error_of_mean(gained.mean(axis=axis)) for axis in (0, 1)]
    return Estimate(float(gained.mean()), math.hypot(*errors))


def verdict(its: Estimate) -> str:
    """What a difference is: `more` or `less` if it is at least `LEAST` points and twice its error, else `noise`."""
    if not (abs(its.value) >= LEAST and abs(its.value) > 2 * its.error):
        return "noise"
    return "more" if its.value > 0 else "less"


def summary(results: Results, names: Sequence[str]) -> str:
    """The comparison in words: what is more than the first, what is less, and what is not to be told from it."""
    first = runs_of(results, names[0])
    found: dict[str, list[str]] = {}
    for name in names[1:]:
        its = difference(runs_of(results, name), first)
        said = _with_rank(CONFIGURATIONS[name]) + ("" if verdict(its) == "noise" else f" ({its})")
        found.setdefault(verdict(its), []).append(said)
    words = {"more": "More accurate", "less": "Less accurate", "noise": "Not to be told from it"}
    parts = [f"{word}: {'; '.join(found[kind])}." for kind, word in words.items() if kind in found]
    return " ".join([f"**Against {_with_rank(CONFIGURATIONS[names[0]])}.**", *parts])


def _with_rank(its: Configuration) -> str:
    return label(its) + (f" at rank {its.rank}" if its.rank else "")


def _right(run: Run) -> NDArray[np.float64]:
    right = np.ones(run["settings"]["test_questions"])
    right[run["wrong"]] = 0
    return right


def _error_of_mean(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def runs_of(results: Results, name: str) -> list[Run]:
    """The runs of one configuration, by seed."""
    runs = [run for run in results["runs"] if run["settings"]["name"] == name]
    return sorted(runs, key=lambda run: run["settings"]["seed"])


def comparison(results: Results, names: Sequence[str]) -> str:
    """The table of some configurations, held against the first of them."""
    first = names[0]
    header = [
        "",
        "rank",
        "trained",
        "learning rate",
        "each seed, %",
        "mean ± sd, %",
        "against the first",
        "is",
        "CPU time a step",
    ]
    rows = []
    for name in names:
        its, runs = CONFIGURATIONS[name], runs_of(results, name)
        rows.append(
            [
                label(its),
                str(its.rank or "–"),
                f"{runs[0]['trained']:,}",
                f"{its.rate:g}",
                ", ".join(f"{100 * run['accuracy']:.1f}" for run in runs),
                str(accuracy(runs)),
                "" if name == first else str(difference(runs, runs_of(results, first))),
                "" if name == first else verdict(difference(runs, runs_of(results, first))),
                f"{statistics.median(run['step_cpu_ms'] for run in runs):.0f} ms",
            ]
        )
    return markdown(header, rows)


def label(its: Configuration) -> str:
    """What a row or a line of a figure is called."""
    return its.method if its.rank is None else f"{its.method} on {its.matrices}"


def similarity(results: Results) -> str:
    """How alike the first directions of two adapters are, as the mean over the layers."""
    header = ["kernel", "factor", *(f"{title}: φ({i}, {j})" for title, cells in _CELLS.items() for i, j in cells)]
    rows = []
    for kernel in _kernels(results):
        for factor in ("a", "b"):
            found = results["analysis"]["similarity"][factor]
            values = [found[title][kernel][i - 1][j - 1] for title, cells in _CELLS.items() for i, j in cells]
            rows.append([kernel, factor.upper(), *(f"{value:.2f}" for value in values)])
    return markdown(header, rows)


def amplification(results: Results) -> str:
    """Table 7 of the paper, as the mean over the layers."""
    fields = {"delta": "‖ΔW‖", "kernel": "‖W0‖", "along_delta": "along ΔW", "along_kernel": "along W0"}
    fields |= {"along_random": "along random", "factor": "amplification"}
    rows = [
        [kernel, rank, *(f"{its[kernel][field]:.3g}" for field in fields)]
        for kernel in _kernels(results)
        for rank, its in results["analysis"]["amplification"].items()
    ]
    return markdown(["kernel", "rank", *fields.values()], rows)


_CELLS = {"ranks 8 and 64": ((1, 1), (8, 8), (8, 64)), "two seeds of rank 8": ((1, 1), (8, 8))}


def _kernels(results: Results) -> list[str]:
    return list(results["analysis"]["amplification"]["8"])


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table; all but the first column to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def setting(results: Results) -> str:
    """What all the runs share, in a sentence or two."""
    its, versions = results["runs"][0]["settings"], results["versions"]
    seeds = len({run["settings"]["seed"] for run in results["runs"]})
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{len(results['runs'])} runs: {len(CONFIGURATIONS)} configurations with {seeds} seeds each; "
        f"{its['steps']} steps of {its['batch']} questions, so that {its['steps'] * its['batch']:,} of the "
        f"{its['train_questions']:,} training questions are seen, each once; tested on {its['test_questions']}. "
        f"{libraries}; two CPU cores."
    )


def tables(results: Results) -> dict[str, str]:
    """Everything that a page of findings shows of the numbers, by the name of its place."""
    compared = {
        name: f"{comparison(results, names)}\n\n{summary(results, names)}" for name, names in COMPARISONS.items()
    }
    return {"setting": setting(results), **compared} | {
        "similarity": similarity(results),
        "amplification": amplification(results),
    }


def text(results: Results) -> str:
    """All the tables, one below the other."""
    return "\n\n".join(f"{name}\n{table}" for name, table in tables(results).items())


def draw(results: Results, folder: Path) -> None:
    """Draws the accuracies, every seed a point, and the subspaces: two PNG in `folder`."""
    figure, panels = plt.subplots(2, 2, figsize=(11, 6.4), layout="constrained")
    panels[0, 1].sharex(panels[0, 0])  # all but the methods, of which one is far away
    panels[1, 1].sharex(panels[0, 0])
    for panel, (title, names) in zip(panels.flat, PANELS.items(), strict=True):
        for row, name in enumerate(names):
            runs = runs_of(results, name)
            values, mean = [100 * run["accuracy"] for run in runs], accuracy(runs)
            colour = "#8a8a8a" if row == 0 else "#3b6ea5"
            panel.errorbar(mean.value, row, xerr=mean.error, fmt="|", color=colour, markersize=16, capsize=4)
            panel.plot(values, [row] * len(values), "o", color=colour, markersize=5, alpha=0.6)
        its = [CONFIGURATIONS[name] for name in names]
        panel.set_yticks(range(len(its)), [label(one) + (f", r = {one.rank}" if one.rank else "") for one in its])
        panel.invert_yaxis()
        panel.margins(y=0.15)
        panel.set_title(title, loc="left")
        panel.grid(axis="x", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[1]:
        panel.set_xlabel("test accuracy, %")
    figure.savefig(folder / ACCURACIES, dpi=130)
    plt.close(figure)

    shown = {
        f"{kernel}, {factor.upper()}: {title}": np.array(pairs[kernel])
        for title in _CELLS
        for factor, its in results["analysis"]["similarity"].items()
        for pairs in [its[title]]
        for kernel in ("query", "value")
    }
    figure = lj.analysis.plot_subspace_similarity(shown)
    figure.savefig(folder / SUBSPACES, dpi=110)


def filled(page: str, results: Results) -> str:
    """Puts every table between its marks in a page: `<!-- ranks -->` … `<!-- end -->`."""
    for name, table in tables(results).items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, places = between.subn(lambda its, table=table: f"{its[1]}\n{table}\n\n{its[2]}", page)
        if places != 1:
            raise ValueError(f"{PAGE} should have one place `<!-- {name} -->` … `<!-- end -->`; it has {places}.")
    return page


def write_docs(results: Results) -> None:
    """Writes the tables and figures of the page of findings, and keeps the results beside it."""
    PAGE.write_text(filled(PAGE.read_text(), results))
    draw(results, DOCS)
    runs = ",\n  ".join(json.dumps(run) for run in results["runs"])
    rest = {name: value for name, value in results.items() if name != "runs"}
    KEPT.write_text(f'{{"runs": [\n  {runs}],\n  {json.dumps(rest)[1:]}\n')
