"""Host memory: which arrays are in it, and moves between it and the memory of the devices.

The type of an array in JAX includes its memory space, so these functions work on traced arrays, too.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import Array

Space = jax.memory.Space
HOST_KIND = "pinned_host"


def is_in_host_memory(array: Any) -> bool:
    """Whether an array, or the array that a `ShapeDtypeStruct` describes, is in host memory."""
    return isinstance(array, (Array, jax.ShapeDtypeStruct)) and jax.typeof(array).memory_space is Space.Host


def to_device(array: Array) -> Array:
    """Moves an array to the memory of its devices, with the same sharding."""
    moved: Array = jax.device_put(array, Space.Device)
    return moved


def to_host(array: Array) -> Array:
    """Moves an array to the pinned memory of the host, with the same sharding."""
    moved: Array = jax.device_put(array, Space.Host)
    return moved
