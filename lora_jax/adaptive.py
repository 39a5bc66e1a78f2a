"""Adaptive rank: AdaLoRA's budget, importance, masks and orthogonality as pure functions; a plain adapter at the end.

`ada_lora` puts them together as an optax transformation; each also stands alone, under `jit`, with static shapes.
They act on the leaves of the variant `AdaLoRA`, and pass the others on.
"""

from ._adaptive import AdaLoRAState as AdaLoRAState
from ._adaptive import Importance as Importance
from ._adaptive import ada_lora as ada_lora
from ._adaptive import budget as budget
from ._adaptive import compact as compact
from ._adaptive import keep as keep
from ._adaptive import measure as measure
from ._adaptive import orthogonality as orthogonality
from ._adaptive import prune as prune
from ._adaptive import scores as scores
from ._adaptive import unmeasured as unmeasured

__all__ = [
    "AdaLoRAState",
    "Importance",
    "ada_lora",
    "budget",
    "compact",
    "keep",
    "measure",
    "orthogonality",
    "prune",
    "scores",
    "unmeasured",
]
