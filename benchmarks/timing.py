"""Jits a step as in training, and times calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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
