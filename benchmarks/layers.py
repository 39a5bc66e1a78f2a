"""Times to trace, lower and compile a training step by number of layers: `lora()` and LoRA by hand.

Usage:
    python benchmarks/layers.py --json layers.json --plot docs/layers.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import models
from sizes import SMALL
from step import metadata
from timing import copied_args, jitted, timed

SIZE = dataclasses.replace(SMALL, width=64, hidden=256, vocabulary=512, length=64)
METHODS = {"LoRA by hand": models.by_hand, "lora()": models.through_lora}
PARTS = ("trace", "lower", "compile")


def measure(layers: int, *, rounds: int) -> dict[str, dict[str, float]]:
    """Returns median seconds of each part, with all caches cleared before; the methods are interleaved."""
    one = models.case(dataclasses.replace(SIZE, layers=layers), scanned=False)
    methods = {name: make(one) for name, make in METHODS.items()}
    args = {name: (*copied_args(method), one.tokens) for name, method in methods.items()}
    seconds: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in METHODS}
    for _ in range(rounds):
        for name, method in methods.items():
            jax.clear_caches()
            stage: Any = jitted(method)
            for part, run in (
                ("trace", lambda stage, args=args[name]: stage.trace(*args)),
                ("lower", lambda stage: stage.lower()),
                ("compile", lambda stage: stage.compile()),
            ):
                took, stage = timed(lambda run=run, stage=stage: run(stage))
                seconds[name][part].append(took)
    return {name: {part: statistics.median(times) for part, times in parts.items()} for name, parts in seconds.items()}


def plot(path: Path, found: dict[int, dict[str, dict[str, float]]]) -> None:
    """Plots the seconds of each part against the number of layers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PARTS), figsize=(10, 3.2), layout="constrained")
    for axis, part in zip(axes, PARTS, strict=True):
        for name in METHODS:
            axis.plot(list(found), [row[name][part] for row in found.values()], marker="o", label=name)
        axis.set_title(part, fontsize=10)
        axis.set_xlabel("layers")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measures, prints, and writes the requested files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=3, help="how many times each step is traced and compiled")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a plot here, as PNG")
    given = parser.parse_args()
    header = metadata("layers", SIZE)
    print(header["command"], "·", header["device"])
    print(f"{'layers':>6}  {'method':14}" + "".join(f"{part:>10}" for part in (*PARTS, "all")) + f"{'all, ratio':>12}")
    found = {}
    for layers in given.layers:
        found[layers] = measure(layers, rounds=given.rounds)
        reference = sum(found[layers]["LoRA by hand"].values())
        for name, row in found[layers].items():
            total = sum(row.values())
            cells = "".join(f"{value:>8.2f} s" for value in (*row.values(), total))
            print(f"{layers:>6}  {name:14}{cells}{total / reference:>12.3f}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(header | {"found": found}, indent=2) + "\n")
    if given.plot:
        plot(given.plot, found)


if __name__ == "__main__":
    main()
