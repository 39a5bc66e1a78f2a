"""Qwix on NNX, which calls the model once and stores the factors in it."""

from __future__ import annotations

import qwix
from decoder import Method
from flax import nnx

from .cases import Case, Experts
from .fit import fitted
from .nnx_models import method, model_of, trainable, with_values
from .qwix_linen import provider


def build(case: Case) -> Method:
    """Trains the `nnx.LoRAParam`s that Qwix adds."""
    model = qwix.apply_lora_to_model(model_of(case), provider(case), case.inputs, rngs=rngs_for(case))
    leaves = dict(trainable(model))
    values = {
        f"{path}_lora_{name}": fitted(f"{path}_lora_{name}", getattr(factors, name), leaves)
        for path, factors in case.adapter.items()
        for name in "ab"
    }
    return method(case, with_values(model, values))


def rngs_for(case: Case) -> nnx.Rngs:
    """Returns one key, or for a stack a key per layer, because `nnx.scan` and `nnx.vmap` also map over keys."""
    stacks = {factors.a.shape[0] for factors in case.adapter.values() if factors.roles.startswith("b")}
    unmapped = not stacks or isinstance(case.model, Experts)
    return nnx.Rngs(0) if unmapped else nnx.Rngs(0).split(stacks.pop())
