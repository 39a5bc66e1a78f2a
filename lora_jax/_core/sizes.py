"""Sizes and counts that may be symbolic, as `jax.export` has them: compared where that can be decided.

A symbolic size is a polynomial in unknown sizes of at least 1, such as `2*n + 1`. JAX adds, multiplies and hashes it
like a number, and raises where a comparison depends on the unknown sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jax.errors import InconclusiveDimensionOperation
from jax.export import is_symbolic_dim

T = TypeVar("T")


def is_known(size: Any) -> bool:
    """Whether a size or a count is a number."""
    return not is_symbolic_dim(size)


def smallest(items: Sequence[T], key: Callable[[T], Any]) -> T:
    """The item with the smallest key, the first of equal ones; the first of all if the keys cannot be compared.

    >>> smallest(["bb", "a", "c"], key=len)
    'a'
    """
    try:
        return min(items, key=key)
    except InconclusiveDimensionOperation:
        return items[0]


def may_exceed(size: Any, bound: int) -> bool:
    """Whether a size is larger than a bound, or may be if that depends on an unknown size."""
    try:
        return bool(size > bound)
    except InconclusiveDimensionOperation:
        return True


def count_text(count: Any) -> str:
    """A count as text, a symbolic one as the polynomial that it is.

    >>> count_text(12345)
    '12,345'
    """
    return f"{count:,}" if is_known(count) else str(count)
