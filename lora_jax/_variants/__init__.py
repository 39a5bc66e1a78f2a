"""The variants, one file a method: its paper, its equation, its start."""

from ._adalora import AdaLoRA as AdaLoRA
from ._alora import ALoRA as ALoRA
from ._base import LowRank as LowRank
from ._base import Variant as Variant
from ._base import largest_rank as largest_rank
from ._dora import DoRA as DoRA
from ._full import Full as Full
from ._lora import LoRA as LoRA
from ._lora_bias import LoRABias as LoRABias
from ._rows import Rows as Rows
from ._rslora import RSLoRA as RSLoRA
from ._vera import VeRA as VeRA
