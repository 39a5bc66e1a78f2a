"""LoRA for JAX: `lora(apply)` turns a function of parameters into one that also takes a small trainable adapter.

adapter = init(key, params, {"**/query/kernel": LoRA(rank=8, alpha=16)})
logits = lora(model.apply)(params, adapter, tokens)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import targets as targets
from ._core.adapter import Adapter as Adapter
from ._core.init import init as init
from ._core.spec import spec as spec
from ._errors import AdapterError as AdapterError
from ._errors import CheckpointError as CheckpointError
from ._errors import LoRAError as LoRAError
from ._errors import MergeError as MergeError
from ._errors import SpecError as SpecError
from ._errors import TracingError as TracingError
from ._errors import UnsupportedError as UnsupportedError
from ._transform.adapt import adapt as adapt
from ._transform.kernels import kernels as kernels
from ._transform.lora import lora as lora
from ._variants import IA3 as IA3
from ._variants import AdaLoRA as AdaLoRA
from ._variants import ALoRA as ALoRA
from ._variants import DeLoRA as DeLoRA
from ._variants import DoRA as DoRA
from ._variants import Full as Full
from ._variants import Layers as Layers
from ._variants import LoRA as LoRA
from ._variants import LoRABias as LoRABias
from ._variants import LoRAXS as LoRAXS
from ._variants import MiSS as MiSS
from ._variants import QALoRA as QALoRA
from ._variants import Rows as Rows
from ._variants import RSLoRA as RSLoRA
from ._variants import VeRA as VeRA
from ._variants.alora import active_tokens as active_tokens
from ._version import __version__ as __version__

if TYPE_CHECKING:
    from . import adaptive as adaptive
    from . import analysis as analysis
    from . import checkpoint as checkpoint
    from . import cli as cli
    from . import many as many
    from . import nnx as nnx
    from . import optim as optim
    from . import peft as peft
    from . import quant as quant
    from . import qwix as qwix
    from . import sharding as sharding
    from . import starts as starts
    from . import testing as testing
    from ._merge.compress import compress as compress
    from ._merge.extract import extract as extract
    from ._merge.merge import merge as merge
    from ._merge.merge import merge_report as merge_report
    from ._merge.unmerge import unmerge as unmerge
    from ._merge.unmerge import unmerge_approximately as unmerge_approximately
    from ._report.explain import explain as explain
    from ._report.plan import plan as plan
    from .checkpoint import restore as restore
    from .checkpoint import save as save

__all__ = [
    "IA3",
    "ALoRA",
    "AdaLoRA",
    "Adapter",
    "AdapterError",
    "CheckpointError",
    "DeLoRA",
    "DoRA",
    "Full",
    "Layers",
    "LoRA",
    "LoRABias",
    "LoRAError",
    "LoRAXS",
    "MergeError",
    "MiSS",
    "QALoRA",
    "RSLoRA",
    "Rows",
    "SpecError",
    "TracingError",
    "UnsupportedError",
    "VeRA",
    "active_tokens",
    "adapt",
    "adaptive",
    "analysis",
    "checkpoint",
    "cli",
    "compress",
    "explain",
    "extract",
    "init",
    "kernels",
    "lora",
    "many",
    "merge",
    "merge_report",
    "nnx",
    "optim",
    "peft",
    "plan",
    "quant",
    "qwix",
    "restore",
    "save",
    "sharding",
    "spec",
    "starts",
    "targets",
    "testing",
    "unmerge",
    "unmerge_approximately",
]

# Imported on first access: what a training step does not need. Some import optax, Orbax or matplotlib.
_LAZY = {
    "adaptive": "adaptive",
    "analysis": "analysis",
    "checkpoint": "checkpoint",
    "cli": "cli",
    "many": "many",
    "nnx": "nnx",
    "optim": "optim",
    "peft": "peft",
    "quant": "quant",
    "qwix": "qwix",
    "sharding": "sharding",
    "starts": "starts",
    "testing": "testing",
    "compress": "_merge.compress",
    "explain": "_report.explain",
    "extract": "_merge.extract",
    "merge": "_merge.merge",
    "merge_report": "_merge.merge",
    "plan": "_report.plan",
    "restore": "checkpoint",
    "save": "checkpoint",
    "unmerge": "_merge.unmerge",
    "unmerge_approximately": "_merge.unmerge",
}


if not TYPE_CHECKING:  # a type checker would accept every name

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
        return module if name == _LAZY[name] else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
