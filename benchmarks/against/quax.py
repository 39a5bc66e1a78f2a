"""Quax: its `LoraArray` in place of each kernel, in the unmodified model under `quaxify`."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import quax
from decoder import Method
from flax.traverse_util import unflatten_dict
from jax import Array
from quax.examples.lora import LoraArray

from .cases import Case
from .fit import fitted


def arrays_of(case: Case, *, allow_materialise: bool = False) -> dict[str, LoraArray]:
    """Returns a `LoraArray` for each adapted kernel. There is no alpha, so `b` is multiplied by the scale."""
    arrays = {}
    for path, factors in case.adapter.items():
        kernel = case.kernels()[path]
        array = LoraArray(kernel, rank=case.rank, key=jax.random.key(0), allow_materialise=allow_materialise)
        new = fitted("a", factors.a, {"a": array.a}), fitted("b", factors.b * case.scale, {"b": array.b})
        arrays[path] = eqx.tree_at(factors_of, array, new)
    return arrays


def build(case: Case, *, allow_materialise: bool = False) -> Method:
    """Trains `a` and `b`, partitioned from the other arrays with Equinox."""
    arrays = arrays_of(case, allow_materialise=allow_materialise)
    frozen_masks = {path: jax.tree.map(lambda _: False, array) for path, array in arrays.items()}
    masks = {path: eqx.tree_at(factors_of, mask, (True, True)) for path, mask in frozen_masks.items()}
    spec = dict.fromkeys(case.kernels(), False) | masks
    trained, frozen = eqx.partition(unflatten_dict(case.kernels() | arrays, sep="/"), unflatten_dict(spec, sep="/"))

    def loss(trained: Any, frozen: Any, inputs: Array) -> Array:
        return case.loss(quax.quaxify(case.apply)(eqx.combine(trained, frozen), inputs), inputs)

    return Method(loss, trained, frozen)


def dense(case: Case) -> Method:
    """The same, with materialization allowed."""
    return build(case, allow_materialise=True)


def factors_of(array: LoraArray) -> tuple[Array, Array]:
    """Returns the trained arrays."""
    return array.a, array.b


def merge(case: Case) -> Any:
    """Returns parameters for the unmodified model. Quax has to allow materialization when it makes the array."""
    merged = {path: array.materialise() for path, array in arrays_of(case, allow_materialise=True).items()}
    return unflatten_dict(case.kernels() | merged, sep="/")
