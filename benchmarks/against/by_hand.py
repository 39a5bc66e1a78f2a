"""The references: LoRA by hand, kernels materialized in each step, and full fine-tuning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from decoder import ByHand, Method, on_matrices
from flax.traverse_util import unflatten_dict
from jax import Array

from . import AGAIN, BIAS_FIRST, BY_HAND, FULL, MERGED
from .cases import Case


def by_hand(case: Case, *, bias_first: bool = False) -> Method:
    """x·W + ((x·A)·s)·B + bias, written into the layers."""
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
    """The unmodified model, with kernels `W0 + s·A·B` materialized in each step; the reference for all values."""
    adapter = {path: (factors.a, factors.b) for path, factors in case.adapter.items()}

    def loss(adapter: Any, params: Any, inputs: Array) -> Array:
        return case.loss(case.apply(materialize(case._replace(params=params), adapter), inputs), inputs)

    return Method(loss, adapter, case.params)


def materialize(case: Case, adapter: Any) -> Any:
    """Returns the parameters with `(a, b)` merged into the kernel of each path."""
    kernels = case.kernels()
    for path, (a, b) in adapter.items():
        delta = case.adapter[path]._replace(a=a * case.scale, b=b).delta()
        kernels[path] = (kernels[path] + delta).astype(kernels[path].dtype)
    return unflatten_dict(kernels, sep="/")


def full_fine_tuning(case: Case) -> Method:
    """Full fine-tuning: trains every parameter, without an adapter."""

    def loss(params: Any, frozen: None, inputs: Array) -> Array:
        del frozen  # nothing is frozen
        return case.loss(case.apply(params, inputs), inputs)

    return Method(loss, case.params, None)


METHODS: dict[str, Callable[[Case], Method]] = {
    BY_HAND: by_hand,
    AGAIN: by_hand,
    BIAS_FIRST: functools.partial(by_hand, bias_first=True),
    MERGED: merged,
    FULL: full_fine_tuning,
}
