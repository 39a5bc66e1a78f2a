"""An optimizer whose state is in host memory between steps."""

from __future__ import annotations

from typing import Any

import jax
import optax

from .._core.memory import check_host_memory, is_in_host_memory, to_device, to_host


def offload(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keeps the state of an optimizer in host memory between steps.

    The paged optimizers of QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3) move state that does not fit into
    the memory of a GPU to the host, page by page. Here the arrays of the state have the memory kind `"pinned_host"`.
    Each step moves them to the device and the new state back; the compiler schedules these transfers. Scalars, such as
    the step count and the learning rate of `optax.inject_hyperparams`, stay on the device.

    The updates are those of `tx`, and the state has the same structure and shardings. It goes around the whole
    optimizer.

    Donate the adapter and the state together, and return them in this order, as below. JAX pairs donated arguments with
    results of the same shape, in their order, and compares memory kinds only if `in_shardings` and `out_shardings` are
    given: donated state that is paired with a result on the device ends the process, or is a compiler error.

    >>> import functools, jax, jax.numpy as jnp, optax
    >>> tx = offload(optax.adam(1e-3))
    >>> @functools.partial(jax.jit, donate_argnums=(0, 1))
    ... def step(adapter, state, gradient):
    ...     updates, state = tx.update(gradient, state, adapter)
    ...     return optax.apply_updates(adapter, updates), state
    >>> adapter, gradient = {"kernel": jnp.ones((4, 2))}, {"kernel": jnp.ones((4, 2))}
    >>> adapter, state = step(adapter, tx.init(adapter), gradient)
    >>> adapter["kernel"].sharding.memory_kind, state[0].mu["kernel"].sharding.memory_kind
    ('device', 'pinned_host')

    Args:
      tx: any optax optimizer.

    Returns:
      A transformation with the state of `tx`.

    Raises:
      UnsupportedError: from `init`, if the backend has no pinned host memory.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> optax.OptState:
        check_host_memory(params)
        return _to_host(inner.init(params))

    def update(
        updates: Any, state: optax.OptState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.OptState]:
        updates, state = inner.update(updates, _to_device(state), params, **extra_args)
        return updates, _to_host(state)

    return optax.GradientTransformationExtraArgs(init, update)


def _to_host(state: Any) -> Any:
    return jax.tree.map(lambda leaf: to_host(leaf) if getattr(leaf, "ndim", 0) else leaf, state)


def _to_device(state: Any) -> Any:
    return jax.tree.map(lambda leaf: to_device(leaf) if is_in_host_memory(leaf) else leaf, state)
