"""A decoder, trained with `lora()`, with LoRA by hand, with merged kernels, and by full fine-tuning.

All methods use the same weights and the same values of the adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from decoder import ByHand, Decoder, Method, cross_entropy, plain
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from sizes import ALPHA, Size

import lora_jax as lj


class Case(NamedTuple):
    """A model with its weights, an adapter, and tokens."""

    model: Decoder
    params: Any
    adapter: dict[str, lj.Adapter]
    tokens: Array


def case(size: Size, *, scanned: bool, tied: bool = True, dtype: Any = jnp.float32) -> Case:
    """Returns a model, and a nonzero float32 adapter for all kernels of its layers."""
    model = Decoder(size, scanned=scanned, tied=tied, dtype=dtype)
    for_params, for_tokens, for_adapter, for_b = jax.random.split(jax.random.key(0), 4)
    tokens = jax.random.randint(for_tokens, (size.batch, size.length), 0, size.vocabulary)
    params = jax.jit(model.init)(for_params, tokens)["params"]
    spec = {"**/{query,key,value,out,up,down}/kernel": lj.LoRA(rank=size.rank, alpha=ALPHA)}
    found = lj.kernels(plain(model), params, tokens)
    adapter = lj.init(for_adapter, params, spec, kernels=found)
    leaves, treedef = jax.tree_util.tree_flatten(adapter)
    noise = [
        0.02 * jax.random.normal(key, x.shape)
        for key, x in zip(jax.random.split(for_b, len(leaves)), leaves, strict=True)
    ]
    return Case(model, params, jax.tree_util.tree_unflatten(treedef, map(jnp.add, leaves, noise)), tokens)


def through_lora(case: Case, *, form: Any = None) -> Method:
    """The unmodified model, with `lora()`."""
    adapted = lj.lora(plain(case.model), form=form)

    def loss(adapter: Any, params: Any, tokens: Array) -> Array:
        return cross_entropy(adapted(params, adapter, tokens), tokens)

    return Method(loss, case.adapter, case.params)


def by_hand(case: Case, *, bias_first: bool = False) -> Method:
    """The model with LoRA in its layers."""
    model = case.model.clone(dense=functools.partial(ByHand, rank=case.model.size.rank, bias_first=bias_first))

    def loss(adapter: Any, params: Any, tokens: Array) -> Array:
        return cross_entropy(model.apply({"params": params, "adapter": adapter}, tokens), tokens)

    return Method(loss, as_collection(case.adapter), case.params)


def merged(case: Case) -> Method:
    """The unmodified model, with kernels `W0 + s·A·B` that are materialized in each step."""
    apply = plain(case.model)

    def loss(adapter: Any, params: Any, tokens: Array) -> Array:
        return cross_entropy(apply(materialize(params, adapter), tokens), tokens)

    return Method(loss, case.adapter, case.params)


def full_fine_tuning(case: Case) -> Method:
    """Full fine-tuning: trains every parameter, without an adapter."""
    apply = plain(case.model)

    def loss(params: Any, frozen: None, tokens: Array) -> Array:
        del frozen  # nothing is frozen
        return cross_entropy(apply(params, tokens), tokens)

    return Method(loss, case.params, None)


def materialize(params: Any, adapter: Mapping[str, lj.Adapter]) -> Any:
    """Returns the parameters with `W0 + s·A·B` in place of each adapted kernel."""
    kernels = flatten_dict(params, sep="/")
    merged = {path: kernels[path] + _delta(part).astype(kernels[path].dtype) for path, part in adapter.items()}
    return unflatten_dict(kernels | merged, sep="/")


def _delta(part: lj.Adapter) -> Array:
    letters = "wxyzuv"[: len(part.axes)]
    batch, contracted, out = (
        "".join(letter for letter, axis in zip(letters, part.axes, strict=True) if axis == role) for role in "bio"
    )
    return jnp.einsum(f"{batch}{contracted}r,{batch}r{out}->{letters}", part.a * part.variant.scale, part.b)


def as_collection(adapter: Mapping[str, lj.Adapter]) -> Any:
    """Returns the arrays of an adapter as the collection of variables of `ByHand`."""
    flat = {
        f"{path.removesuffix('kernel')}{name}": x for path, part in adapter.items() for name, x in part.arrays.items()
    }
    return unflatten_dict(flat, sep="/")


METHODS: dict[str, Callable[[Case], Method]] = {
    "LoRA by hand": by_hand,
    "by hand, bias first": functools.partial(by_hand, bias_first=True),
    "lora()": through_lora,
    "W0 + s·A·B each step": merged,
    "full fine-tuning": full_fine_tuning,
}
