"""Starts other than `init`'s: pure functions from an adapter and its base to an adapter, and a base to train it on.

    params, adapter = starts.pissa(params, adapter)

Each acts on all low-rank adapters that it is given, whatever the axes of their kernels, each layer and expert of a
stack by itself; the rest of an adapter is passed on. To start kernels in several ways, give each function a part:
`{path: part for path, part in adapter.items() if …}`. After each the model computes what it did before, up to rounding.
`pissa`, `olora` and `lora_ga` move the base: the adapter then belongs to the parameters that they return, until
`as_plain` makes it one for the base as it was.
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
