"""What libraries are measured by: LoRA written into the model, formed in each step, and full fine-tuning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from decoder import ByHand, Method, on_matrices
from flax.traverse_util import unflatten_dict
from jax import Array

from . import AGAIN, BIAS_FIRST, BY_HAND, MERGED, WHOLE
from .cases import Case


def by_hand(case: Case, *, bias_first: bool = False) -> Method:
    """x·W + ((x·A)·s)·B + bias in the layers themselves."""
    layer = functools.partial(ByHand, rank=case.rank, bias_first=bias_first)
    matrices = all(factors.roles.strip("b") == "io" for factors in case.adapter.values())
    model = case.model.clone(dense=on_matrices(layer) if matrices else layer)
    adapter = {
        path.removesuffix("kernel") + name: getattr(factors, name)
        for path, factors in case.adapter.items()
        for name in "ab"
    }

    def loss(adapter: Any, params: Any, inputs: Array) -> Array:
        return case.loss(model.apply({"params": params, "adapter": adapter}, inputs), inputs)

    return Method(loss, unflatten_dict(adapter, sep="/"), case.params)


def merged(case: Case) -> Method:
    """The model as it stands, of kernels `W0 + s·A·B` that are formed in each step; the oracle of all the others."""
    adapter = {path: (factors.a, factors.b) for path, factors in case.adapter.items()}

    def loss(adapter: Any, params: Any, inputs: Array) -> Array:
        return case.loss(case.apply(formed(case._replace(params=params), adapter), inputs), inputs)

    return Method(loss, adapter, case.params)


def formed(case: Case, adapter: Any) -> Any:
    """The parameters with `(a, b)` of each path folded in."""
    kernels = case.kernels()
    for path, (a, b) in adapter.items():
        delta = case.adapter[path]._replace(a=a * case.scale, b=b).delta()
        kernels[path] = (kernels[path] + delta).astype(kernels[path].dtype)
    return unflatten_dict(kernels, sep="/")


def whole(case: Case) -> Method:
    """Full fine-tuning: no adapter, every parameter trained."""

    def loss(params: Any, frozen: None, inputs: Array) -> Array:
        del frozen  # nothing is
        return case.loss(case.apply(params, inputs), inputs)

    return Method(loss, case.params, None)


METHODS: dict[str, Callable[[Case], Method]] = {
    BY_HAND: by_hand,
    AGAIN: by_hand,
    BIAS_FIRST: functools.partial(by_hand, bias_first=True),
    MERGED: merged,
    WHOLE: whole,
}
