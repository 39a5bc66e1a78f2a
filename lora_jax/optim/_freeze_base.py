"""One tree that holds the base and the adapter, of which an optimizer trains only the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._errors import AdapterError


def freeze_base(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Applies an optimizer to the adapter of a tree `{"base": …, "adapter": …}` and freezes the base.

    For code that expects one tree, such as `flax.training.TrainState`. The optimizer receives only the adapter: the
    base has no optimizer state and takes no part in clipping by global norm or in weight decay. Its updates are zero.
    Its gradients are not used, so under `jit` the compiler removes their computation. If no API requires one tree, two
    trees are simpler: differentiate and optimize the adapter, with no mask and no wrapper.

    A quantized base has integers: differentiate with `jax.grad(…, allow_int=True)`.

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
        return inner.init(_checked(params)["adapter"])

    def update(
        updates: Any, state: optax.OptState, params: Any = None, **extra_args: Any
    ) -> tuple[dict[str, Any], optax.OptState]:
        tree = _checked(updates)
        adapter = None if params is None else _checked(params)["adapter"]
        new, state = inner.update(tree["adapter"], state, adapter, **extra_args)
        base = tree["base"] if params is None else _checked(params)["base"]
        results = {"base": jax.tree.map(_no_update, tree["base"], base), "adapter": new}
        return type(updates)({key: results[key] for key in updates}), state

    return optax.GradientTransformationExtraArgs(init, update)


def _no_update(gradient: Any, leaf: Any) -> Any:
    if gradient.dtype == jax.dtypes.float0:  # of integers, such as the codes of a quantized kernel
        return np.zeros(leaf.shape, bool if leaf is gradient else leaf.dtype)
    if gradient.dtype == jnp.float8_e8m0fnu:  # powers of two without zero, of which the least counts as zero in a sum
        return jnp.full_like(gradient, jnp.finfo(gradient.dtype).tiny)
    # Adding -0.0 changes no bit of any value; adding 0.0 would turn -0.0 into 0.0.
    return jnp.full_like(gradient, -0.0)


def _checked(tree: Any) -> Mapping[str, Any]:
    if not isinstance(tree, Mapping) or set(tree) != {"base", "adapter"}:
        got = sorted(tree) if isinstance(tree, Mapping) else type(tree).__name__
        raise AdapterError(
            f'Expected a tree with the keys "base" and "adapter"; got {got}.\n'
            '  Put both into one dict: TrainState.create(params={"base": params, "adapter": adapter}, …).'
        )
    return tree
