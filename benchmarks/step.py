"""What a training step costs: LoRA through `lora()`, by hand, merged in each step, and full fine-tuning.

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
from timing import jitted, start_of, timed

from lora_jax import testing


class Plan(NamedTuple):
    """A size, how often each step is traced, and for how many steps it is timed."""

    size: Size
    rounds: int
    steps: int


PLANS = {"small": Plan(SMALL, 3, 5), "base": Plan(BASE, 1, 3)}
REFERENCE = "LoRA by hand"


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a step costs.

    Attributes:
      operations: on the jaxpr, the bodies of loops times their length.
      compiled: the compiler's count, which takes the body of a loop once.
      temporary: bytes beside arguments and results, by the compiler's account; the trained arrays and the state of the
        optimizer are donated, as in training.
      lower: seconds to trace and lower, all caches cleared; the median.
      compile: seconds, once.
      step: seconds; the median.
    """

    flops: int
    compiled: int
    temporary: int
    lower: float
    compile: float
    step: float


COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "operations": ("operations", lambda n: f"{n / 1e9:.2f} G"),
    "compiled": ("compiled op.", lambda n: f"{n / 1e9:.2f} G"),
    "temporary": ("temporary", lambda n: f"{n / 1e6:.1f} MB"),
    "lower": ("trace+lower", lambda s: f"{s:.2f} s"),
    "compile": ("compile", lambda s: f"{s:.2f} s"),
    "step": ("step", lambda s: f"{1e3 * s:.0f} ms"),
}


def measure(case: Case, *, rounds: int, steps: int) -> dict[str, Figures]:
    """Measures all the methods on a case; they take turns, so that a busy moment of the machine meets them alike."""
    methods = {name: make(case) for name, make in METHODS.items()}
    args = {name: start_of(method) for name, method in methods.items()}
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
    """Trains with each program in turn, and returns the seconds of each step but the first. `args` are used up."""
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
    """Makes sure that all train the same function; full fine-tuning alone starts without the adapter's."""
    for name, loss in losses.items():
        if name != "full fine-tuning":
            np.testing.assert_allclose(loss, losses[REFERENCE], rtol=1e-2, err_msg=name)


def table(title: str, figures: dict[str, Figures]) -> str:
    """The figures of one case: those of the reference as they are, the others as ratios to them."""
    reference = figures[REFERENCE]
    width = max(map(len, figures))
    lines = [f"{title:{width}}" + "".join(f"{head:>14}" for head, _ in COLUMNS.values())]
    for name, its in figures.items():
        cells = [
            show(getattr(its, column))
            if its is reference
            else f"× {getattr(its, column) / getattr(reference, column):.3f}"
            for column, (_, show) in COLUMNS.items()
        ]
        lines.append(f"{name:{width}}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def plot(path: Path, results: dict[str, dict[str, Figures]]) -> None:
    """Draws the ratios of operations, temporary bytes and time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"operations": "operations", "temporary": "temporary bytes", "step": "time of a step"}
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 4.2), sharey=True, layout="constrained")
    height = 0.8 / len(METHODS)
    for axis, (column, title) in zip(axes, panels.items(), strict=True):
        for number, name in enumerate(METHODS):
            values = [getattr(its[name], column) / getattr(its[REFERENCE], column) for its in results.values()]
            axis.barh([row + number * height for row in range(len(results))], values, height, label=name)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks([row + 0.4 - height / 2 for row in range(len(results))], list(results))
    axes[0].invert_yaxis()
    figure.suptitle("A training step, as a ratio to LoRA by hand", fontsize=11)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS), frameon=False)
    figure.savefig(path, dpi=150)


def about(size_name: str, size: Size) -> dict[str, Any]:
    """What the figures were measured with."""
    packages = ("jax", "jaxlib", "flax", "optax")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "size": {"name": size_name, **dataclasses.asdict(size)},
    }


def main() -> None:
    """Measures, prints, and writes what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=PLANS, default="small")
    parser.add_argument("--rounds", type=int, help="how often each step is traced")
    parser.add_argument("--steps", type=int, help="how many steps each method is timed for")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw the ratios here, as PNG")
    given = parser.parse_args()
    size, rounds, steps = PLANS[given.size]
    header = about(given.size, size)
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
    print("\nThe compiler's count takes the body of a loop once: compare it among unrolled models only.")
    if given.json:
        cases = {
            title: {name: dataclasses.asdict(its) for name, its in figures.items()}
            for title, figures in results.items()
        }
        given.json.write_text(json.dumps(header | {"cases": cases}, indent=2) + "\n")
    if given.plot:
        plot(given.plot, results)


if __name__ == "__main__":
    main()
