"""The fingerprint of a base: shape and dtype of every leaf, and a digest of up to 64 values of each weight.

That of a quantized leaf also has its format, and the digest is of its codes and scales.

Values are read by index, so no leaf is copied or gathered, whatever its size. The fingerprint does not depend on the
backend, the sharding or the number of processes.
"""

from __future__ import annotations

import functools
import hashlib
import weakref
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from .._core.paths import differences, flatten
from .._core.stored import StoredLeaf
from .._core.values import in_device_memory
from ._arrays import check_not_deleted, describe_array

# path -> {"shape": […], "dtype": "…", "content": "…"}, without "content" for leaves that are not weights or not arrays;
# with "storage" for leaves that are stored in another form than as an array
Fingerprint = Mapping[str, Mapping[str, Any]]

_SAMPLES = 64
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: its multiples are spread evenly, not along a row or column


class SavedLeaf(jax.ShapeDtypeStruct):
    """A leaf that is known from the fingerprint of another checkpoint only; its entry is `saved`."""

    def __init__(self, saved: Mapping[str, Any]) -> None:
        super().__init__(saved["shape"], saved["dtype"])
        self.saved = saved


def fingerprint(base: Any, adapted: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Returns a description of every leaf by path, in JSON values, with the dtypes that JAX would use.

    Args:
      base: the tree.
      adapted: paths of leaves that count as weights whatever their dtype.
    """
    found: dict[str, dict[str, Any]] = {
        path: dict(leaf.saved)
        if isinstance(leaf, SavedLeaf)
        else {**describe_array(leaf), "dtype": _in_jax(_dtype(leaf)), **_storage(leaf)}
        for path, leaf in flatten(base)[0].items()
    }
    for path, values in _samples(weights_of(base, adapted)).items():
        found[path]["content"] = _digest(values, found[path]["dtype"])
    return found


def _storage(leaf: Any) -> dict[str, str]:
    return {"storage": leaf.storage} if isinstance(leaf, StoredLeaf) else {}


def weights_of(base: Any, adapted: Collection[str]) -> dict[str, Any]:
    """Returns the leaves that an adapter depends on: adapted leaves, and all floating-point leaves.

    The other leaves of a model's state, such as PRNG keys, counters, steps and masks, do not affect the adapter.
    """
    leaves = flatten(base)[0]
    return {path: leaf for path, leaf in leaves.items() if path in adapted or _is_inexact(_dtype(leaf))}


def saved_weights(saved: Fingerprint, adapted: Collection[str]) -> Fingerprint:
    """Returns the same leaves of a fingerprint."""
    return {path: leaf for path, leaf in saved.items() if path in adapted or _is_inexact(leaf["dtype"])}


def structural_differences(saved: Fingerprint, given: Mapping[str, Any]) -> list[str]:
    """Returns a line for each difference in paths and shapes between the saved and the given weights."""
    return differences(
        {repr(path): tuple(leaf["shape"]) for path, leaf in saved.items()},
        {repr(path): tuple(describe_array(leaf)["shape"]) for path, leaf in given.items()},
        only_one="is not in `base`",
        only_other="is in `base` and was not when the adapter was saved",
        unlike="has shape {other}; it had {one}",
    )


def content_differences(saved: Fingerprint, given: Mapping[str, Any]) -> list[str]:
    """Returns a line for each difference in format, dtype or values between weights with the same paths."""
    lines = []
    samples = _samples({path: leaf for path, leaf in given.items() if "content" in saved[path]})
    for path, leaf in given.items():
        was, got = saved[path]["dtype"], _dtype(leaf)
        was_stored, stored = (found.get("storage", "an array") for found in (saved[path], _storage(leaf)))
        if stored != was_stored:
            lines.append(f"{path!r} is stored as {stored}; it was {was_stored}")
        elif _in_jax(was) != _in_jax(got):
            lines.append(f"{path!r} has dtype {_in_jax(got)}; it had {_in_jax(was)}")
        # lora_jax 0.1.0 computed the digest of NumPy's float64 in float64, which only NumPy's float64 can reproduce.
        elif path in samples and was in (got, _in_jax(got)) and _digest(samples[path], was) != saved[path]["content"]:
            lines.append(f"{path!r} has other values")
    return lines


# Dtypes by name


def _dtype(leaf: Any) -> str:
    dtype: str = describe_array(leaf)["dtype"]
    return dtype


def _numeric(dtype: str) -> np.dtype[Any] | None:
    """Returns the dtype of this name, of NumPy, JAX or a Python number; None if it is not numeric."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:  # a PRNG key's dtype, or another type
        return None
    return found if jnp.issubdtype(found, np.number) else None


def _is_inexact(dtype: str) -> bool:
    numeric = _numeric(dtype)
    return numeric is not None and jnp.issubdtype(numeric, np.inexact)


def _in_jax(dtype: str) -> str:
    """Returns the dtype that JAX converts to: without `jax_enable_x64`, float32 for NumPy's float64."""
    numeric = _numeric(dtype)
    return dtype if numeric is None else str(jax.dtypes.canonicalize_dtype(numeric))


# Samples of values

# The samples of JAX arrays by `id`, valid while the weak reference to the array is alive. JAX arrays are immutable. All
# processes have the same entries, so either all of them or none run the lookup.
_cache: dict[int, tuple[weakref.ref[Array], Array]] = {}


def _samples(leaves: Mapping[str, Any]) -> dict[str, list[np.ndarray[Any, Any]]]:
    """Returns samples of the arrays of all leaves that have values; dispatches all lookups before the first wait."""
    with jax.set_mesh(None), jax.enable_x64(True):  # a mesh in the context would apply to every lookup
        samples = {path: [_sample(path, array) for array in _arrays(leaf)] for path, leaf in leaves.items()}
    return {
        path: [np.asarray(values).view(dtype) for values, dtype in found]
        for path, parts in samples.items()
        if len(found := [part for part in parts if part is not None]) == len(parts)
    }


def _arrays(leaf: Any) -> list[Any]:
    """Returns the arrays of a stored leaf; otherwise the leaf itself."""
    return jax.tree.leaves(leaf) if isinstance(leaf, StoredLeaf) else [leaf]


def _sample(path: str, leaf: Any) -> tuple[Any, Any] | None:
    """Returns the sampled values of a leaf, or their bits, and their dtype; None if the leaf has no values."""
    if isinstance(leaf, np.ndarray | np.generic | float | complex):
        values = np.asarray(leaf)
        return values[_indices(values.shape)], values.dtype
    if not isinstance(leaf, Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return None
    check_not_deleted(leaf, "the values of `base`", repr(path))
    reference, sample = _cache.get(id(leaf), (None, None))
    if reference is None or reference() is not leaf:
        key, sample = id(leaf), _sample_array(leaf)
        _cache[key] = weakref.ref(leaf, lambda _: _cache.pop(key, None)), sample
    return sample, leaf.dtype


def _sample_array(leaf: Array) -> Any:
    if not leaf.size:
        return np.zeros(0, leaf.dtype)
    indices = _indices(leaf.shape)
    sharding = leaf.sharding
    if sharding.memory_kind == "pinned_host" and leaf.is_fully_addressable:  # devices cannot compute on host memory
        return np.asarray(leaf)[indices]
    # Each device reads from its own shard, and the results are summed. Explicit mesh axes require an output sharding.
    replicated = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    return _lookup(in_device_memory(leaf), indices, replicated)


@functools.partial(jax.jit, static_argnums=2)
def _lookup(values: Any, indices: tuple[Any, ...], sharding: Any) -> Any:
    return _bits(values).at[indices].get(out_sharding=sharding)


def _bits(values: Array) -> Array:
    """Returns floating-point values as integers, for which the sum with zeros is exact on every device."""
    if not jnp.issubdtype(values.dtype, np.floating) or (bits := jnp.finfo(values.dtype).bits) < 8:
        return values
    return jax.lax.bitcast_convert_type(values, jnp.dtype(f"uint{bits}"))


def _digest(samples: list[np.ndarray[Any, Any]], dtype: str) -> str:
    """Returns the digest of a leaf of the given dtype, or of a stored leaf, whose arrays have their own dtypes."""
    if len(samples) == 1:
        return _digest_of(samples[0], dtype)
    digests = [_digest_of(values, _in_jax(str(values.dtype))) for values in samples]
    return hashlib.blake2b("".join(digests).encode(), digest_size=8).hexdigest()


def _digest_of(values: np.ndarray[Any, Any], dtype: str) -> str:
    with np.errstate(over="ignore"):
        values = values.astype(jnp.dtype(dtype))
    values = np.where(values == 0, np.zeros_like(values), values)  # −0 equals 0
    return hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()


def _indices(shape: tuple[int, ...]) -> tuple[np.ndarray[Any, Any], ...]:
    """Returns the indices of all elements of a small array, or of `_SAMPLES` elements of a large one."""
    size = int(np.prod(shape, dtype=np.int64))
    flat = range(size) if size <= _SAMPLES else [(k * _GOLDEN % 2**64) * size >> 64 for k in range(_SAMPLES)]
    return np.unravel_index(np.array(flat, np.int64), shape) if shape else ()
