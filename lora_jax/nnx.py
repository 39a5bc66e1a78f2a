"""NNX modules as functions of their parameters, and adapters as NNX modules. Importing this module loads `flax.nnx`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from ._core.adapter import Adapter, Adapters, kind_of

__all__ = ["AdapterModule", "Functional", "functional"]


class Functional(NamedTuple):
    """A module as a function of its state.

    Attributes:
      apply: `apply(params, rest, *args, **kwargs) -> (outputs, rest)`; `rest` comes back as the call has left it.
      params: the variables that may be adapted.
      rest: all other variables: batch statistics, caches, keys and counts of random streams.
    """

    apply: Callable[..., Any]
    params: Any
    rest: Any


def functional(module: Any, *, wrt: Any = None, method: str | None = None) -> Functional:
    """Splits an NNX module into a pure function, its parameters, and the rest of its state.

    The module itself is not changed by calls of the function. To write values back: `nnx.update(module, params, rest)`.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from flax import nnx
    >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    >>> apply, params, rest = lj.nnx.functional(model)
    >>> adapted, adapter = lj.adapt(
    ...     apply, params, {"kernel": lj.LoRA(rank=2, alpha=4)}, rest, jnp.ones((2, 4)), key=jax.random.key(0)
    ... )
    >>> y, rest = adapted(params, adapter, rest, jnp.ones((2, 4)))
    >>> y.shape
    (2, 3)

    Args:
      module: any `nnx.Module`.
      wrt: an NNX filter for `params`; `nnx.Param` by default.
      method: the name of the method to call; `__call__` by default.

    Returns:
      `(apply, params, rest)`. `apply` returns `(outputs, rest)`, and raises `TypeError` if `rest` is not a state.

    Raises:
      TypeError: if `module` is not an `nnx.Module`.
      AttributeError: if it has no such method.
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"Expected an nnx.Module; got {type(module).__name__}.\n"
            "  Functions and Linen modules need no conversion: use lora_jax.lora(model.apply)."
        )
    if method is not None:
        getattr(module, method)  # raises now, not in the first call
    wrt = nnx.Param if wrt is None else wrt
    graph, params, rest = nnx.split(module, wrt, ...)

    def apply(params: Any, rest: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not isinstance(rest, Mapping):
            raise TypeError(
                f"Expected the rest of the state of `{type(module).__name__}`, the third result of `functional`, after "
                f"the parameters and the adapter; got {kind_of(rest)}.\n"
                "  Call apply(params, rest, *args), or lora(apply)(params, adapter, rest, *args)."
            )
        merged = nnx.merge(graph, params, rest, copy=True)  # variables of this trace
        outputs = (merged if method is None else getattr(merged, method))(*args, **kwargs)
        return outputs, nnx.split(merged, wrt, ...)[2]

    return Functional(apply, params, rest)


class AdapterModule(nnx.Module):  # type: ignore[misc]
    """An adapter as an NNX module, for `nnx.Optimizer`, `nnx.grad` and `nnx.jit`.

    >>> import jax, jax.numpy as jnp, lora_jax as lj, optax
    >>> from flax import nnx
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> adapted = lj.lora(lambda params, x: x @ params["kernel"])
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> module = lj.nnx.AdapterModule(adapter)
    >>> optimizer = nnx.Optimizer(module, optax.adam(1e-3), wrt=nnx.Param)
    >>> @nnx.jit
    ... def train_step(module, optimizer, params, x):
    ...     grads = nnx.grad(lambda module: adapted(params, module.adapter, x).mean())(module)
    ...     optimizer.update(module, grads)
    >>> train_step(module, optimizer, params, jnp.ones((2, 4)))
    >>> bool(jnp.any(module.adapter["kernel"].b))
    True

    Args:
      adapter: from `init`, training or `restore`. Each of its arrays becomes an `nnx.Param`.
    """

    def __init__(self, adapter: Adapters) -> None:
        self.parts = nnx.data(jax.tree.map(nnx.Param, dict(adapter)))

    @property
    def adapter(self) -> dict[str, Adapter]:
        """The adapter, with the current values."""
        adapter: dict[str, Adapter] = jax.tree.map(
            lambda variable: variable[...], self.parts, is_leaf=lambda node: isinstance(node, nnx.Variable)
        )
        return adapter
