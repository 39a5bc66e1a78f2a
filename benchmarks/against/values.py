"""The numbers of every array: a function of its path and shape, so that all environments have the same; NumPy only."""

from __future__ import annotations

import zlib

import numpy as np


def values(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random numbers such as a trained model might hold; the factor `b` is not zero, so that an adapter acts.

    A stack of layers, `blocks/…`, holds what the layers `block_0/…`, `block_1/…` hold.
    """
    if path.startswith("blocks/"):
        return np.stack([values(path.replace("blocks", f"block_{n}", 1), shape[1:]) for n in range(shape[0])])
    name = path.rpartition("/")[2]
    noise = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape, np.float32)
    return 1 + 0.1 * noise if name == "scale" else {"b": 0.1}.get(name, 0.04) * noise


def tokens(vocabulary: int, shape: tuple[int, int]) -> np.ndarray:
    """A batch of random tokens."""
    return np.random.default_rng(0).integers(0, vocabulary, shape, np.int32)
