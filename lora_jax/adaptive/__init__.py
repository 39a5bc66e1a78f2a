"""Adaptive rank: AdaLoRA's budget, importance, pruning and orthogonality loss as pure functions.

`ada_lora` combines them as an optax transformation. Each works under `jit` with static shapes, acts on the leaves of
the variant `AdaLoRA`, and leaves the others unchanged. `compact` converts the result to plain adapters.
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
