"""VeRA in PEFT's format: two matrices, as large as the largest module needs, and two vectors for each module.

PEFT scales the first matrix for the largest fan-in, and `VeRA` for that of each kernel, so `lambda_d` differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .._core.values import on_host
from .._variants import VeRA
from ._layout import Values

A, B = "base_model.vera_A", "base_model.vera_B"


def matrices(variant: VeRA, d_in: int, d_out: int) -> dict[str, Values]:
    """Returns the matrices `(rank, d_in)` and `(d_out, rank)` by their names in the file."""
    a, b = variant.frozen(0, d_in, fan_in=d_in), variant.frozen(1, d_out, fan_in=variant.rank)
    return {A: on_host(a).T, B: on_host(b)}


def to_config(variant: VeRA, modules: Iterable[str], conv1d: bool) -> dict[str, Any]:
    """Returns the configuration of an adapter of VeRA."""
    return {
        "peft_type": "VERA",
        "r": variant.rank,
        "target_modules": sorted(modules),
        "vera_dropout": variant.dropout,
        "d_initial": variant.start_d,
        "projection_prng_key": variant.seed,  # PEFT's generator makes other matrices of it; those in the file are used
        "save_projection": True,
        "fan_in_fan_out": conv1d,
        "bias": "none",
        "inference_mode": True,
    }


def from_config(config: Mapping[str, Any], tensors: Mapping[str, Values]) -> VeRA | None:
    """Returns the variant that generates the matrices in a file; None if they are of another generator."""
    seed = config.get("projection_prng_key", 0)
    shapes = [tensors[name].shape for name in (A, B) if name in tensors]
    if not are_large_enough(shapes, config.get("r", 256), 1, 1) or type(seed) is not int or not 0 <= seed < 2**32:
        return None
    fields = {"start_d": config.get("d_initial", 0.1), "dropout": config.get("vera_dropout", 0.0)}
    variant = VeRA(rank=config.get("r", 256), seed=seed, **fields)
    own = matrices(variant, tensors[A].shape[-1], tensors[B].shape[0])
    same = all(own[name].shape == tensors[name].shape and np.allclose(own[name], tensors[name]) for name in own)
    return variant if same else None


def are_large_enough(shapes: Sequence[tuple[int, ...]], rank: int, d_in: int, d_out: int) -> bool:
    """Whether the shapes are those of the two matrices, for a module of this size or larger."""
    if len(shapes) != 2 or any(len(shape) != 2 for shape in shapes):
        return False
    a, b = shapes
    return a[0] == rank == b[1] and a[1] >= d_in and b[0] >= d_out


def relative(d_in: int, largest: int) -> float:
    """Returns PEFT's `lambda_d` of a module with `d_in` inputs, relative to that of the variant."""
    return math.sqrt(largest / d_in)
