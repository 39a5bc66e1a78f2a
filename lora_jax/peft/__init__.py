"""PEFT's file format: adapters trained here load in PEFT and in what reads its files, and PEFT's load here.

`export` writes `adapter_model.safetensors` and `adapter_config.json`; `load` reads them. A mapping states which torch
module each leaf is: one of `presets`, or rows of `linear`, `embedding`, `conv`, `experts` and `vector`. Neither PEFT
nor torch is needed, and no file is read with pickle.

`merge_files` merges an adapter into the files of its base. `export_merged` writes parameters as a torch model, and
`load_params` reads them.
"""

from . import presets as presets
from ._convert import convert as convert
from ._export import export as export
from ._export_merged import export_merged as export_merged
from ._guess.guess import guess as guess
from ._guess.result import Guess as Guess
from ._guess.result import GuessedRow as GuessedRow
from ._load import load as load
from ._load_params import load_params as load_params
from ._merge_files import merge_files as merge_files
from ._row import Part as Part
from ._row import Row as Row
from ._rows import conv as conv
from ._rows import embedding as embedding
from ._rows import experts as experts
from ._rows import layer as layer
from ._rows import linear as linear
from ._rows import norm as norm
from ._rows import vector as vector
from ._torch_adapter import TorchAdapter as TorchAdapter
from ._torch_adapter import read as read

__all__ = [
    "Guess",
    "GuessedRow",
    "Part",
    "Row",
    "TorchAdapter",
    "conv",
    "convert",
    "embedding",
    "experts",
    "export",
    "export_merged",
    "guess",
    "layer",
    "linear",
    "load",
    "load_params",
    "merge_files",
    "norm",
    "presets",
    "read",
    "vector",
]
