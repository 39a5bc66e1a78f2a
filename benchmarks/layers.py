"""How tracing, lowering and compiling a training step grow with the number of layers: `lora()` against LoRA by hand.

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
from step import about
from timing import jitted, start_of, timed

SIZE = dataclasses.replace(SMALL, width=64, hidden=256, vocabulary=512, length=64)
WAYS = {"LoRA by hand": models.by_hand, "lora()": models.through_lora}
PARTS = ("trace", "lower", "compile")


def measure(layers: int, *, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each part, all caches cleared before each; the ways take turns."""
    one = models.case(dataclasses.replace(SIZE, layers=layers), scanned=False)
    made = {name: make(one) for name, make in WAYS.items()}
    args = {name: (*start_of(method), one.tokens) for name, method in made.items()}
    seconds: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in WAYS}
    for _ in range(rounds):
        for name, method in made.items():
            jax.clear_caches()
            stage: Any = jitted(method)
            for part, run in (
                ("trace", lambda stage, its=args[name]: stage.trace(*its)),
                ("lower", lambda stage: stage.lower()),
                ("compile", lambda stage: stage.compile()),
            ):
                took, stage = timed(lambda run=run, stage=stage: run(stage))
                seconds[name][part].append(took)
    return {name: {part: statistics.median(its) for part, its in parts.items()} for name, parts in seconds.items()}


def plot(path: Path, found: dict[int, dict[str, dict[str, float]]]) -> None:
    """Draws the seconds of each part against the layers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PARTS), figsize=(10, 3.2), layout="constrained")
    for axis, part in zip(axes, PARTS, strict=True):
        for name in WAYS:
            axis.plot(list(found), [its[name][part] for its in found.values()], marker="o", label=name)
        axis.set_title(part, fontsize=10)
        axis.set_xlabel("layers")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measures, prints, and writes what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=3, help="how often each step is traced and compiled")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw them here, as PNG")
    given = parser.parse_args()
    header = about("layers", SIZE)
    print(header["command"], "·", header["device"])
    print(f"{'layers':>6}  {'way':14}" + "".join(f"{part:>10}" for part in (*PARTS, "all")) + f"{'all, ratio':>12}")
    found = {}
    for layers in given.layers:
        found[layers] = measure(layers, rounds=given.rounds)
        reference = sum(found[layers]["LoRA by hand"].values())
        for name, its in found[layers].items():
            total = sum(its.values())
            cells = "".join(f"{value:>8.2f} s" for value in (*its.values(), total))
            print(f"{layers:>6}  {name:14}{cells}{total / reference:>12.3f}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(header | {"found": found}, indent=2) + "\n")
    if given.plot:
        plot(given.plot, found)


if __name__ == "__main__":
    main()
