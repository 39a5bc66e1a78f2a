"""The cost of a training step with `lora()`, LoRA by hand, merged kernels, and full fine-tuning.

Usage:
    python benchmarks/step.py
    python benchmarks/step.py --size base --json step.json --plot step.png
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from models import METHODS, Case, case
from sizes import BASE, SMALL, Size
from timing import copied_args, jitted, timed

from lora_jax import testing


class Plan(NamedTuple):
    """A size, how many times each step is traced, and how many steps are timed."""

    size: Size
    rounds: int
    steps: int


PLANS = {"small": Plan(SMALL, 3, 5), "base": Plan(BASE, 1, 3)}
REFERENCE = "LoRA by hand"


@dataclasses.dataclass(frozen=True)
class Figures:
    """The cost of a step.

    Attributes:
      flops: counted on the jaxpr, loop bodies times their number of iterations.
      compiled: the compiler's count of FLOPs, which counts a loop body once.
      temporary: bytes in addition to arguments and results, as reported by the compiler. The trained arrays and the
        optimizer state are donated, as in training.
      lower: seconds to trace and lower with cleared caches; the median.
      compile: seconds to compile; measured once.
      step: seconds per step; the median.
    """

    flops: int
    compiled: int
    temporary: int
    lower: float
    compile: float
    step: float


COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "flops": ("FLOPs", lambda n: f"{n / 1e9:.2f} G"),
    "compiled": ("compiled", lambda n: f"{n / 1e9:.2f} G"),
    "temporary": ("temporary", lambda n: f"{n / 1e6:.1f} MB"),
    "lower": ("trace+lower", lambda s: f"{s:.2f} s"),
    "compile": ("compile", lambda s: f"{s:.2f} s"),
    "step": ("step", lambda s: f"{1e3 * s:.0f} ms"),
}


def measure(case: Case, *, rounds: int, steps: int) -> dict[str, Figures]:
    """Measures all methods on a case. They are interleaved, so that other load on the machine affects all of them."""
    methods = {name: make(case) for name, make in METHODS.items()}
    args = {name: copied_args(method) for name, method in methods.items()}
    lower: dict[str, list[float]] = {name: [] for name in methods}
    lowered = {}
    for _ in range(rounds):
        for name, method in methods.items():
            jax.clear_caches()
            took, lowered[name] = timed(lambda m=method, a=args[name]: jitted(m).lower(*a, case.tokens))
            lower[name].append(took)
    flops = {name: testing.flops(m.step, *args[name], case.tokens) for name, m in methods.items()}
    compiled = {name: timed(program.compile) for name, program in lowered.items()}
    seconds = run({name: program for name, (_, program) in compiled.items()}, args, case, steps=steps)
    return {
        name: Figures(
            flops=flops[name],
            compiled=int(program.cost_analysis()["flops"]),
            temporary=int(program.memory_analysis().temp_size_in_bytes),
            lower=statistics.median(lower[name]),
            compile=took,
            step=statistics.median(seconds[name]),
        )
        for name, (took, program) in compiled.items()
    }


def run(programs: dict[str, Any], args: dict[str, list[Any]], case: Case, *, steps: int) -> dict[str, list[float]]:
    """Returns the seconds of each step except the first. The programs are interleaved; `args` are donated."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(steps + 1):
        losses = {}
        for name, program in programs.items():
            took, (trained, state, losses[name]) = timed(lambda p=program, a=args[name]: p(*a, case.tokens))
            args[name][1:] = trained, state
            if number:
                seconds[name].append(took)
        if number == 0:
            check_losses(losses)
    return seconds


def check_losses(losses: dict[str, Array]) -> None:
    """Asserts that all methods train the same function, except full fine-tuning, which has no adapter."""
    for name, loss in losses.items():
        if name != "full fine-tuning":
            np.testing.assert_allclose(loss, losses[REFERENCE], rtol=1e-2, err_msg=name)


def table(title: str, figures: dict[str, Figures]) -> str:
    """Returns the table of one case: absolute figures of the reference, ratios for the others."""
    reference = figures[REFERENCE]
    width = max(map(len, figures))
    lines = [f"{title:{width}}" + "".join(f"{head:>14}" for head, _ in COLUMNS.values())]
    for name, row in figures.items():
        cells = [
            show(getattr(row, column))
            if row is reference
            else f"× {getattr(row, column) / getattr(reference, column):.3f}"
            for column, (_, show) in COLUMNS.items()
        ]
        lines.append(f"{name:{width}}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def plot(path: Path, results: dict[str, dict[str, Figures]]) -> None:
    """Plots the ratios of FLOPs, temporary bytes and time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"flops": "FLOPs", "temporary": "temporary bytes", "step": "time of a step"}
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 4.2), sharey=True, layout="constrained")
    height = 0.8 / len(METHODS)
    for axis, (column, title) in zip(axes, panels.items(), strict=True):
        for number, name in enumerate(METHODS):
            values = [getattr(rows[name], column) / getattr(rows[REFERENCE], column) for rows in results.values()]
            axis.barh([row + number * height for row in range(len(results))], values, height, label=name)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks([row + 0.4 - height / 2 for row in range(len(results))], list(results))
    axes[0].invert_yaxis()
    figure.suptitle("A training step, as a ratio to LoRA by hand", fontsize=11)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS), frameon=False)
    figure.savefig(path, dpi=150)


def metadata(size_name: str, size: Size) -> dict[str, Any]:
    """Returns the command, versions, device and sizes of the measurement."""
    packages = ("jax", "jaxlib", "flax", "optax")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "size": {"name": size_name, **dataclasses.asdict(size)},
    }


def main() -> None:
    """Measures, prints, and writes the requested files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=PLANS, default="small")
    parser.add_argument("--rounds", type=int, help="how many times each step is traced")
    parser.add_argument("--steps", type=int, help="steps to time for each method")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a plot of the ratios here, as PNG")
    given = parser.parse_args()
    size, rounds, steps = PLANS[given.size]
    header = metadata(given.size, size)
    print(header["command"])
    print(", ".join(f"{name} {version}" for name, version in header["versions"].items()), "·", header["device"])
    print(", ".join(f"{name} {value}" for name, value in header["size"].items() if name != "name"))
    results = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        for scanned in (False, True):
            title = f"{jnp.dtype(dtype).name}, {'scan + remat' if scanned else 'unrolled'}"
            one = case(size, scanned=scanned, dtype=dtype)
            results[title] = measure(one, rounds=given.rounds or rounds, steps=given.steps or steps)
            print("\n" + table(title, results[title]), flush=True)
    print("\nThe compiler counts a loop body once: compare its FLOPs for unrolled models only.")
    if given.json:
        cases = {
            title: {name: dataclasses.asdict(row) for name, row in figures.items()}
            for title, figures in results.items()
        }
        given.json.write_text(json.dumps(header | {"cases": cases}, indent=2) + "\n")
    if given.plot:
        plot(given.plot, results)


if __name__ == "__main__":
    main()
