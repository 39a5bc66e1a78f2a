"""Flax's `TrainState` for a frozen base and a trained adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax
from flax.training.train_state import TrainState

from .._core.adapter import Adapters
from ._freeze_base import freeze_base


def train_state(
    adapted: Callable[..., Any], params: Any, adapter: Adapters, tx: optax.GradientTransformation
) -> TrainState:
    """Makes a `TrainState` that holds base and adapter in one tree, and trains the adapter only.

    `state.params` is `{"base": params, "adapter": adapter}`, and `state.apply_fn(state.params, *args)` calls the
    adapted function. The optimizer sees the adapter only; see `freeze_base`. A training loop without `TrainState` can
    keep the two trees apart, and needs no wrapper.

    >>> import jax, jax.numpy as jnp, lora_jax as lj, optax
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> adapted = lj.lora(lambda params, x: x @ params["kernel"])
    >>> state = lj.optim.train_state(adapted, params, adapter, optax.adam(1e-3))
    >>> gradient = jax.grad(lambda tree: state.apply_fn(tree, jnp.ones((2, 4))).mean())(state.params)
    >>> state = state.apply_gradients(grads=gradient)
    >>> bool(jnp.array_equal(state.params["base"]["kernel"], params["kernel"])), int(state.step)
    (True, 1)

    Args:
      adapted: from `lora` or `adapt`.
      params: the base; part of the state, so that it is an argument of a jitted step and not a constant. If it is
        quantized, differentiate with `jax.grad(…, allow_int=True)`.
      adapter: from `init` or `adapt`.
      tx: any optax optimizer.

    Returns:
      The state. Differentiate in all of `state.params`: under `jit` the gradient of the base is never computed.
    """

    def apply_fn(tree: Any, /, *args: Any, **kwargs: Any) -> Any:
        return adapted(tree["base"], tree["adapter"], *args, **kwargs)

    state: TrainState = TrainState.create(
        apply_fn=apply_fn, params={"base": params, "adapter": dict(adapter)}, tx=freeze_base(tx)
    )
    return state
