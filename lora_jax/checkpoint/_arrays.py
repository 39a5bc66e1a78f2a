"""One array of a checkpoint: its description, the checks before it is saved, and how it is read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from .._errors import CheckpointError


def describe_array(leaf: Any) -> dict[str, Any]:
    """Returns shape and dtype as JSON values; for a leaf that is not an array, the type in place of the dtype."""
    shape, dtype = getattr(leaf, "shape", ()), getattr(leaf, "dtype", type(leaf).__name__)
    return {"shape": list(shape), "dtype": str(dtype)}


def check_values(array: Any, name: str) -> None:
    """Raises `CheckpointError` if `array` is not an array, or has no values."""
    if not isinstance(array, jax.Array | np.ndarray) or isinstance(array, jax.core.Tracer):
        raise CheckpointError(
            f"Expected arrays to save; got {type(array).__name__} as {name}.\n"
            "  Save outside `jit` and `eval_shape`, where arrays have values."
        )
    if isinstance(array, np.ndarray) and not array.dtype.isnative:
        raise CheckpointError(
            f"Expected arrays in the byte order of this machine to save; got {array.dtype} as {name}.\n"
            f"  Convert it: array.astype({array.dtype.name!r})."
        )
    check_not_deleted(array, "arrays to save", name)


def check_not_deleted(array: Any, expected: str, name: str) -> None:
    """Raises `CheckpointError` if an array was deleted."""
    if isinstance(array, jax.Array) and array.is_deleted():
        raise CheckpointError(
            f"Expected {expected}; {name} is deleted, because it was donated to a jitted function.\n"
            "  Save the result of that function, or save before the call."
        )


def check_dtype(dtype: Any, path: str, where: object) -> None:
    """Raises `CheckpointError` if JAX would convert the dtype to one with fewer bits."""
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise CheckpointError(
            f"Expected to restore {dtype} at {path}, in {where}; without 64-bit types, JAX would truncate it.\n"
            "  Enable 64-bit types: jax.config.update('jax_enable_x64', True)."
        )


def restore_target(array: Any, sharding: Sharding | None) -> Any:
    """Returns what Orbax reads an array to: a shape with a sharding, or without a sharding a NumPy array.

    Raises:
      ValueError: if `sharding` is not a `Sharding`, has an abstract mesh, or does not divide the array.
    """
    if sharding is None:
        return np.empty(array.shape, array.dtype)
    if not isinstance(sharding, Sharding):
        raise ValueError(f"{sharding!r} is not a Sharding")
    _ = sharding.device_set  # raises if the mesh is abstract
    sharding.shard_shape(array.shape)  # raises if it does not divide the array
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def to_jax(array: Any) -> jax.Array:
    """Converts a NumPy array to an uncommitted JAX array."""
    return jnp.array(array) if isinstance(array, np.ndarray) else array
