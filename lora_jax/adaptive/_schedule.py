"""How many directions may be left at each step."""

from __future__ import annotations

import bisect
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from .._errors import SpecError


def budget(step: Any, *, start: int, end: int, warmup: int, settle: int, total: int) -> Array:
    """How many directions may be left at a step: falling with the cube of the time that remains.

        b(t) = end + ⌊(start - end)·(1 - (t - warmup)/(total - settle - warmup))³⌋      in between
        b(t) = start until `warmup`,  end from `total - settle` on

    The schedule of AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) as in the authors' code, which begins at `start`. The
    paper prints t - t_i - t_f in place of t - warmup, with which it would begin above. Exact, without rounding in
    floating point.

    >>> [int(budget(step, start=12, end=4, warmup=1, settle=2, total=7)) for step in range(8)]
    [12, 12, 7, 5, 4, 4, 4, 4]

    Args:
      step: t, the number of updates so far; may be traced, and an array.
      start: b⁽⁰⁾, how many there are, over all kernels and layers.
      end: b⁽ᵀ⁾, how many are left at the end, likewise.
      warmup: t_i, for how many steps all are trained.
      settle: t_f, for how many steps at the end those that are left are trained on.
      total: T, how many steps there are.

    Returns:
      int32, of the shape of `step`.

    Raises:
      SpecError: if `end` is not in [1, start], or if warmup and settle leave no step between them.
    """
    check_schedule(start=start, end=end, warmup=warmup, settle=settle, total=total)
    falls = _falls(start - end, warmup, total - settle)
    return (start - jnp.searchsorted(falls, jnp.asarray(step), side="right")).astype(jnp.int32)


def check_schedule(*, start: int, end: int, warmup: int, settle: int, total: int) -> None:
    """Raises what `budget` would."""
    if not 1 <= end <= start:
        raise SpecError(
            f"Expected to keep at least one of the {start} directions that there are at the start, and no more than "
            f"these; got end={end}.\n  It counts those of all kernels and layers together."
        )
    if min(warmup, settle) < 0 or warmup + settle >= total:
        raise SpecError(
            f"Expected steps between warmup and settling in which the budget falls, warmup + settle < total; got "
            f"warmup={warmup}, settle={settle}, total={total}."
        )


@functools.cache
def _falls(height: int, first: int, last: int) -> np.ndarray:
    """The steps at which the budget falls by one, in order; those at which it falls by more, several times."""
    length = last - first

    def above_end(remaining: int) -> int:
        return height * remaining**3 // length**3

    most = (bisect.bisect_left(range(length + 1), above, key=above_end) - 1 for above in range(height, 0, -1))
    return np.array([last - remaining for remaining in most], np.int32)
