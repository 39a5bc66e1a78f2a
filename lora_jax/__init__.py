"""LoRA for JAX: `lora(apply)` turns any function of parameters into one that also takes a small trainable adapter.

adapter = init(key, params, {"**/query/kernel": LoRA(rank=8, alpha=16)})
logits = lora(model.apply)(params, adapter, tokens)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._adapter import Adapter as Adapter
from ._errors import AdapterError as AdapterError
from ._errors import CheckpointError as CheckpointError
from ._errors import LoRAError as LoRAError
from ._errors import MergeError as MergeError
from ._errors import SpecError as SpecError
from ._errors import UnsupportedError as UnsupportedError
from ._explain import explain as explain
from ._init import init as init
from ._kernels import kernels as kernels
from ._merge import merge as merge
from ._merge import unmerge as unmerge
from ._transform import lora as lora
from ._variants import Full as Full
from ._variants import LoRA as LoRA
from ._variants import RSLoRA as RSLoRA
from ._version import __version__ as __version__

if TYPE_CHECKING:
    from . import checkpoint as checkpoint
    from . import optim as optim
    from . import starts as starts
    from . import testing as testing
    from .checkpoint import restore as restore
    from .checkpoint import save as save

__all__ = [
    "Adapter",
    "AdapterError",
    "CheckpointError",
    "Full",
    "LoRA",
    "LoRAError",
    "MergeError",
    "RSLoRA",
    "SpecError",
    "UnsupportedError",
    "checkpoint",
    "explain",
    "init",
    "kernels",
    "lora",
    "merge",
    "optim",
    "restore",
    "save",
    "starts",
    "testing",
    "unmerge",
]

# Loaded when first asked for: some bring optax and orbax with them.
_DOORS = {
    "checkpoint": "checkpoint",
    "optim": "optim",
    "starts": "starts",
    "testing": "testing",
    "restore": "checkpoint",
    "save": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    door = importlib.import_module(f"{__name__}.{_DOORS[name]}")
    return door if name == _DOORS[name] else getattr(door, name)


def __dir__() -> list[str]:
    return __all__
