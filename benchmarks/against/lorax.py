"""jax-lorax: its `LoraWeight` in place of each kernel, in the unmodified model under `lora`."""

from __future__ import annotations

from typing import Any

import jax
import lorax
from decoder import Method
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from sizes import ALPHA

from .cases import Case
from .fit import fitted


def weights_of(case: Case) -> dict[str, lorax.LoraWeight]:
    """Returns a `LoraWeight` for each adapted kernel; its `b` has the input axis, its `a` the output axis."""
    kernels = case.kernels()
    spec = {path: case.rank if path in case.adapter else lorax.LORA_FREEZE for path in kernels}
    initial = lorax.init_lora(kernels, spec, jax.random.PRNGKey(0), alpha=ALPHA)
    weights = {}
    for path, factors in case.adapter.items():
        shapes = {"a": initial[path].a, "b": initial[path].b}
        a, b = fitted("a", factors.b, shapes), fitted("b", factors.a, shapes)
        weights[path] = lorax.LoraWeight(w=kernels[path], a=a, b=b, alpha=ALPHA)
    return weights


def build(case: Case) -> Method:
    """Trains `a` and `b`, and differentiates only with respect to them."""
    weights = weights_of(case)
    trained = {path: (weight.a, weight.b) for path, weight in weights.items()}

    def loss(trained: Any, frozen: Any, inputs: Array) -> Array:
        kernels = flatten_dict(frozen, sep="/")
        for path, (a, b) in trained.items():
            kernels[path] = lorax.LoraWeight(w=kernels[path], a=a, b=b, alpha=ALPHA)
        return case.loss(lorax.lora(case.apply)(unflatten_dict(kernels, sep="/"), inputs), inputs)

    return Method(loss, trained, case.params)


def merge(case: Case) -> Any:
    """Returns parameters for the unmodified model."""
    params = unflatten_dict(case.kernels() | weights_of(case), sep="/")
    return lorax.merge_params(params, destructive=False)
