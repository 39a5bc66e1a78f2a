"""What PEFT's format has no place for, from the variant and the row of one leaf."""

from __future__ import annotations

from .._core.adapter import Adapter
from .._core.variant import LowRank
from .._variants import AdaLoRA, ALoRA, DoRA, Full, LoRA, LoRABias, Rows, RSLoRA, VeRA
from ._row import Row


def refusal(part: Adapter, row: Row) -> str | None:
    """Returns why a leaf cannot be written, from its variant and the kind of its row."""
    variant = part.variant
    name = type(variant).__name__
    if isinstance(variant, AdaLoRA):
        return "it has AdaLoRA, whose pruned directions the format does not have; call adaptive.compact first"
    if isinstance(variant, VeRA):
        plain = row.kind == "linear" and row.inputs is None and row.outputs is None and len(row.parts) == 1
        if not plain or row.parts[0].interleaved is not None or row.parts[0].of is not None:
            return "it has VeRA, which PEFT has for linear modules whose outputs are in the order of the leaf"
    elif type(variant) not in (LoRA, RSLoRA, DoRA, ALoRA, LoRABias, Full, Rows):
        return f"it has {name}, which is not written to PEFT's files"
    if row.is_parameter and type(variant) not in (LoRA, RSLoRA):
        return f"it has {name}, and its row is of a parameter without a module, for which PEFT has LoRA and RSLoRA"
    vectors = row.kind == "vector"
    if isinstance(variant, LowRank) and vectors:
        return f"it has {name}, and its row is of a vector"
    if isinstance(variant, LoRABias) and not (vectors and row.parameter == "bias"):
        return "it has LoRABias, and its row is not of a bias"
    if isinstance(variant, Rows) and row.kind != "embedding":
        return f"it has Rows, which PEFT has for embeddings; its row is of kind {row.kind!r}"
    if isinstance(variant, DoRA) and row.head is not None:
        return f"it has DoRA, whose magnitude cannot be tied to that of the head {row.head!r}"
    return None
