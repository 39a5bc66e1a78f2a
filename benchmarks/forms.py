"""FLOPs, memory and time of a training step in each form of evaluation, relative to LoRA by hand.

Usage:
    python benchmarks/forms.py
    python benchmarks/forms.py --steps 0 --json forms.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import conv
import jax
import models
from decoder import Method
from sizes import SMALL
from step import metadata
from timing import copied_args, jitted, timed

from lora_jax import testing
from lora_jax._transform.contraction import costs

Make = Callable[[Any], Method]


@contextmanager
def exhaustive() -> Iterator[None]:
    """Makes the planner take the fewest FLOPs, whatever the memory."""
    before = costs.TOLERANCE
    costs.TOLERANCE = 1.0
    costs.choose_form.cache_clear()
    try:
        yield
    finally:
        costs.TOLERANCE = before
        costs.choose_form.cache_clear()


def decoder(width: int, rank: int, layers: int = 2, *, scanned: bool = False) -> Callable[[], Any]:
    """A case of the decoder."""
    size = dataclasses.replace(SMALL, layers=layers, width=width, hidden=4 * width, rank=rank)
    return lambda: models.case(size, scanned=scanned)


CASES: dict[str, tuple[Callable[[], Any], Any]] = {
    "decoder, d = 256, rank 8": (decoder(256, 8), models),
    "decoder, d = 256, rank 8, scan + remat": (decoder(256, 8, scanned=True), models),
    "decoder, d = 256, rank 64": (decoder(256, 64), models),
    "decoder, d = 256, rank 64, scan + remat": (decoder(256, 64, scanned=True), models),
    "decoder, d = 768, rank 8": (decoder(768, 8), models),
    "conv net, 64 channels, rank 64": (conv.case, conv),
    "conv net, 64 channels, rank 8": (lambda: conv.case(rank=8), conv),
}


def methods(module: Any) -> dict[str, Make]:
    """Returns the methods to train a case."""
    forms = {
        f"lora(form={name!r})": lambda case, name=name: module.through_lora(case, form=name)
        for name in ("factored", "hybrid", "merged")
    }
    return {
        "LoRA by hand": module.by_hand,
        "lora()": module.through_lora,
        **forms,
        "W0 + s·A·B each step": module.merged,
        "full fine-tuning": module.full_fine_tuning,
    }


def measure(case: Any, module: Any, *, steps: int) -> dict[str, dict[str, float]]:
    """Returns the figures of all methods; the steps are interleaved."""
    made = {name: make(case) for name, make in methods(module).items()}
    figures: dict[str, dict[str, float]] = {}
    programs: dict[str, Any] = {}
    for name, method in made.items():
        args = (*copied_args(method), case.tokens)
        figures[name] = {"FLOPs": testing.flops(method.step, *args)}
        programs[name] = jitted(method).lower(*args).compile()
        figures[name]["temporary"] = programs[name].memory_analysis().temp_size_in_bytes
    with exhaustive():
        method = module.through_lora(case)
        figures["fewest FLOPs"] = {"FLOPs": testing.flops(method.step, *method.initial_args(), case.tokens)}
    args_of = {name: copied_args(method) for name, method in made.items()}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(steps + 1 if steps else 0):
        for name, program in programs.items():
            took, (trained, state, _) = timed(lambda p=program, a=args_of[name]: p(*a, case.tokens))
            args_of[name][1:] = trained, state
            if number:
                seconds[name].append(took)
    for name, took in seconds.items():
        if took:
            figures[name]["step"] = statistics.median(took)
    return figures


def table(title: str, figures: dict[str, dict[str, float]]) -> str:
    """Returns the table of one case: absolute figures of LoRA by hand, ratios for the others."""
    reference = figures["LoRA by hand"]
    units = {"FLOPs": (1e9, "G"), "temporary": (1e6, "MB"), "step": (1e-3, "ms")}
    lines = [f"{title:44}" + "".join(f"{column:>14}" for column in reference)]
    for name, row in figures.items():
        cells = []
        for column, value in reference.items():
            size, unit = units[column]
            found = row.get(column)
            cells.append(
                "" if found is None else f"{value / size:.1f} {unit}" if row is reference else f"× {found / value:.3f}"
            )
        lines.append(f"{name:44}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    """Measures, prints, and writes the requested file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=7, help="steps to time for each method; 0 for none")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    header = metadata("small", SMALL)
    print(header["command"], "·", header["device"])
    found = {}
    for name, (make, module) in CASES.items():
        if given.only in name:
            found[name] = measure(make(), module, steps=given.steps)
            print("\n" + table(name, found[name]), flush=True)
            jax.clear_caches()
    if given.json:
        given.json.write_text(json.dumps(header | {"cases": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
