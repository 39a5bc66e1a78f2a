"""FLOPs, memory and time of a training step in each form of evaluation, relative to LoRA by hand.

Usage:
    python benchmarks/forms.py
    python benchmarks/forms.py --steps 0        # deterministic figures only
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import conv
import jax
import models
import records
from against.figures import progress
from decoder import Method
from sizes import SMALL
from timing import copied_args, jitted, run

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


def measure(case: Any, module: Any, *, steps: int) -> dict[str, dict[str, Any]]:
    """Returns the figures of all methods; the steps are interleaved."""
    made = {name: make(case) for name, make in methods(module).items()}
    rows: dict[str, dict[str, Any]] = {}
    programs: dict[str, Any] = {}
    for name, method in made.items():
        args = (*copied_args(method), case.tokens)
        programs[name] = jitted(method).lower(*args).compile()
        rows[name] = {
            "FLOPs": testing.flops(method.step, *args),
            "temporary bytes": programs[name].memory_analysis().temp_size_in_bytes,
        }
    with exhaustive():
        method = module.through_lora(case)
        rows["fewest FLOPs"] = {"FLOPs": testing.flops(method.step, *method.initial_args(), case.tokens)}
    if steps:
        args_of = {name: copied_args(method) for name, method in made.items()}
        _, seconds = run(programs, args_of, case.tokens, steps=steps)
        for name, took in seconds.items():
            rows[name]["time of a step"] = took
    return rows


def tables(only: str, steps: int) -> Iterator[records.Table]:
    """Yields a table for each figure, with a row for each case."""
    found = {}
    for name, (make, module) in CASES.items():
        if only in name:
            progress(name)
            found[name] = measure(make(), module, steps=steps)
            jax.clear_caches()
    for figure, unit in {"FLOPs": "×G", "temporary bytes": "×MB", "time of a step": "×ms"}.items():
        yield across(figure, unit, found)  # without columns if nothing was timed


def across(figure: str, unit: str, found: dict[str, dict[str, dict[str, Any]]]) -> records.Table:
    """Returns one figure of all methods by case, relative to the first method."""
    rows = {case: {name: row[figure] for name, row in rows.items() if figure in row} for case, rows in found.items()}
    return records.Table(figure[0].upper() + figure[1:], dict.fromkeys(max(rows.values(), key=len), unit), rows, True)


def main() -> None:
    """Measures, prints, and writes the requested file."""
    parser = records.parser(__doc__)
    parser.add_argument("--steps", type=int, default=7, help="steps to time for each method; 0 for none")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    given = parser.parse_args()
    records.publish(tables(given.only, given.steps), given.json)


if __name__ == "__main__":
    main()
