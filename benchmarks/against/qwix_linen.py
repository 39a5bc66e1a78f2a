"""Qwix on Linen, whose provider intercepts the operations of modules that match a pattern."""

from __future__ import annotations

import re
from typing import Any

import jax
import qwix
from decoder import Method
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from sizes import ALPHA

from .cases import Case
from .fit import fitted


def provider(case: Case) -> qwix.LoraProvider:
    """Returns a provider for the modules of the adapted kernels."""
    modules = "|".join(re.escape(path.rpartition("/")[0]) for path in case.adapter)
    return qwix.LoraProvider(module_path=modules, rank=case.rank, alpha=ALPHA)


def build(case: Case) -> Method:
    """Trains only the parameters that the intercepted model adds."""
    model = qwix.apply_lora_to_model(case.model, provider(case))
    leaves = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), case.inputs)["params"], sep="/")
    trained = {
        f"{path}_lora_{name}": fitted(f"{path}_lora_{name}", getattr(factors, name), leaves)
        for path, factors in case.adapter.items()
        for name in "ab"
    }

    def loss(trained: Any, frozen: Any, inputs: Array) -> Array:
        params = unflatten_dict(flatten_dict(frozen, sep="/") | trained, sep="/")
        return case.loss(model.apply({"params": params}, inputs), inputs)

    return Method(loss, trained, case.params)
