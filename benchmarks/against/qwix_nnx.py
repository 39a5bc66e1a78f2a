"""Qwix on NNX: as on Linen, but the model is called once, and keeps what is trained in itself."""

from __future__ import annotations

import qwix
from decoder import Method
from flax import nnx

from .cases import Case, Experts
from .fit import fitted
from .nnx_models import method, model_of, trainable, with_values
from .qwix_linen import provider


def build(case: Case) -> Method:
    """Trains the `nnx.LoRAParam`s that it adds."""
    model = qwix.apply_lora_to_model(model_of(case), provider(case), case.inputs, rngs=rngs_for(case))
    made = dict(trainable(model))
    values = {
        f"{path}_lora_{name}": fitted(f"{path}_lora_{name}", getattr(factors, name), made)
        for path, factors in case.adapter.items()
        for name in "ab"
    }
    return method(case, with_values(model, values))


def rngs_for(case: Case) -> nnx.Rngs:
    """A key for each layer of a stack that `nnx.scan` or `nnx.vmap` takes apart: it takes the keys apart with it."""
    stacks = {factors.a.shape[0] for factors in case.adapter.values() if factors.roles.startswith("b")}
    whole = not stacks or isinstance(case.model, Experts)
    return nnx.Rngs(0) if whole else nnx.Rngs(0).split(stacks.pop())
