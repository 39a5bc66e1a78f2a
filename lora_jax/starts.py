"""Starts other than `init`'s: pure functions from an adapter and its base to an adapter, and a base to train it on.

    adapter, params = starts.pissa(adapter, params)

Each acts on all low-rank adapters that it is given, whatever the axes of their kernels, each layer and expert of a
stack by itself; the rest of an adapter is passed on. To start kernels in several ways, give each function a part:
`{path: part for path, part in adapter.items() if …}`. After each the model computes what it did before, up to rounding.
`pissa`, `olora` and `lora_ga` move the base: the adapter then belongs to the parameters that they return, until
`as_plain` makes it one for the base as it was.
"""

from ._starts import Activations as Activations
from ._starts import Start as Start
from ._starts import activations as activations
from ._starts import as_plain as as_plain
from ._starts import eva as eva
from ._starts import gaussian as gaussian
from ._starts import gradients as gradients
from ._starts import kaiming as kaiming
from ._starts import lora_ga as lora_ga
from ._starts import olora as olora
from ._starts import orthogonal as orthogonal
from ._starts import pissa as pissa

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
