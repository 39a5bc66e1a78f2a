"""A base model's fingerprint: every leaf's shape and dtype, and a digest of a few dozen of its values.

Cheap whatever the size: values are read by index, and no leaf is ever copied or gathered whole.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ._paths import flatten

# path -> {"shape": […], "dtype": "…", "content": "…"}; no content where only the shape was known
Fingerprint = Mapping[str, Mapping[str, Any]]

_SAMPLES = 64
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: its multiples spread evenly, and along no row or column


def fingerprint(base: Any) -> dict[str, dict[str, Any]]:
    """Describes every leaf of a tree, by path, in what JSON can hold."""
    with jax.set_mesh(None):  # a mesh in context would be imposed on every look-up
        return {path: _describe(leaf) for path, leaf in flatten(base)[0].items()}


def structural_differences(saved: Fingerprint, given: Fingerprint) -> list[str]:
    """What differs in paths and shapes, a line each."""
    gone = [f"{path!r} is not in `base`" for path in saved if path not in given]
    new = [f"{path!r} is in `base` and was not when the adapter was saved" for path in given if path not in saved]
    shapes = [(path, tuple(saved[path]["shape"]), tuple(given[path]["shape"])) for path in saved if path in given]
    return [*gone, *new, *(f"{path!r} has shape {got}; it had {was}" for path, was, got in shapes if got != was)]


def content_differences(saved: Fingerprint, given: Fingerprint) -> list[str]:
    """What differs in dtypes and values among leaves of the same path, a line each; values where both are known."""
    lines = []
    for path in (path for path in saved if path in given):
        was, got = saved[path], given[path]
        if was["dtype"] != got["dtype"]:
            lines.append(f"{path!r} has dtype {got['dtype']}; it had {was['dtype']}")
        elif {"content"} <= was.keys() & got.keys() and was["content"] != got["content"]:
            lines.append(f"{path!r} holds other values")
    return lines


def _describe(leaf: Any) -> dict[str, Any]:
    shape, dtype = getattr(leaf, "shape", ()), getattr(leaf, "dtype", type(leaf).__name__)
    described: dict[str, Any] = {"shape": list(shape), "dtype": str(dtype)}
    if (values := _sample(leaf)) is not None:
        described["content"] = hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()
    return described


def _sample(leaf: Any) -> np.ndarray[Any, Any] | None:
    """The values at the sampled places; None if the leaf has none to read, or is a random key, which is no weight."""
    if isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        values = _sample_array(leaf)
    elif isinstance(leaf, np.ndarray | np.generic):
        values = np.asarray(leaf)[_places(leaf.shape)]
    else:
        return None
    return np.where(values == 0, np.zeros_like(values), values)  # a sum over shards makes +0 of −0


def _sample_array(leaf: jax.Array) -> np.ndarray[Any, Any]:
    if not leaf.size or leaf.sharding.memory_kind == "pinned_host":  # near, and out of the device's reach
        return np.asarray(leaf)[_places(leaf.shape)]
    # Each device looks up what it holds, and the finds are summed; said explicitly, for meshes of explicit axes.
    found = NamedSharding(leaf.sharding.mesh, PartitionSpec()) if isinstance(leaf.sharding, NamedSharding) else None
    return np.asarray(_look_up(leaf, _places(leaf.shape), found))


@functools.partial(jax.jit, static_argnums=2)
def _look_up(values: Any, places: tuple[Any, ...], sharding: Any) -> Any:
    return values.at[places].get(out_sharding=sharding)


def _places(shape: tuple[int, ...]) -> tuple[np.ndarray[Any, Any], ...]:
    """Indices of all elements of a small array, or of `_SAMPLES` of a large one, the same on every machine."""
    size = int(np.prod(shape, dtype=np.int64))
    flat = range(size) if size <= _SAMPLES else [(k * _GOLDEN % 2**64) * size >> 64 for k in range(_SAMPLES)]
    return np.unravel_index(np.array(flat, np.int64), shape) if shape else ()
