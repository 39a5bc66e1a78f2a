# pyright: standard, reportUnnecessaryTypeIgnoreComment=true
"""A user's file that mypy and pyright check (`make types`): the public functions have the types that users rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type, cast

import jax
import jax.numpy as jnp
import optax

import lora_jax as lj
from lora_jax import many, optim, peft, quant, starts

Params = dict[str, dict[str, jax.Array]]


def apply(params: Params, x: jax.Array) -> jax.Array:
    return x @ params["up"]["kernel"]


def train(params: Params, x: jax.Array, directory: Path) -> Params:
    """A training step, a checkpoint, and merging."""
    spec = {"**/kernel": lj.LoRA(rank=2, alpha=4)}
    adapter = lj.init(jax.random.key(0), params, spec)
    assert_type(adapter, dict[str, lj.Adapter])
    adapted = lj.lora(apply)

    def loss(adapter: dict[str, lj.Adapter]) -> jax.Array:
        return jnp.mean(adapted(params, adapter, x) ** 2)

    tx = optax.chain(optax.sgd(0.1), optim.lora_plus(16))
    trainable: Any = adapter  # optax's own type of parameters is a tree of arrays without classes
    state = tx.init(trainable)
    gradient = jax.grad(loss)(adapter)
    updates, state = tx.update(gradient, state, trainable)
    adapter = cast(dict[str, lj.Adapter], optax.apply_updates(trainable, updates))
    lj.save(directory, adapter, base=params)
    restored = lj.restore(directory, base=params)
    assert_type(restored, dict[str, lj.Adapter])
    merged: Params = lj.merge(params, restored)
    return merged


def exchange(params: Params, adapter: dict[str, lj.Adapter], directory: Path) -> dict[str, lj.Adapter]:
    """PEFT's files."""
    mapping: dict[str, peft.Row] = peft.layer("up", "model.fc1")
    peft.export(directory, adapter, mapping, base=params, task_type="FEATURE_EXTRACTION")
    return peft.load(directory, mapping, params)


def others(key: jax.Array, params: Params, adapter: dict[str, lj.Adapter], x: jax.Array) -> Any:
    """Other initializations, a quantized base and several adapters."""
    started = starts.pissa(params, adapter)
    assert_type(started, starts.Start)
    quantized = quant.quantize(params, {"**/kernel": quant.NF4()})
    y = lj.lora(apply)(quantized, adapter, x)
    stacked = many.stack({"one": adapter, "other": started.adapter})
    assert_type(stacked, many.Stack)
    del key
    return y, many.per_example(apply)(params, stacked, jnp.array([0, 1]), x)


def wrong(params: Params) -> None:
    """What a checker must find."""
    lj.LoRA(rank="two", alpha=4)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    lj.LoRA(rank=8)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    lj.merge(params)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    lj.no_such_function()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
