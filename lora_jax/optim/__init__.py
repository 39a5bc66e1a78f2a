"""Optax transformations that depend on the factors or the base. Any other optimizer works on an adapter directly."""

from ._freeze_base import freeze_base as freeze_base
from ._masks import select as select
from ._offload import offload as offload
from ._precondition import lora_fa as lora_fa
from ._precondition import lora_plus as lora_plus
from ._precondition import riemannian as riemannian
from ._train_state import train_state as train_state

__all__ = ["freeze_base", "lora_fa", "lora_plus", "offload", "riemannian", "select", "train_state"]
