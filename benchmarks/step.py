"""The cost of a training step with `lora()`, LoRA by hand, merged kernels, and full fine-tuning.

Usage:
    python benchmarks/step.py
    python benchmarks/step.py --size base
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import records
from against.figures import progress
from models import METHODS, Case, case
from sizes import BASE, SMALL, Size
from timing import copied_args, jitted, run, timed

from lora_jax import testing


class Plan(NamedTuple):
    """A size, how many times each step is traced and compiled, and how many steps are timed."""

    size: Size
    rounds: int
    steps: int


PLANS = {"small": Plan(SMALL, 2, 7), "base": Plan(BASE, 1, 3)}
# FLOPs are counted on the jaxpr, loop bodies times their number of iterations. The compiler counts a loop body once.
COLUMNS = {
    "FLOPs": "×G",
    "of the compiler": "×G",
    "temporary": "×MB",
    "trace + lower": "×s",
    "compile": "×s",
    "step": "×ms",
}


def measure(case: Case, *, rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """Measures all methods on a case. They are interleaved, so that other load on the machine affects all of them."""
    methods = {name: make(case) for name, make in METHODS.items()}
    args = {name: copied_args(method) for name, method in methods.items()}
    rows: dict[str, dict[str, Any]] = {}
    programs = {}
    for name, method in methods.items():
        rows[name] = {"FLOPs": testing.flops(method.step, *args[name], case.tokens), "trace + lower": [], "compile": []}
    for _ in range(rounds if steps else 1):
        for name, method in methods.items():
            progress(f"compile: {name}")
            jax.clear_caches()
            lower, lowered = timed(lambda m=method, a=args[name]: jitted(m).lower(*a, case.tokens))
            compiling, programs[name] = timed(lowered.compile)
            if steps:
                rows[name]["trace + lower"].append(lower)
                rows[name]["compile"].append(compiling)
    losses, seconds = run(programs, args, case.tokens, steps=steps)
    check_losses(losses)
    for name, row in rows.items():
        row["of the compiler"] = programs[name].cost_analysis()["flops"]
        row["temporary"] = programs[name].memory_analysis().temp_size_in_bytes
        row["step"] = seconds[name]
    return rows


def check_losses(losses: Mapping[str, float]) -> None:
    """Asserts that all methods train the same function, except full fine-tuning, which has no adapter."""
    for name, loss in losses.items():
        if name != "full fine-tuning":
            np.testing.assert_allclose(loss, losses["LoRA by hand"], rtol=1e-2, err_msg=name)


def tables(size: Size, *, rounds: int, steps: int) -> Iterator[records.Table]:
    """Yields a table for each dtype, with unrolled and with scanned layers."""
    for dtype in (jnp.float32, jnp.bfloat16):
        for scanned in (False, True):
            title = f"{jnp.dtype(dtype).name}, {'scan + remat' if scanned else 'unrolled'}"
            progress(title)
            rows = measure(case(size, scanned=scanned, dtype=dtype), rounds=rounds, steps=steps)
            yield records.Table(title, COLUMNS, rows)


def main() -> None:
    """Measures, prints, and writes the requested file."""
    parser = records.parser(__doc__)
    parser.add_argument("--size", choices=PLANS, default="small")
    parser.add_argument("--rounds", type=int, help="how many times each step is traced and compiled")
    parser.add_argument("--steps", type=int, help="steps to time; 0 for deterministic figures only")
    given = parser.parse_args()
    size, rounds, steps = PLANS[given.size]
    records.publish(
        tables(size, rounds=given.rounds or rounds, steps=steps if given.steps is None else given.steps), given.json
    )


if __name__ == "__main__":
    main()
