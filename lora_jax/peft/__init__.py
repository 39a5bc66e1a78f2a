"""PEFT's file format: adapters trained here load in PEFT and in what reads its files, and PEFT's load here.

`export` writes `adapter_model.safetensors` and `adapter_config.json`; `load` reads them. A mapping states which torch
module each leaf is: one of `presets`, or rows of `linear`, `embedding`, `conv`, `experts` and `vector`. Neither PEFT
nor torch is needed, and no file is read with pickle.
"""

from . import presets as presets
from ._export import export as export
from ._guess.guess import guess as guess
from ._guess.result import Guess as Guess
from ._guess.result import GuessedRow as GuessedRow
from ._load import load as load
from ._rows import Part as Part
from ._rows import Row as Row
from ._rows import conv as conv
from ._rows import embedding as embedding
from ._rows import experts as experts
from ._rows import layer as layer
from ._rows import linear as linear
from ._rows import norm as norm
from ._rows import vector as vector

__all__ = [
    "Guess",
    "GuessedRow",
    "Part",
    "Row",
    "conv",
    "embedding",
    "experts",
    "export",
    "guess",
    "layer",
    "linear",
    "load",
    "norm",
    "presets",
    "vector",
]
