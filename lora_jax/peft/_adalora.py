"""AdaLoRA in PEFT's format: factors and a diagonal, without the directions that PEFT has removed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ._layout import Values
from ._names import expected_shape
from ._row import Row
from ._sites import Site
from ._tensors import Tensors


def as_factors(arrays: Mapping[str, Values]) -> dict[str, Values]:
    """Returns the tensors with the names of LoRA's factors, which end in `.weight`."""
    return {f"{name}.weight" if name.endswith((".lora_A", ".lora_B")) else name: x for name, x in arrays.items()}


def arrange(file: Tensors, site: Site, rank: int) -> None:
    """Gives the factors of a convolution their spatial axes."""
    for name in "ab" if site.row.kind == "conv" else "":
        shape = expected_shape(name, site.layout, site.last - site.first, rank)
        stored = file.modules[site.module].get(name)
        if stored is not None and file.arrays[stored].size == math.prod(shape):
            file.arrays[stored] = file.arrays[stored].reshape(shape)


def is_kept(row: Row) -> bool:
    """Whether a leaf of this row has a diagonal of its own, so that it can be `AdaLoRA`."""
    return len(row.parts) == 1 and row.parts[0].of is None
