"""MLoRAx: forms `W0 + s·A·B` for every kernel whose path contains a given string, in each call."""

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


def start(case: Case, params: Any) -> tuple[Any, Callable[..., Array], Callable[[Any], Any]]:
    """What is trained, at its start, the function of it, and what merges it. The base is a constant of both."""
    rules = [path.replace("/", ".") for path in case.adapter]
    spec = mlorax.LoRASpec(rank=case.rank, rules=rules, alpha=ALPHA, logger_level="WARNING")
    return mlorax.lora_init(spec, None, params=params, apply_fn=case.apply)


def trained_of(case: Case) -> Any:
    """The values of the case in its tree."""
    made = flatten_dict(jax.eval_shape(lambda: start(case, case.params)[0]), sep="/")
    trained = {
        path: fitted(path, getattr(factors, name), made)
        for kernel, factors in case.adapter.items()
        for name in "ab"
        for path in [f"{kernel}/$lora$/{name}"]
    }
    return unflatten_dict(trained, sep="/")


def build(case: Case) -> Method:
    """Trains its tree; the base is given to it inside the step, so that it is no constant of the compiled program."""

    def loss(trained: Any, frozen: Any, inputs: Array) -> Array:
        _, apply, _ = start(case, frozen)
        return case.loss(apply(trained, inputs=inputs), inputs)

    return Method(loss, trained_of(case), case.params)


def merge(case: Case) -> Any:
    """Parameters for the model as it stands."""
    return start(case, case.params)[2](trained_of(case))
