"""AdaLoRA's schedule of the number of directions."""

from __future__ import annotations

import bisect
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from .._errors import SpecError


def budget(step: Any, *, start: int, end: int, warmup: int, settle: int, total: int) -> Array:
    """Returns how many directions are kept at a step: a cubic decrease from `start` to `end`.

        b(t) = start                                                                    for t ≤ warmup
        b(t) = end + ⌊(start - end)·(1 - (t - warmup)/(total - settle - warmup))³⌋      in between
        b(t) = end                                                                      for t ≥ total - settle

    The schedule of AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) as in the authors' code. The paper prints
    t - t_i - t_f in place of t - warmup, which would begin above `start`. Computed in integers, so it is exact.

    >>> [int(budget(step, start=12, end=4, warmup=1, settle=2, total=7)) for step in range(8)]
    [12, 12, 7, 5, 4, 4, 4, 4]

    Args:
      step: t, the number of updates so far; may be traced, and may be an array.
      start: b⁽⁰⁾, the initial number of directions over all kernels and layers.
      end: b⁽ᵀ⁾, the final number, likewise.
      warmup: t_i, the number of steps at the beginning with all directions.
      settle: t_f, the number of steps at the end with the final number.
      total: T, the number of steps.

    Returns:
      int32, with the shape of `step`.

    Raises:
      SpecError: if `end` is not in [1, start], or if no step is left between `warmup` and `settle`.
    """
    check_schedule(start=start, end=end, warmup=warmup, settle=settle, total=total)
    drops = _drops(start - end, warmup, total - settle)
    return (start - jnp.searchsorted(drops, jnp.asarray(step), side="right")).astype(jnp.int32)


def check_schedule(*, start: int, end: int, warmup: int, settle: int, total: int) -> None:
    """Raises `SpecError` for a schedule that `budget` does not accept."""
    if not 1 <= end <= start:
        raise SpecError(
            f"Expected `end` in [1, {start}]; got end={end}.\n"
            f"  `end` counts the directions of all kernels and layers together; initially there are {start}."
        )
    if min(warmup, settle) < 0 or warmup + settle >= total:
        raise SpecError(
            f"Expected warmup and settle of at least 0 and warmup + settle < total; got warmup={warmup}, "
            f"settle={settle}, total={total}."
        )


@functools.cache
def _drops(height: int, first: int, last: int) -> np.ndarray:
    """Returns the steps at which the budget drops by one, in order; a step at which it drops by n occurs n times."""
    length = last - first

    def above_end(remaining: int) -> int:
        return height * remaining**3 // length**3

    most = (bisect.bisect_left(range(length + 1), above, key=above_end) - 1 for above in range(height, 0, -1))
    return np.array([last - remaining for remaining in most], np.int32)
