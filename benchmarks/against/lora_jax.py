"""lora_jax: the unmodified model, with `lora()`."""

from __future__ import annotations

from typing import Any

from decoder import Method
from jax import Array
from sizes import ALPHA

import lora_jax as lj

from .cases import Case


def adapter_of(case: Case) -> dict[str, lj.Adapter]:
    """Returns the factors as an adapter."""
    variant = lj.LoRA(rank=case.rank, alpha=ALPHA)
    return {path: lj.Adapter(variant, roles, a=a, b=b) for path, (roles, a, b) in case.adapter.items()}


def build(case: Case) -> Method:
    """Trains the adapter."""
    adapted = lj.lora(case.apply)

    def loss(adapter: Any, params: Any, inputs: Array) -> Array:
        return case.loss(adapted(params, adapter, inputs), inputs)

    return Method(loss, adapter_of(case), case.params)


def merge(case: Case) -> Any:
    """Returns parameters for the unmodified model."""
    return lj.merge(case.params, adapter_of(case))
