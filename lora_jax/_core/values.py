"""What the values of arrays tell, computed where the arrays are.

A kernel may be sharded over several processes, none of which can read all of it. Nothing here copies one to the host:
the devices reduce it together, and every process has the same answer. All processes have to ask.
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
    """Whether an array has values, as it does outside a trace."""
    return not isinstance(x, Tracer)


def is_finite(array: Any) -> bool:
    """Whether no element is NaN or infinite."""
    if isinstance(array, np.ndarray):
        return bool(np.isfinite(array).all())
    with jax.ensure_compile_time_eval():  # under `jit` an array from outside still has values
        finite = jnp.isfinite(near(array)).all()
    return not is_concrete(finite) or bool(finite)  # under `jet` whatever is computed is traced, and has no value


def equal(one: Any, other: Any) -> bool:
    """Whether two arrays have the same shape and the same values; a NaN is equal to a NaN.

    Of a NumPy array and a JAX array, at the precision at which JAX takes the former.
    """
    if one is other or one.shape != other.shape:
        return one is other
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return bool(np.all((one == other) | ((one != one) & (other != other))))
    with jax.ensure_compile_time_eval():
        return bool(_equal(*together(one, other)))


@jax.jit
def _equal(one: Array, other: Array) -> Array:
    wide = widest(one.dtype, other.dtype)
    one, other = one.astype(wide), other.astype(wide)
    return jnp.all((one == other) | ((one != one) & (other != other)))


def together(*arrays: Any) -> tuple[Array, ...]:
    """Arrays of one shape, all of them on the devices of the first that JAX has, and sharded as that one."""
    first = next((array for array in arrays if isinstance(array, Array)), None)
    if first is None:
        return tuple(map(jnp.asarray, arrays))
    sharding = near(first).sharding
    return tuple(array if _has(array, sharding) else jax.device_put(array, sharding) for array in arrays)


def _has(array: Any, sharding: Any) -> bool:
    return isinstance(array, Array) and array.sharding == sharding


def near(array: Any) -> Any:
    """A JAX array in its devices' own memory, to compute with, as it may be in the host's; anything else as it is."""
    if not isinstance(array, Array) or not is_concrete(array):
        return array
    device: Any = next(iter(array.sharding.device_set))
    kind = device.default_memory().kind
    if array.sharding.memory_kind == kind:
        return array
    return jax.device_put(array, array.sharding.with_memory_kind(kind))


def on_host(array: Any) -> np.ndarray[Any, Any]:
    """The values of a small array, every process's part of it; never for a kernel."""
    if isinstance(array, Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        assert isinstance(array.sharding, NamedSharding)
        array = jax.device_put(array, NamedSharding(array.sharding.mesh, PartitionSpec()))
    return np.asarray(array)
