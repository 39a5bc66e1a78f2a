"""Measures JAX methods on one case, interleaved, so that other load on the machine affects all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from decoder import Method
from timing import copied_args, jitted, run, timed

from . import BY_HAND, FULL
from .cases import Case
from .figures import Figures, first_line, progress
from .flops import flops

Build = Callable[[Case], Method]
Result = Figures | str  # the figures, or why they cannot be measured


def measure(case: Case, builds: Mapping[str, Build], *, rounds: int, steps: int) -> dict[str, Result]:
    """Builds each method, compiles it `rounds` times and runs `steps` steps. Methods that fail are not continued."""
    failed: dict[str, Result] = {}

    def for_each(stage: str, names: Any, function: Callable[[str], Any]) -> dict[str, Any]:
        results = {}
        for name in names:
            progress(f"{stage}: {name}")
            try:
                results[name] = function(name)
            except Exception as error:  # libraries raise errors of any type
                failed[name] = first_line(error)
        return results

    methods = for_each("build", builds, lambda name: builds[name](case))
    args = for_each("copy", methods, lambda name: copied_args(methods[name]))
    counts = for_each("count", args, lambda name: flops(methods[name].step, *args[name], case.inputs))
    compile_seconds: dict[str, list[float]] = {name: [] for name in counts}
    programs: dict[str, Any] = {name: None for name in counts}
    for _ in range(rounds):
        found = for_each("compile", programs, lambda name: compile_step(methods[name], args[name], case))
        programs = {name: program for name, (_, program) in found.items()}
        for name, (seconds, _) in found.items():
            compile_seconds[name].append(seconds)
    losses, seconds = run(programs, args, case.inputs, steps=steps)
    figures = {
        name: Figures(
            steps=seconds[name],
            flops=counts[name],
            temporary=int(program.memory_analysis().temp_size_in_bytes),
            optimizer=sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(args[name][2])),
            compile=compile_seconds[name],
            loss=losses[name],
        )
        for name, program in programs.items()
    }
    other = {name: "computes another function" for name in disagreeing(losses)}
    return {name: (figures | failed | other)[name] for name in builds}


def compile_step(method: Method, args: list[Any], case: Case) -> tuple[float, Any]:
    """Returns the seconds to trace, lower and compile with cleared caches, and the program."""
    jax.clear_caches()
    return timed(lambda: jitted(method).lower(*args, case.inputs).compile())


def disagreeing(losses: Mapping[str, float]) -> list[str]:
    """Returns the methods with another first loss than LoRA by hand, except full fine-tuning, which has no adapter."""
    expected = losses[BY_HAND]
    return [name for name, loss in losses.items() if name != FULL and abs(loss - expected) > 1e-3 * abs(expected)]
