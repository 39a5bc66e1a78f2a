"""Comparison of sizes and counts that may be symbolic dimensions of `jax.export`.

A symbolic size is a polynomial in unknown sizes of at least 1, such as `2*n + 1`. JAX adds, multiplies and hashes it
like an integer, and raises if a comparison depends on the unknown sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jax.errors import InconclusiveDimensionOperation
from jax.export import is_symbolic_dim

T = TypeVar("T")


def is_known(size: Any) -> bool:
    """Whether a size or a count is an integer and not symbolic."""
    return not is_symbolic_dim(size)


def smallest(items: Sequence[T], key: Callable[[T], Any]) -> T:
    """Returns the first item with the smallest key; the first item of all if the keys cannot be compared.

    >>> smallest(["bb", "a", "c"], key=len)
    'a'
    """
    try:
        return min(items, key=key)
    except InconclusiveDimensionOperation:
        return items[0]


def may_exceed(size: Any, bound: int) -> bool:
    """Whether a size is larger than a bound for some values of the unknown sizes."""
    try:
        return bool(size > bound)
    except InconclusiveDimensionOperation:
        return True


def count_text(count: Any) -> str:
    """Formats a count; a symbolic one as a polynomial.

    >>> count_text(12345)
    '12,345'
    """
    return f"{count:,}" if is_known(count) else str(count)
