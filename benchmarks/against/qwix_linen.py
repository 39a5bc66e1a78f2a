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


def provider(case: Case, **quantization: Any) -> qwix.LoraProvider:
    """Returns a provider for the modules of the adapted kernels."""
    modules = "|".join(re.escape(path.rpartition("/")[0]) for path in case.adapter)
    return qwix.LoraProvider(module_path=modules, rank=case.rank, alpha=ALPHA, **quantization)


def build(case: Case, **quantization: Any) -> Method:
    """Trains only the parameters that the intercepted model adds; `quantization` is that of the adapted kernels."""
    model = qwix.apply_lora_to_model(case.model, provider(case, **quantization))
    leaves = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), case.inputs)["params"], sep="/")
    trained = {
        f"{path}_lora_{name}": fitted(f"{path}_lora_{name}", getattr(factors, name), leaves)
        for path, factors in case.adapter.items()
        for name in "ab"
    }

    def loss(trained: Any, frozen: Any, inputs: Array) -> Array:
        params = unflatten_dict(frozen | trained, sep="/")
        return case.loss(model.apply({"params": params}, inputs), inputs)

    kernels = case.kernels()
    return Method(loss, trained, kernels | (quantized(case, leaves) if quantization else {}))


def quantized(case: Case, leaves: dict[str, Any]) -> dict[str, Any]:
    """Returns the adapted kernels as the leaves of an intercepted model describe them, each layer of a stack alone."""

    def quantize(w: Array, leaf: Any) -> Any:
        return qwix.quantize_params({"kernel": w}, {"kernel": leaf})["kernel"]

    def stack(w: Array, leaf: Any) -> Any:
        layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), leaf)
        return jax.vmap(lambda w: quantize(w, layer))(w)

    kernels = case.kernels()
    return {
        path: (stack if "b" in factors.roles else quantize)(kernels[path], leaves[path])
        for path, factors in case.adapter.items()
    }
