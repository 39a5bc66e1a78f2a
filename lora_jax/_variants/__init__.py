"""Variants, one file per method: its paper, equation and initialization."""

from .adalora import AdaLoRA as AdaLoRA
from .alora import ALoRA as ALoRA
from .dora import DoRA as DoRA
from .full import Full as Full
from .lora import LoRA as LoRA
from .lora_bias import LoRABias as LoRABias
from .rows import Rows as Rows
from .rslora import RSLoRA as RSLoRA
from .vera import VeRA as VeRA
