"""Host memory: which arrays are in it, and transfers between it and the memory of the devices.

The type of an array in JAX includes its memory space, so these functions also work on traced arrays.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import Array

from .._errors import UnsupportedError

Space = jax.memory.Space
HOST_KIND = "pinned_host"  # the memory kind of `Space.Host`


def is_in_host_memory(leaf: Any) -> bool:
    """Whether an array is in host memory, or a `ShapeDtypeStruct` describes one that is."""
    return isinstance(leaf, (Array, jax.ShapeDtypeStruct)) and jax.typeof(leaf).memory_space is Space.Host


def kind_of(array_type: Any) -> str | None:
    """Returns the memory kind for shardings of an array, from its type (`jax.typeof`); None for device memory."""
    return HOST_KIND if array_type.memory_space is Space.Host else None


def to_device(array: Any) -> Array:
    """Moves an array to the memory of its devices, with the same sharding."""
    moved: Array = jax.device_put(array, Space.Device)
    return moved


def to_host(array: Any) -> Array:
    """Moves an array to host memory, with the same sharding."""
    moved: Array = jax.device_put(array, Space.Host)
    return moved


def check_host_memory(tree: Any) -> None:
    """Raises `UnsupportedError` if a device of an array has no pinned host memory.

    For traced arrays and trees without arrays, the device is JAX's default.
    """
    for device in {device for leaf in jax.tree.leaves(tree) for device in _devices(leaf)} or jax.devices()[:1]:
        kinds = [memory.kind for memory in device.addressable_memories()]
        if HOST_KIND not in kinds:
            raise UnsupportedError(
                f"Expected a backend with {HOST_KIND!r} memory; {device.platform!r} has the memory kinds {kinds}.",
                None,
                "Keep the arrays in device memory: without `optim.offload` and `sharding.to_host`.",
            )


def _devices(leaf: Any) -> set[Any]:
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    return set() if sharding is None else {next(iter(sharding.device_set))}
