"""Flax: `nnx.LoRALinear` in place of `nnx.Linear`, and `nnx.LoRA` around a layer of any other class."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from decoder import Method
from flax import nnx

from .cases import Case
from .figures import UnfitError
from .fit import fitted
from .nnx_models import Layers, method, model_of, trainable, with_values


def layers_for(case: Case) -> Layers:
    """The layers with LoRA, for the classes that the case adapts."""
    lora = {"lora_rank": case.rank, "lora_param_dtype": jnp.float32}
    if any("embedding" in path for path in case.adapter):
        return Layers(embed=around(nnx.Embed, case.rank))
    return Layers(
        dense=lambda *sizes, **options: nnx.LoRALinear(*sizes, **lora, **options),
        dense_general=around(nnx.LinearGeneral, case.rank),
        conv=around(nnx.Conv, case.rank),
    )


def around(layer: Any, rank: int) -> Any:
    """A layer in an `nnx.LoRA` that adds `x·A·B` to what it gives."""

    def make(reads: Any, gives: Any, *rest: Any, rngs: nnx.Rngs, **options: Any) -> nnx.LoRA:
        base = layer(reads, gives, *rest, rngs=rngs, **options)
        return nnx.LoRA(reads, rank, gives, base_module=base, rngs=rngs)

    return make


def build(case: Case) -> Method:
    """Trains the `nnx.LoRAParam`s. There is no alpha: the scale goes into `b`."""
    model = model_of(case, layers_for(case))
    made = dict(trainable(model))
    values = {}
    for path, factors in case.adapter.items():
        layer = path.rpartition("/")[0]
        prefix = f"{layer}/lora" if f"{layer}/lora/lora_a" in made else layer
        if not prefix:
            raise UnfitError("has LoRA for layers only, not for a parameter")
        for name, value in {"lora_a": factors.a, "lora_b": factors.b * case.scale}.items():
            values[f"{prefix}/{name}"] = fitted(f"{prefix}/{name}", value, made)
    return method(case, with_values(model, values))
