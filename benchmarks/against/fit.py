"""Converts the factors of a case to the shapes of a library's adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jax import Array

from .figures import UnfitError


def fitted(path: str, value: Array, leaves: Mapping[str, Any]) -> Array:
    """Returns `value` in the shape and dtype of the library's leaf at `path`."""
    if path not in leaves:
        raise UnfitError("makes no adapter and raises no error")
    leaf = leaves[path]
    if math.prod(leaf.shape) != value.size:
        raise UnfitError(f"makes a factor of shape {leaf.shape} instead of {value.shape}")
    return value.reshape(leaf.shape).astype(leaf.dtype)
