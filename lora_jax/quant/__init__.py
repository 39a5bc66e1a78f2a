"""Quantized bases: kernels stored in 4 or 8 bits, used by any model (QLoRA, Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

from ._bitsandbytes import from_bitsandbytes as from_bitsandbytes
from ._double import DoubleScales as DoubleScales
from ._format import Format as Format
from ._gather import gather as gather
from ._leaf import QuantizedLeaf as QuantizedLeaf
from ._nf4 import NF4 as NF4
from ._nf4 import NF4Leaf as NF4Leaf
from ._quantize import dequantize as dequantize
from ._quantize import quantize as quantize
from ._qwix import from_qwix as from_qwix
from ._requantize import Survival as Survival
from ._requantize import requantize as requantize
from ._scaled import Float8 as Float8
from ._scaled import Int8 as Int8
from ._scaled import ScaledLeaf as ScaledLeaf
from ._shardings import shardings as shardings

__all__ = [
    "NF4",
    "DoubleScales",
    "Float8",
    "Format",
    "Int8",
    "NF4Leaf",
    "QuantizedLeaf",
    "ScaledLeaf",
    "Survival",
    "dequantize",
    "from_bitsandbytes",
    "from_qwix",
    "gather",
    "quantize",
    "requantize",
    "shardings",
]
