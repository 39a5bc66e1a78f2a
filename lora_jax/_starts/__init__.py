"""Starts other than `init`'s, one file a method: its paper, its equation, and what its implementations differ in."""

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
