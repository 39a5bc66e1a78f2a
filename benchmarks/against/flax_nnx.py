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
    """Returns layers with LoRA for the classes that the case adapts."""
    lora = {"lora_rank": case.rank, "lora_param_dtype": jnp.float32}
    if any("embedding" in path for path in case.adapter):
        return Layers(embed=wrapped(nnx.Embed, case.rank))
    return Layers(
        dense=lambda *sizes, **options: nnx.LoRALinear(*sizes, **lora, **options),
        dense_general=wrapped(nnx.LinearGeneral, case.rank),
        conv=wrapped(nnx.Conv, case.rank),
    )


def wrapped(layer: Any, rank: int) -> Any:
    """Returns a layer wrapped in an `nnx.LoRA`, which adds `x·A·B` to its output."""

    def make(in_features: Any, out_features: Any, *rest: Any, rngs: nnx.Rngs, **options: Any) -> nnx.LoRA:
        base = layer(in_features, out_features, *rest, rngs=rngs, **options)
        return nnx.LoRA(in_features, rank, out_features, base_module=base, rngs=rngs)

    return make


def build(case: Case) -> Method:
    """Trains the `nnx.LoRAParam`s. There is no alpha, so `b` is multiplied by the scale."""
    model = model_of(case, layers_for(case))
    leaves = dict(trainable(model))
    values = {}
    for path, factors in case.adapter.items():
        layer = path.rpartition("/")[0]
        prefix = f"{layer}/lora" if f"{layer}/lora/lora_a" in leaves else layer
        if not prefix:
            raise UnfitError("has LoRA only for layers, not for a parameter")
        for name, value in {"lora_a": factors.a, "lora_b": factors.b * case.scale}.items():
            values[f"{prefix}/{name}"] = fitted(f"{prefix}/{name}", value, leaves)
    return method(case, with_values(model, values))
