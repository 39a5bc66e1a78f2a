"""The adapter files of mlx-lm: its names and orders of axes, with one rank and one scale for all modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ._factors import Factors, most_common
from ._layout import Values

MLX_FILE = "adapters.safetensors"


def to_mlx(factors: Mapping[str, Factors], dropout: float) -> tuple[dict[str, Values], dict[str, Any]]:
    """Returns the tensors and the configuration of factors of linear modules and embeddings.

    The rank is the largest, with zeros for the other modules; the scale is the most frequent, and the others are
    multiplied into `lora_b`.
    """
    rank = max(one.rank for one in factors.values())
    scale = most_common(float(np.float32(one.scale)) for one in factors.values()) or 1.0
    tensors: dict[str, Values] = {}
    for module, one in factors.items():
        same = one if np.float32(one.scale) == np.float32(scale) else one.rescaled(scale, module)
        same = same.padded(rank)
        tensors |= {f"{module}.lora_a": same.a.T, f"{module}.lora_b": same.b.T}
        if same.magnitude is not None:
            tensors[f"{module}.m"] = same.magnitude
    return tensors, {
        "fine_tune_type": "dora" if any(one.magnitude is not None for one in factors.values()) else "lora",
        "num_layers": -1,  # all; the keys are names in the model, and so select the layers
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": dropout, "keys": sorted(factors)},
    }
