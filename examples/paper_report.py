"""Statistics, Markdown tables and figures of the results of `reproduce_paper.py`, and their insertion into the docs."""

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
PAGE, STORED = DOCS / "findings.md", DOCS / "findings.json"
ACCURACIES, SUBSPACES = "findings.png", "findings_subspaces.png"
MINIMUM_DIFFERENCE = 2.0  # points of accuracy; a smaller difference counts as noise, whatever its error
PANELS = {
    "Which matrices, at one budget": COMPARISONS["matrices"],
    "Which rank": COMPARISONS["ranks"],
    "LoRA and other methods": COMPARISONS["methods"],
    "LoRA and its variants": COMPARISONS["variants"] + COMPARISONS["stabilized"],
}

Results = dict[str, Any]
Run = dict[str, Any]


class Estimate(NamedTuple):
    """A value and its error, in points of accuracy."""

    value: float
    error: float

    def __str__(self) -> str:
        """Formats as `82.4 ± 0.6`."""
        return f"{self.value:.1f} ± {self.error:.1f}".replace("-", "−")


def accuracy(runs: list[Run]) -> Estimate:
    """Returns the mean over seeds and the standard deviation of one seed; NaN for a single seed."""
    values = [100 * run["accuracy"] for run in runs]
    return Estimate(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan)


def difference(runs: list[Run], reference: list[Run]) -> Estimate:
    """Returns the mean difference to the reference, paired by seed and question, and its standard error.

    The error adds the variances of the means over seeds and over questions, because both are samples. It is rather too
    large, because the first contains a part of the second.
    """
    gains = np.stack([100.0 * (_correct(one) - _correct(other)) for one, other in zip(runs, reference, strict=True)])
    errors = [_error_of_mean(gains.mean(axis=axis)) for axis in (0, 1)]
    return Estimate(float(gains.mean()), math.hypot(*errors))


def verdict(estimate: Estimate) -> str:
    """Returns `noise` unless a difference is at least `MINIMUM_DIFFERENCE` and twice its error, else its direction."""
    if not (abs(estimate.value) >= MINIMUM_DIFFERENCE and abs(estimate.value) > 2 * estimate.error):
        return "noise"
    return "higher" if estimate.value > 0 else "lower"


def summary(results: Results, names: Sequence[str]) -> str:
    """Returns sentences that list what is more accurate than the first, less accurate, or not different."""
    first = runs_of(results, names[0])
    found: dict[str, list[str]] = {}
    for name in names[1:]:
        estimate = difference(runs_of(results, name), first)
        words = _with_rank(CONFIGURATIONS[name]) + ("" if verdict(estimate) == "noise" else f" ({estimate})")
        found.setdefault(verdict(estimate), []).append(words)
    titles = {"higher": "More accurate", "lower": "Less accurate", "noise": "No significant difference"}
    parts = [f"{title}: {'; '.join(found[kind])}." for kind, title in titles.items() if kind in found]
    return " ".join([f"**Compared with {_with_rank(CONFIGURATIONS[names[0]])}.**", *parts])


def _with_rank(configuration: Configuration) -> str:
    return label(configuration) + (f" at rank {configuration.rank}" if configuration.rank else "")


def _correct(run: Run) -> NDArray[np.float64]:
    correct = np.ones(run["settings"]["test_questions"])
    correct[run["wrong"]] = 0
    return correct


def _error_of_mean(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def runs_of(results: Results, name: str) -> list[Run]:
    """Returns the runs of one configuration, sorted by seed."""
    runs = [run for run in results["runs"] if run["settings"]["name"] == name]
    return sorted(runs, key=lambda run: run["settings"]["seed"])


def comparison(results: Results, names: Sequence[str]) -> str:
    """Returns a table that compares configurations with the first one."""
    first = names[0]
    header = [
        "",
        "rank",
        "parameters",
        "learning rate",
        "per seed, %",
        "mean ± sd, %",
        "difference to the first",
        "verdict",
        "CPU time per step",
    ]
    rows = []
    for name in names:
        configuration, runs = CONFIGURATIONS[name], runs_of(results, name)
        rows.append(
            [
                label(configuration),
                str(configuration.rank or "–"),
                f"{runs[0]['trained']:,}",
                f"{configuration.rate:g}",
                ", ".join(f"{100 * run['accuracy']:.1f}" for run in runs),
                str(accuracy(runs)),
                "" if name == first else str(difference(runs, runs_of(results, first))),
                "" if name == first else verdict(difference(runs, runs_of(results, first))),
                f"{statistics.median(run['step_cpu_ms'] for run in runs):.0f} ms",
            ]
        )
    return markdown(header, rows)


def label(configuration: Configuration) -> str:
    """Returns the name of a configuration in tables and figures."""
    method = configuration.method
    return method if configuration.rank is None else f"{method} on {configuration.matrices}"


def similarity(results: Results) -> str:
    """Returns the table of subspace similarities, averaged over the layers."""
    header = ["kernel", "factor", *(f"{title}: φ({i}, {j})" for title, cells in _CELLS.items() for i, j in cells)]
    rows = []
    for kernel in _kernels(results):
        for factor in ("a", "b"):
            found = results["analysis"]["similarity"][factor]
            values = [found[title][kernel][i - 1][j - 1] for title, cells in _CELLS.items() for i, j in cells]
            rows.append([kernel, factor.upper(), *(f"{value:.2f}" for value in values)])
    return markdown(header, rows)


def amplification(results: Results) -> str:
    """Returns the counterpart of the paper's table 7, averaged over the layers."""
    fields = {"delta": "‖ΔW‖", "kernel": "‖W0‖", "along_delta": "along ΔW", "along_kernel": "along W0"}
    fields |= {"along_random": "along random", "factor": "amplification"}
    rows = [
        [kernel, rank, *(f"{found[kernel][field]:.3g}" for field in fields)]
        for kernel in _kernels(results)
        for rank, found in results["analysis"]["amplification"].items()
    ]
    return markdown(["kernel", "rank", *fields.values()], rows)


_CELLS = {"ranks 8 and 64": ((1, 1), (8, 8), (8, 64)), "two seeds of rank 8": ((1, 1), (8, 8))}


def _kernels(results: Results) -> list[str]:
    return list(results["analysis"]["amplification"]["8"])


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table whose columns are right-aligned, except the first."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def setting(results: Results) -> str:
    """Returns sentences about what all runs have in common."""
    shared, versions = results["runs"][0]["settings"], results["versions"]
    seeds = len({run["settings"]["seed"] for run in results["runs"]})
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{len(results['runs'])} runs: {len(CONFIGURATIONS)} configurations with {seeds} seeds each; "
        f"{shared['steps']} steps of {shared['batch']} questions, so that {shared['steps'] * shared['batch']:,} of the "
        f"{shared['train_questions']:,} training questions are seen, each once; tested on {shared['test_questions']}. "
        f"{libraries}; two CPU cores."
    )


def tables(results: Results) -> dict[str, str]:
    """Returns all generated sections of the page by name."""
    compared = {
        name: f"{comparison(results, names)}\n\n{summary(results, names)}" for name, names in COMPARISONS.items()
    }
    return {"setting": setting(results), **compared} | {
        "similarity": similarity(results),
        "amplification": amplification(results),
    }


def text(results: Results) -> str:
    """Returns all sections as text."""
    return "\n\n".join(f"{name}\n{table}" for name, table in tables(results).items())


def draw(results: Results, folder: Path) -> None:
    """Plots accuracies, one point per seed, and subspaces, as two PNGs in `folder`."""
    figure, panels = plt.subplots(2, 2, figsize=(11, 6.4), layout="constrained")
    panels[0, 1].sharex(panels[0, 0])  # except for the methods, one of which is far away
    panels[1, 1].sharex(panels[0, 0])
    for panel, (title, names) in zip(panels.flat, PANELS.items(), strict=True):
        for row, name in enumerate(names):
            runs = runs_of(results, name)
            values, mean = [100 * run["accuracy"] for run in runs], accuracy(runs)
            color = "#8a8a8a" if row == 0 else "#3b6ea5"
            panel.errorbar(mean.value, row, xerr=mean.error, fmt="|", color=color, markersize=16, capsize=4)
            panel.plot(values, [row] * len(values), "o", color=color, markersize=5, alpha=0.6)
        shown = [CONFIGURATIONS[name] for name in names]
        panel.set_yticks(range(len(shown)), [label(one) + (f", r = {one.rank}" if one.rank else "") for one in shown])
        panel.invert_yaxis()
        panel.margins(y=0.15)
        panel.set_title(title, loc="left")
        panel.grid(axis="x", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[1]:
        panel.set_xlabel("test accuracy, %")
    figure.savefig(folder / ACCURACIES, dpi=130)
    plt.close(figure)

    similarities = {
        f"{kernel}, {factor.upper()}: {title}": np.array(pairs[kernel])
        for title in _CELLS
        for factor, found in results["analysis"]["similarity"].items()
        for pairs in [found[title]]
        for kernel in ("query", "value")
    }
    figure = lj.analysis.plot_subspace_similarity(similarities)
    figure.savefig(folder / SUBSPACES, dpi=110)


def filled(page: str, results: Results) -> str:
    """Replaces the text between the marks of each section: `<!-- ranks -->` … `<!-- end -->`."""
    for name, table in tables(results).items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, places = between.subn(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", page)
        if places != 1:
            raise ValueError(f"Expected one section `<!-- {name} -->` … `<!-- end -->` in {PAGE}; got {places}.")
    return page


def write_docs(results: Results) -> None:
    """Writes tables and figures of docs/findings.md, and stores the results in docs/findings.json."""
    PAGE.write_text(filled(PAGE.read_text(), results))
    draw(results, DOCS)
    runs = ",\n  ".join(json.dumps(run) for run in results["runs"])
    rest = {name: value for name, value in results.items() if name != "runs"}
    STORED.write_text(f'{{"runs": [\n  {runs}],\n  {json.dumps(rest)[1:]}\n')
