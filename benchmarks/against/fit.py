"""Gives a library's own adapter the values of a case; refuses where it has no place for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jax import Array

from .figures import UnfitError


def fitted(path: str, value: Array, made: Mapping[str, Any]) -> Array:
    """`value` in the shape and dtype of the leaf that the library made at `path`."""
    if path not in made:
        raise UnfitError("makes no adapter, and says nothing")
    leaf = made[path]
    if math.prod(leaf.shape) != value.size:
        raise UnfitError(f"makes a factor of shape {leaf.shape}, where {value.shape} is needed")
    return value.reshape(leaf.shape).astype(leaf.dtype)
