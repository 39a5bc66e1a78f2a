"""Measures JAX methods on one case; they take turns, so that a busy moment of the machine meets them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from decoder import Method
from timing import jitted, start_of, timed

from . import BY_HAND, WHOLE
from .cases import Case
from .figures import Figures, first_line, progress
from .flops import flops

Build = Callable[[Case], Method]
Result = Figures | str  # what it costs, or why it cannot be had


def measure(case: Case, builds: Mapping[str, Build], *, rounds: int, steps: int) -> dict[str, Result]:
    """Builds, compiles `rounds` times and runs for `steps` steps; what fails is left out from there on."""
    failed: dict[str, Result] = {}

    def each(what: str, names: Any, do: Callable[[str], Any]) -> dict[str, Any]:
        done = {}
        for name in names:
            progress(f"{what}: {name}")
            try:
                done[name] = do(name)
            except Exception as error:  # of any library
                failed[name] = first_line(error)
        return done

    methods = each("build", builds, lambda name: builds[name](case))
    args = each("start", methods, lambda name: start_of(methods[name]))
    counts = each("count", args, lambda name: flops(methods[name].step, *args[name], case.inputs))
    took: dict[str, list[float]] = {name: [] for name in counts}
    programs: dict[str, Any] = {name: None for name in counts}
    for _ in range(rounds):
        found = each("compile", programs, lambda name: compiled(methods[name], args[name], case))
        programs = {name: program for name, (_, program) in found.items()}
        for name, (seconds, _) in found.items():
            took[name].append(seconds)
    losses, seconds = run(programs, args, case, steps=steps)
    figures = {
        name: Figures(
            steps=seconds[name],
            flops=counts[name],
            temporary=int(program.memory_analysis().temp_size_in_bytes),
            optimizer=sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(args[name][2])),
            compile=took[name],
            loss=losses[name],
        )
        for name, program in programs.items()
    }
    other = {name: "computes another function" for name in disagreeing(losses)}
    return {name: (figures | failed | other)[name] for name in builds}


def compiled(method: Method, args: list[Any], case: Case) -> tuple[float, Any]:
    """Seconds to trace, lower and compile, with nothing remembered, and the program."""
    jax.clear_caches()
    return timed(lambda: jitted(method).lower(*args, case.inputs).compile())


def run(programs: Mapping[str, Any], args: dict[str, list[Any]], case: Case, *, steps: int) -> tuple[dict, dict]:
    """Trains with each program in turn; the loss of the first step, and the seconds of each step but the first."""
    losses: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    names = list(programs)
    for number in range(steps + 1):
        progress(f"step {number} of {steps}")
        for name in names:
            took, (trained, state, loss) = timed(lambda n=name: programs[n](*args[n], case.inputs))
            args[name][1:] = trained, state
            if number:
                seconds[name].append(took)
            else:
                losses[name] = float(loss)
        names = names[1:] + names[:1]  # what runs before one may warm or cool its caches
    return losses, seconds


def disagreeing(losses: Mapping[str, float]) -> list[str]:
    """Those that do not train the function of LoRA by hand; full fine-tuning starts without the adapter's."""
    expected = losses[BY_HAND]
    return [name for name, loss in losses.items() if name != WHOLE and abs(loss - expected) > 1e-3 * abs(expected)]
