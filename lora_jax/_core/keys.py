"""One PRNG key per path: adding or removing a kernel does not change the initial values of the others."""

from __future__ import annotations

import hashlib

import jax
from jax import Array


def key_for(key: Array, path: str) -> Array:
    """Folds a hash of the path into the key; 64 bits, so that two paths of a model do not collide."""
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    for word in (digest[:4], digest[4:]):
        key = jax.random.fold_in(key, int.from_bytes(word, "big"))
    return key
