"""One key per path, whatever else is adapted: a layer more or less changes no other's numbers."""

from __future__ import annotations

import hashlib

import jax
from jax import Array


def key_for(key: Array, path: str) -> Array:
    """Folds 64 bits of a hash of the path into the key, so that no two paths of a model meet."""
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    for word in (digest[:4], digest[4:]):
        key = jax.random.fold_in(key, int.from_bytes(word, "big"))
    return key
