"""Adaptive rank: AdaLoRA's budget, importance, masks and orthogonality as pure functions; a plain adapter at the end.

`ada_lora` puts them together as an optax transformation; each also stands alone, under `jit`, with static shapes.
They act on the leaves of the variant `AdaLoRA`, and pass the others on.
"""

from ._compact import compact as compact
from ._importance import Importance as Importance
from ._importance import keep as keep
from ._importance import measure as measure
from ._importance import prune as prune
from ._importance import scores as scores
from ._importance import unmeasured as unmeasured
from ._orthogonality import orthogonality as orthogonality
from ._schedule import budget as budget
from ._training import AdaLoRAState as AdaLoRAState
from ._training import ada_lora as ada_lora

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
