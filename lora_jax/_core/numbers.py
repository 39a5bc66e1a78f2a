"""Checks of the arguments of variants, and their conversion to plain Python, which can be compared and hashed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import SpecError


def integer(name: str, value: Any, *, least: int, below: int | None = None) -> int:
    """Returns an integer of Python, NumPy or JAX as a Python int.

    Raises:
      SpecError: if it is not an integer, or out of range.
    """
    plain = _plain(name, value)
    bound = f"of at least {least}" if below is None else f"in [{least}, {below})"
    if not isinstance(plain, int) or isinstance(plain, bool):
        raise SpecError(f"Expected an integer {bound} for `{name}`; got {value!r}.")
    if plain < least or (below is not None and plain >= below):
        raise SpecError(f"Expected an integer {bound} for `{name}`; got {name}={plain}.")
    return int(plain)


def integers(name: str, values: Any) -> tuple[int, ...]:
    """Returns integers as a tuple.

    Raises:
      SpecError: if `values` is empty or not a sequence of integers, or if one is negative.
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
    """Returns a number of Python, NumPy or JAX as a Python float or, for an integer, int.

    Raises:
      SpecError: if it is not a finite number.
    """
    plain = _plain(name, value)
    if not isinstance(plain, int | float) or isinstance(plain, bool) or not math.isfinite(plain):
        raise SpecError(f"Expected a finite number for `{name}`; got {value!r}.")
    return plain


def fraction(name: str, value: Any) -> float:
    """Returns a number in [0, 1).

    Raises:
      SpecError: if it is not one.
    """
    plain = number(name, value)
    if not 0 <= plain < 1:
        raise SpecError(f"Expected a number in [0, 1) for `{name}`; got {name}={plain}.")
    return plain


def flag(name: str, value: Any) -> bool:
    """Returns a boolean of Python, NumPy or JAX as a Python bool.

    Raises:
      SpecError: if it is not a boolean.
    """
    plain = _plain(name, value)
    if not isinstance(plain, bool):
        raise SpecError(f"Expected True or False for `{name}`; got {value!r}.")
    return plain


def chosen(name: str, value: Any, choices: Sequence[str]) -> str:
    """Returns `value`.

    Raises:
      SpecError: if it is not one of the choices.
    """
    if value not in choices:
        raise SpecError(f"Expected {' or '.join(map(repr, choices))} for `{name}`; got {value!r}.")
    return str(value)


def _plain(name: str, value: Any) -> Any:
    """Converts a scalar of NumPy or JAX to Python; returns anything else unchanged."""
    if isinstance(value, jax.core.Tracer):
        raise SpecError(
            f"Expected a Python value for `{name}`; got a traced array, {value}.\n"
            "  A variant is static: create it outside `jit`, `grad` and `vmap`."
        )
    if not isinstance(value, np.generic | np.ndarray | jax.Array) or value.ndim:
        return value
    if jnp.issubdtype(value.dtype, jnp.floating):
        return float(value)
    return np.asarray(value).item() if value.dtype.kind in "iub" else value
