"""MLoRAx: materializes `W0 + s·A·B` in each call, for every kernel whose path contains a given string."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import mlorax
from decoder import Method
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from sizes import ALPHA

from .cases import Case
from .fit import fitted


def initialize(case: Case, params: Any) -> tuple[Any, Callable[..., Array], Callable[[Any], Any]]:
    """Returns the initial trained tree, the adapted function and the merging function. Both close over the base."""
    rules = [path.replace("/", ".") for path in case.adapter]
    spec = mlorax.LoRASpec(rank=case.rank, rules=rules, alpha=ALPHA, logger_level="WARNING")
    return mlorax.lora_init(spec, None, params=params, apply_fn=case.apply)


def trained_of(case: Case) -> Any:
    """Returns the values of the case in MLoRAx's tree."""
    leaves = flatten_dict(jax.eval_shape(lambda: initialize(case, case.params)[0]), sep="/")
    trained = {
        path: fitted(path, getattr(factors, name), leaves)
        for kernel, factors in case.adapter.items()
        for name in "ab"
        for path in [f"{kernel}/$lora$/{name}"]
    }
    return unflatten_dict(trained, sep="/")


def build(case: Case) -> Method:
    """Trains MLoRAx's tree. It is initialized inside the step, so that the base is not a constant of the program."""

    def loss(trained: Any, frozen: Any, inputs: Array) -> Array:
        _, apply, _ = initialize(case, frozen)
        return case.loss(apply(trained, inputs=inputs), inputs)

    return Method(loss, trained_of(case), case.params)


def merge(case: Case) -> Any:
    """Returns parameters for the unmodified model."""
    return initialize(case, case.params)[2](trained_of(case))
