"""Times to trace, lower and compile a training step by number of layers: `lora()` and LoRA by hand.

Usage:
    python benchmarks/layers.py --layers 4 8
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import models
import records
from against.figures import progress
from sizes import SMALL
from timing import copied_args, jitted, timed

SIZE = dataclasses.replace(SMALL, width=64, hidden=256, vocabulary=512, length=64)
METHODS = {"LoRA by hand": models.by_hand, "lora()": models.through_lora}
PARTS = ("trace", "lower", "compile")


def measure(layers: int, *, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Returns the seconds of each part and of all, with all caches cleared before; the methods are interleaved."""
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
    return {name: parts | {"all": [*map(sum, zip(*parts.values(), strict=True))]} for name, parts in seconds.items()}


def tables(numbers: list[int], rounds: int) -> Iterator[records.Table]:
    """Yields a table of the whole, and one for each part, with a row for each number of layers."""
    found = {}
    for layers in numbers:
        progress(f"{layers} layers")
        found[f"{layers} layers"] = measure(layers, rounds=rounds)
    for part in ("all", *PARTS):
        rows = {layers: {name: row[part] for name, row in of_layers.items()} for layers, of_layers in found.items()}
        title = "Trace + lower + compile" if part == "all" else part.capitalize()
        yield records.Table(title, dict.fromkeys(METHODS, "×s"), rows, across=True)


def main() -> None:
    """Measures, prints, and writes the requested file."""
    parser = records.parser(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=3, help="how many times each step is traced and compiled")
    given = parser.parse_args()
    records.publish(tables(given.layers, given.rounds), given.json)


if __name__ == "__main__":
    main()
