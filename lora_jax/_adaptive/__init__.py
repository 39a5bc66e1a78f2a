"""Adaptive rank: what each direction of an AdaLoRA adapter matters, which are kept, and a plain adapter of those."""

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
