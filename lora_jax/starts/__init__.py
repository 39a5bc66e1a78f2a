"""Alternatives to the initialization of `init`: pure functions of a base and an adapter.

    params, adapter = starts.pissa(params, adapter)

Each function initializes all leaves of the adapter that have factors, each layer and expert of a stack separately, and
returns leaves without a rank, such as `Full`, unchanged. Other variants, such as `VeRA`, raise, and so does an adapter
without factors. To initialize kernels in different ways, pass each function a part of the adapter:
`{path: part for path, part in adapter.items() if …}`. The model computes the same function as before, up to rounding.
`pissa`, `olora`, `corda` and `lora_ga` change the base; `as_plain` converts the adapter to one on the original base.
`loftq` and `qpissa` quantize the base, which reduces the error of the quantization and does not remove it.
"""

from ._activations import Activations as Activations
from ._activations import activations as activations
from ._as_plain import as_plain as as_plain
from ._corda import corda as corda
from ._eva import eva as eva
from ._leaf import Start as Start
from ._loftq import loftq as loftq
from ._lora_ga import gradients as gradients
from ._lora_ga import lora_ga as lora_ga
from ._mica import mica as mica
from ._olora import olora as olora
from ._pissa import pissa as pissa
from ._qpissa import qpissa as qpissa
from ._random import gaussian as gaussian
from ._random import kaiming as kaiming
from ._random import orthogonal as orthogonal

__all__ = [
    "Activations",
    "Start",
    "activations",
    "as_plain",
    "corda",
    "eva",
    "gaussian",
    "gradients",
    "kaiming",
    "loftq",
    "lora_ga",
    "mica",
    "olora",
    "orthogonal",
    "pissa",
    "qpissa",
]
