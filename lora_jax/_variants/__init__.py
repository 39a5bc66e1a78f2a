"""Variants, one file per method: its paper, equation and initialization."""

from .adalora import AdaLoRA as AdaLoRA
from .alora import ALoRA as ALoRA
from .delora import DeLoRA as DeLoRA
from .dora import DoRA as DoRA
from .full import Full as Full
from .ia3 import IA3 as IA3
from .layers import Layers as Layers
from .layers import in_stack as in_stack
from .layers import without_layers as without_layers
from .lora import LoRA as LoRA
from .lora_bias import LoRABias as LoRABias
from .lora_xs import LoRAXS as LoRAXS
from .miss import MiSS as MiSS
from .qa_lora import QALoRA as QALoRA
from .rows import Rows as Rows
from .rslora import RSLoRA as RSLoRA
from .vera import VeRA as VeRA
