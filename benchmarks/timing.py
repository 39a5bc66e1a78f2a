"""A step, jitted as in training, and what a call takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from decoder import Method


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result, waited for."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def jitted(method: Method) -> Any:
    """The step as in training: what it replaces is donated."""
    return jax.jit(method.step, donate_argnums=(1, 2))


def start_of(method: Method) -> list[Any]:
    """The arguments of the first step, copied: methods share the case's arrays, and a step donates its own."""
    frozen, trained, state = method.start()
    return [frozen, *jax.tree_util.tree_map(jnp.copy, (trained, state))]
