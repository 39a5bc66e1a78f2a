"""What a variant is made with, checked and made plain Python, so that it compares, hashes and prints as a value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import SpecError


def integer(name: str, value: Any, *, least: int, below: int | None = None) -> int:
    """A whole number of Python, from one of Python, NumPy or JAX.

    Raises:
      SpecError: if it is none, or out of range.
    """
    plain = _plain(name, value)
    bound = f"of at least {least}" if below is None else f"in [{least}, {below})"
    if not isinstance(plain, int) or isinstance(plain, bool):
        raise SpecError(f"Expected an integer {bound} for `{name}`; got {value!r}.")
    if plain < least or (below is not None and plain >= below):
        raise SpecError(f"Expected an integer {bound} for `{name}`; got {name}={plain}.")
    return int(plain)


def integers(name: str, values: Any) -> tuple[int, ...]:
    """At least one integer, none below 0, as a tuple.

    Raises:
      SpecError: if they are not.
    """
    if isinstance(values, jax.core.Tracer):
        _plain(name, values)
    if not isinstance(values, Iterable) or isinstance(values, str | bytes) or getattr(values, "ndim", 1) != 1:
        raise SpecError(f"Expected a list of integers for `{name}`; got {values!r}.")
    plain = tuple(integer(name, value, least=0) for value in values)
    if not plain:
        raise SpecError(f"Expected at least one integer for `{name}`; got {values!r}.")
    return plain


def number(name: str, value: Any) -> float:
    """A finite number of Python, from one of Python, NumPy or JAX; integers stay integers.

    Raises:
      SpecError: if it is none.
    """
    plain = _plain(name, value)
    if not isinstance(plain, int | float) or isinstance(plain, bool) or not math.isfinite(plain):
        raise SpecError(f"Expected a finite number for `{name}`; got {value!r}.")
    return plain


def share(name: str, value: Any) -> float:
    """A number in [0, 1).

    Raises:
      SpecError: if it is none.
    """
    plain = number(name, value)
    if not 0 <= plain < 1:
        raise SpecError(f"Expected a number in [0, 1) for `{name}`; got {name}={plain}.")
    return plain


def flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
      SpecError: if it is neither.
    """
    plain = _plain(name, value)
    if not isinstance(plain, bool):
        raise SpecError(f"Expected True or False for `{name}`; got {value!r}.")
    return plain


def _plain(name: str, value: Any) -> Any:
    """A scalar of NumPy or JAX as Python has it; anything else as it is."""
    if isinstance(value, jax.core.Tracer):
        raise SpecError(
            f"Expected a Python value for `{name}`; got a traced array, {value}.\n"
            "  A variant is part of the program: make it outside `jit`, `grad` and `vmap`."
        )
    if not isinstance(value, np.generic | np.ndarray | jax.Array) or value.ndim:
        return value
    if jnp.issubdtype(value.dtype, jnp.floating):
        return float(value)
    return np.asarray(value).item() if value.dtype.kind in "iub" else value
