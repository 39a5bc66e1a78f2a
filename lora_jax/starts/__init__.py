"""Alternatives to the initialization of `init`: pure functions of a base and an adapter.

    params, adapter = starts.pissa(params, adapter)

Each function initializes all low-rank leaves of the adapter, for any axes, each layer and expert of a stack
separately. Other leaves are returned unchanged. To initialize kernels in different ways, pass each function a part of
the adapter: `{path: part for path, part in adapter.items() if …}`. The model computes the same function before and
after, up to rounding. `pissa`, `olora` and `lora_ga` change the base, and the adapter belongs to the base that they
return; `as_plain` converts it to an adapter on the original base.
"""

from ._activations import Activations as Activations
from ._activations import activations as activations
from ._as_plain import as_plain as as_plain
from ._eva import eva as eva
from ._leaf import Start as Start
from ._lora_ga import gradients as gradients
from ._lora_ga import lora_ga as lora_ga
from ._olora import olora as olora
from ._pissa import pissa as pissa
from ._random import gaussian as gaussian
from ._random import kaiming as kaiming
from ._random import orthogonal as orthogonal

__all__ = [
    "Activations",
    "Start",
    "activations",
    "as_plain",
    "eva",
    "gaussian",
    "gradients",
    "kaiming",
    "lora_ga",
    "olora",
    "orthogonal",
    "pissa",
]
