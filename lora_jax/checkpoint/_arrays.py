"""One array of a checkpoint: what it is described as, what it must be to be saved, and what it is read as."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from .._errors import CheckpointError


def described(leaf: Any) -> dict[str, Any]:
    """Shape and dtype, as JSON keeps them; of what is no array, its type."""
    shape, dtype = getattr(leaf, "shape", ()), getattr(leaf, "dtype", type(leaf).__name__)
    return {"shape": list(shape), "dtype": str(dtype)}


def check_values(array: Any, name: str) -> None:
    """Raises `CheckpointError` if it is no array, or one without values."""
    if not isinstance(array, jax.Array | np.ndarray) or isinstance(array, jax.core.Tracer):
        raise CheckpointError(
            f"Expected arrays to save; got {type(array).__name__} as {name}.\n"
            "  Save outside `jit` and `eval_shape`, where there are values."
        )
    check_there(array, "arrays to save", name)


def check_there(array: Any, expected: str, name: str) -> None:
    """Raises `CheckpointError` if an array's values are gone."""
    if isinstance(array, jax.Array) and array.is_deleted():
        raise CheckpointError(
            f"Expected {expected}; {name} is gone: it was donated to a jitted function.\n"
            "  Save what that function returned, or save before the call."
        )


def check_width(dtype: Any, path: str, where: object) -> None:
    """Raises `CheckpointError` if JAX would make fewer bits of each number."""
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise CheckpointError(
            f"Expected to restore arrays as they were saved; JAX would cut {dtype} down at {path}, in {where}.\n"
            "  Enable 64 bits: jax.config.update('jax_enable_x64', True)."
        )


def place(array: Any, sharding: Sharding | None) -> Any:
    """What an array shall be read as.

    Raises:
      ValueError: if the sharding is none, is on no devices, or does not divide the array.
    """
    if sharding is None:
        return np.empty(array.shape, array.dtype)
    if not isinstance(sharding, Sharding):
        raise ValueError(f"{sharding!r} is no Sharding")
    _ = sharding.device_set  # raises if its mesh is abstract
    sharding.shard_shape(array.shape)  # raises if it does not divide the array
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def settled(array: Any) -> jax.Array:
    """An array that was read; from NumPy it goes to the default device, committed to none."""
    return jnp.array(array) if isinstance(array, np.ndarray) else array
