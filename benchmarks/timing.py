"""Jits a step as in training, and times calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from against.figures import progress
from decoder import Method


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the seconds until the result is ready, and the result."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def jitted(method: Method) -> Any:
    """Returns the jitted step, which donates trained arrays and optimizer state."""
    return jax.jit(method.step, donate_argnums=(1, 2))


def copied_args(method: Method) -> list[Any]:
    """Returns copies of the arguments of the first step, because a step donates arrays that methods share."""
    frozen, trained, state = method.initial_args()
    return [frozen, *jax.tree_util.tree_map(jnp.copy, (trained, state))]


def run(
    programs: Mapping[str, Any], args: dict[str, list[Any]], inputs: Any, *, steps: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Runs the programs interleaved; returns the losses of the first step and the seconds of all others."""
    losses: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    names = list(programs)
    for number in range(steps + 1):
        progress(f"step {number} of {steps}")
        for name in names:
            took, (trained, state, loss) = timed(lambda n=name: programs[n](*args[n], inputs))
            args[name][1:] = trained, state
            if number:
                seconds[name].append(took)
            else:
                losses[name] = float(loss)
        names = names[1:] + names[:1]  # the preceding program affects the processor's caches
    return losses, seconds
