"""Checks of the values of arrays, computed on the devices that hold them.

A kernel may be sharded over several processes, none of which can read all of it. The functions here reduce it on its
devices and do not copy it to the host. Every process must call them, and gets the same result.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from .contract import widest


def is_concrete(x: Any) -> bool:
    """Whether an array has values, that is, is not a tracer."""
    return not isinstance(x, Tracer)


def is_finite(array: Any) -> bool:
    """Whether no element is NaN or infinite."""
    if isinstance(array, np.ndarray):
        return bool(np.isfinite(array).all())
    with jax.ensure_compile_time_eval():  # under `jit`, an array that is closed over has values
        finite = jnp.isfinite(in_device_memory(array)).all()
    return not is_concrete(finite) or bool(finite)  # under `jet` every result is a tracer


def equal(one: Any, other: Any) -> bool:
    """Whether two arrays have the same shape and values; NaNs are equal.

    A NumPy array is compared with a JAX array in the dtype to which JAX converts it.
    """
    if one is other or one.shape != other.shape:
        return one is other
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return bool(np.all((one == other) | ((one != one) & (other != other))))
    with jax.ensure_compile_time_eval():
        return bool(_equal(*on_same_devices(one, other)))


@jax.jit
def _equal(one: Array, other: Array) -> Array:
    wide = widest(one.dtype, other.dtype)
    one, other = one.astype(wide), other.astype(wide)
    return jnp.all((one == other) | ((one != one) & (other != other)))


def on_same_devices(*arrays: Any) -> tuple[Array, ...]:
    """Moves arrays of one shape to the devices of the first JAX array among them, with the same sharding."""
    first = next((array for array in arrays if isinstance(array, Array)), None)
    if first is None:
        return tuple(map(jnp.asarray, arrays))
    sharding = in_device_memory(first).sharding
    return tuple(array if _is_sharded_as(array, sharding) else jax.device_put(array, sharding) for array in arrays)


def _is_sharded_as(array: Any, sharding: Any) -> bool:
    return isinstance(array, Array) and array.sharding == sharding


def in_device_memory(array: Any) -> Any:
    """Moves a JAX array from host memory to the memory of its devices; returns anything else unchanged."""
    if not isinstance(array, Array) or not is_concrete(array):
        return array
    device: Any = next(iter(array.sharding.device_set))
    kind = device.default_memory().kind
    if array.sharding.memory_kind == kind:
        return array
    return jax.device_put(array, array.sharding.with_memory_kind(kind))


def on_host(array: Any) -> np.ndarray[Any, Any]:
    """Copies a small array to the host, gathered from all processes; not for kernels."""
    if isinstance(array, Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        assert isinstance(array.sharding, NamedSharding)
        array = jax.device_put(array, NamedSharding(array.sharding.mesh, PartitionSpec()))
    return np.asarray(array)
