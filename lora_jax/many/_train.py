"""Trains all adapters of a stack in one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from .._core.adapter import Adapter
from .._errors import AdapterError
from ._member import Member, Stack


def train_step(
    loss_fn: Callable[..., Array],
    tx: optax.GradientTransformation,
    *,
    in_axes: int | Sequence[Any] | None = 0,
) -> Callable[..., tuple[Stack, Any, Array]]:
    """Returns a training step of all adapters of a stack, each with its own gradient, optimizer state and rate.

        θ_k ← θ_k + η_k·u_k        for adapter k, if it is active; u_k is the update of `tx`

    It is `jax.vmap` over the step of one adapter. The base is not mapped, so its products are those of one batch with
    the examples of all adapters. Nothing compiles again for other rates, or if adapters stop.

    >>> import jax, jax.numpy as jnp, lora_jax as lj, optax
    >>> params, apply = {"kernel": jnp.ones((4, 3))}, lj.lora(lambda params, x: x @ params["kernel"], form="factored")
    >>> make = lambda rank: lj.init(jax.random.key(rank), params, {"kernel": lj.LoRA(rank=rank, alpha=1)})
    >>> stacked = lj.many.stack({"small": make(1), "large": make(2)})
    >>> tx = optax.adam(1.0)
    >>> step = jax.jit(lj.many.train_step(lambda params, adapter, x: jnp.mean(apply(params, adapter, x) ** 2), tx))
    >>> states = jax.vmap(tx.init)(stacked.members.trainable)
    >>> rates, active = jnp.array([1e-3, 3e-2]), jnp.array([True, False])
    >>> stacked, states, losses = step(params, stacked, states, jnp.ones((2, 5, 4)), rates=rates, active=active)
    >>> losses
    Array([16., 16.], dtype=float32)

    Args:
      loss_fn: `(params, adapter, *args) -> loss`, a scalar, of one adapter. With `lora(apply, form="factored")` it
        materializes no kernel for each adapter.
      tx: the optimizer of one adapter. Its state is `jax.vmap(tx.init)(stacked.members.trainable)`. It sees arrays with
        padded ranks: where ranks differ, one that depends on the shape of an array, such as Adafactor or Muon, takes
        other steps than for the adapter by itself.
      in_axes: the axis of the adapters in `*args`, as in `jax.vmap`: one for all arguments, or one for each. None is
        for what all adapters share.

    Returns:
      `step(params, stacked, states, *args, rates=None, active=None) -> (stacked, states, losses)`. `rates`, of shape
      (adapters,), multiply the updates: they are the learning rates if that of `tx` is 1. An adapter for which
      `active`, booleans of shape (adapters,), is False keeps its arrays and its state; its FLOPs are still spent.
      `losses` are of shape (adapters,), before the update.

    Raises:
      AdapterError: at the call, if `stacked` is not a stack, or `rates` or `active` are not one for each adapter.
    """

    def step(
        params: Any, stacked: Stack, states: Any, /, *args: Any, rates: Any = None, active: Any = None
    ) -> tuple[Stack, Any, Array]:
        if not isinstance(stacked, Stack):
            raise AdapterError(f"Expected a `Stack`, as `many.stack` returns; got {type(stacked).__name__}.")
        for name, given in (("rates", rates), ("active", active)):
            if given is not None and jnp.shape(given) != (len(stacked.names),):
                raise AdapterError(
                    f"Expected `{name}` for each of the {len(stacked.names)} adapters; got {jnp.shape(given)}."
                )

        def one(member: Member, state: Any, rate: Any, active: Any, *args: Any) -> Any:
            def loss_of(trainable: dict[str, Adapter]) -> Array:
                return loss_fn(params, member.replace(trainable), *args)

            old = member.trainable, state
            loss, gradient = jax.value_and_grad(loss_of)(member.trainable)
            updates, state = tx.update(gradient, state, member.trainable)
            if rate is not None:
                updates = jax.tree.map(lambda update: jnp.asarray(rate, update.dtype) * update, updates)
            new = optax.apply_updates(member.trainable, updates), state
            if active is not None:
                new = jax.tree.map(lambda new, old: jnp.where(active, new, old), new, old)
            trainable, state = new
            return member.replace(trainable), state, loss

        axes = in_axes if isinstance(in_axes, Sequence) else [in_axes] * len(args)
        mapped = jax.vmap(one, in_axes=(0, 0, 0, 0, *axes))
        members, states, losses = mapped(stacked.members, states, rates, active, *args)
        return stacked.replace(members), states, losses

    return step
