"""One tree with base and adapter, of which an optimizer trains the adapter only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._errors import AdapterError


def freeze_base(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Lets an optimizer work on the adapter in a tree `{"base": …, "adapter": …}`, and leaves the base as it is.

    For code that wants one tree, such as `flax.training.TrainState`. The optimizer is given the adapter alone: it keeps
    no state for the base, and clipping by global norm, weight decay and schedules see nothing of it. The base gets zero
    updates; its gradients are used nowhere, so under `jit` the compiler removes their computation. Where the code is
    free to choose, two trees are simpler: differentiate and optimize the adapter, with no mask and no wrapper.

    >>> import jax.numpy as jnp, optax
    >>> tree = {"base": {"kernel": jnp.ones((4, 4))}, "adapter": {"kernel": jnp.ones(2)}}
    >>> tx = freeze_base(optax.sgd(0.5))
    >>> updates, _ = tx.update(tree, tx.init(tree), tree)
    >>> updates["adapter"]["kernel"], float(abs(updates["base"]["kernel"]).sum())
    (Array([-0.5, -0.5], dtype=float32), 0.0)

    Args:
      tx: any optax optimizer.

    Returns:
      A transformation of trees with the keys `"base"` and `"adapter"`. Its state is that of `tx` for the adapter.

    Raises:
      AdapterError: from `init` and `update`, if a tree has other keys.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> optax.OptState:
        return inner.init(_parts(params)["adapter"])

    def update(
        updates: Any, state: optax.OptState, params: Any = None, **extra_args: Any
    ) -> tuple[dict[str, Any], optax.OptState]:
        parts = _parts(updates)
        adapter = None if params is None else _parts(params)["adapter"]
        new, state = inner.update(parts["adapter"], state, adapter, **extra_args)
        # Minus zero: adding it leaves every number as it is, bit for bit; plus zero would turn -0.0 into 0.0.
        given = {"base": jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), parts["base"]), "adapter": new}
        return type(updates)({key: given[key] for key in updates}), state

    return optax.GradientTransformationExtraArgs(init, update)


def _parts(tree: Any) -> Mapping[str, Any]:
    if not isinstance(tree, Mapping) or set(tree) != {"base", "adapter"}:
        got = sorted(tree) if isinstance(tree, Mapping) else type(tree).__name__
        raise AdapterError(
            f'Expected a tree with the keys "base" and "adapter"; got {got}.\n'
            '  Keep the two side by side: TrainState.create(params={"base": params, "adapter": adapter}, …).'
        )
    return tree
