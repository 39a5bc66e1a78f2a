"""LoRA for JAX: `lora(apply)` turns any function of parameters into one that also takes a small trainable adapter."""

from ._adapter import Adapter as Adapter
from ._init import init as init
from ._kernels import kernels as kernels
from ._transform import lora as lora
from ._variants import Full as Full
from ._variants import LoRA as LoRA
from ._variants import RSLoRA as RSLoRA
