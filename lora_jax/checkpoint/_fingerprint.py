"""A base model's fingerprint: every leaf's shape and dtype, and of each weight a digest of a few dozen values.

Cheap whatever the size: values are read by index, and no leaf is ever copied or gathered whole. The same on every
backend, wherever the leaves are, and however many processes share them.
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
from .._core.values import in_device_memory
from ._arrays import check_there, described

# path -> {"shape": […], "dtype": "…", "content": "…"}; without content if it is no weight, or only its shape is known
Fingerprint = Mapping[str, Mapping[str, Any]]

_SAMPLES = 64
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: its multiples spread evenly, and along no row or column


def fingerprint(base: Any, adapted: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Describes every leaf of a tree, by path, in what JSON can hold, at the precision at which JAX takes it.

    Args:
      base: the tree.
      adapted: paths of leaves that are weights whatever their dtype is.
    """
    found: dict[str, dict[str, Any]] = {
        path: {**described(leaf), "dtype": _in_jax(_dtype(leaf))} for path, leaf in flatten(base)[0].items()
    }
    for path, values in _samples(weights_of(base, adapted)).items():
        found[path]["content"] = _digest(values, found[path]["dtype"])
    return found


def weights_of(base: Any, adapted: Collection[str]) -> dict[str, Any]:
    """The leaves that an adapter depends on: those that are adapted, and all of floating-point numbers.

    The state of a model holds more than that, such as keys and counts of its random streams, steps, masks and names.
    """
    leaves = flatten(base)[0]
    return {path: leaf for path, leaf in leaves.items() if path in adapted or _is_inexact(_dtype(leaf))}


def saved_weights(saved: Fingerprint, adapted: Collection[str]) -> Fingerprint:
    """What a fingerprint says of the same."""
    return {path: leaf for path, leaf in saved.items() if path in adapted or _is_inexact(leaf["dtype"])}


def structural_differences(saved: Fingerprint, given: Mapping[str, Any]) -> list[str]:
    """What differs in paths and shapes between the weights that were saved and those that are given, a line each."""
    return differences(
        {repr(path): tuple(leaf["shape"]) for path, leaf in saved.items()},
        {repr(path): tuple(described(leaf)["shape"]) for path, leaf in given.items()},
        only_one="is not in `base`",
        only_other="is in `base` and was not when the adapter was saved",
        unlike="has shape {other}; it had {one}",
    )


def content_differences(saved: Fingerprint, given: Mapping[str, Any]) -> list[str]:
    """What differs in dtypes and values, of weights with the same paths, a line each; values where both are known."""
    lines = []
    samples = _samples({path: leaf for path, leaf in given.items() if "content" in saved[path]})
    for path, leaf in given.items():
        was, got = saved[path]["dtype"], _dtype(leaf)
        if _in_jax(was) != _in_jax(got):
            lines.append(f"{path!r} has dtype {_in_jax(got)}; it had {_in_jax(was)}")
        # lora_jax 0.1 took the digest of NumPy's float64 as it is; with that, only NumPy's float64 can be compared.
        elif path in samples and was in (got, _in_jax(got)) and _digest(samples[path], was) != saved[path]["content"]:
            lines.append(f"{path!r} holds other values")
    return lines


# Dtypes by name


def _dtype(leaf: Any) -> str:
    dtype: str = described(leaf)["dtype"]
    return dtype


def _number(dtype: str) -> np.dtype[Any] | None:
    """The dtype of numbers that has this name: NumPy's, JAX's, or of a Python number."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:  # a random key's, or the name of another type
        return None
    return found if jnp.issubdtype(found, np.number) else None


def _is_inexact(dtype: str) -> bool:
    number = _number(dtype)
    return number is not None and jnp.issubdtype(number, np.inexact)


def _in_jax(dtype: str) -> str:
    """The dtype that JAX gives such numbers: without 64 bits, NumPy's float64 is float32."""
    number = _number(dtype)
    return dtype if number is None else str(jax.dtypes.canonicalize_dtype(number))


# Samples of values

# What was found in each array that still exists, by its id, with a weak reference to the array, which does not change.
# All processes hold the same arrays, so that all of them look up together, or none does.
_found: dict[int, tuple[weakref.ref[Array], Array]] = {}


def _samples(leaves: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The sampled values of all leaves that have values to read; all are asked for before one is waited for."""
    with jax.set_mesh(None), jax.enable_x64(True):  # a mesh in context would be imposed on every lookup
        samples = {path: sample for path, leaf in leaves.items() if (sample := _sample(path, leaf)) is not None}
    return {path: np.asarray(values).view(dtype) for path, (values, dtype) in samples.items()}


def _sample(path: str, leaf: Any) -> tuple[Any, Any] | None:
    """A leaf's sampled values, or their bits, and what they shall be read as; None if there are no values."""
    if isinstance(leaf, np.ndarray | np.generic | float | complex):
        values = np.asarray(leaf)
        return values[_places(values.shape)], values.dtype
    if not isinstance(leaf, Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return None
    check_there(leaf, "the values of `base`", repr(path))
    reference, found = _found.get(id(leaf), (None, None))
    if reference is None or reference() is not leaf:
        key, found = id(leaf), _sample_array(leaf)
        _found[key] = weakref.ref(leaf, lambda _: _found.pop(key, None)), found
    return found, leaf.dtype


def _sample_array(leaf: Array) -> Any:
    if not leaf.size:
        return np.zeros(0, leaf.dtype)
    places = _places(leaf.shape)
    sharding = leaf.sharding
    if sharding.memory_kind == "pinned_host" and leaf.is_fully_addressable:  # near, and out of the device's reach
        return np.asarray(leaf)[places]
    # Each device looks up what it holds, and the finds are summed; said explicitly, for meshes of explicit axes.
    everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    return _lookup(in_device_memory(leaf), places, everywhere)


@functools.partial(jax.jit, static_argnums=2)
def _lookup(values: Any, places: tuple[Any, ...], sharding: Any) -> Any:
    return _bits(values).at[places].get(out_sharding=sharding)


def _bits(values: Array) -> Array:
    """Floating-point numbers as integers: those, any device can add to zero without a change."""
    if not jnp.issubdtype(values.dtype, np.floating) or (bits := jnp.finfo(values.dtype).bits) < 8:
        return values
    return jax.lax.bitcast_convert_type(values, jnp.dtype(f"uint{bits}"))


def _digest(values: np.ndarray[Any, Any], dtype: str) -> str:
    with np.errstate(over="ignore"):
        values = values.astype(jnp.dtype(dtype))
    values = np.where(values == 0, np.zeros_like(values), values)  # −0 is 0
    return hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()


def _places(shape: tuple[int, ...]) -> tuple[np.ndarray[Any, Any], ...]:
    """Indices of all elements of a small array, or of `_SAMPLES` of a large one, the same on every machine."""
    size = int(np.prod(shape, dtype=np.int64))
    flat = range(size) if size <= _SAMPLES else [(k * _GOLDEN % 2**64) * size >> 64 for k in range(_SAMPLES)]
    return np.unravel_index(np.array(flat, np.int64), shape) if shape else ()
