"""A model as a function of its adapter, and the JAX transformations under which the laws are tested."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from evaluate import without_compiling
from helpers import FORWARD, GRADIENT, dense
from law import total
from zoo.model import Model

import lora_jax as lj

Call = Callable[[Any, jax.Array], Any]  # (adapter, batch) -> arrays


def call(apply: Callable[..., Any], model: Model) -> Call:
    """The model as a function of the adapter and the batch, without results that are not arrays."""
    leaves, treedef = jax.tree.flatten((model.params, model.args[1:]))

    def run(adapter: Any, batch: jax.Array) -> Any:
        params, rest = jax.tree.unflatten(treedef, leaves)  # a copy, because NNX refuses the variables of another trace
        out = apply(params, adapter, batch, *rest)
        return [as_numbers(leaf) for leaf in jax.tree.leaves(out) if isinstance(leaf, jax.Array)]

    return run


def as_numbers(array: jax.Array) -> jax.Array:
    """Replaces a PRNG key, which stateful models return, by the integers that represent it."""
    return jax.random.key_data(array) if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key) else array


def loss(run: Call) -> Call:
    """A function that returns a scalar to differentiate, and the result."""

    def compute_loss(adapter: Any, batch: jax.Array) -> Any:
        out = run(adapter, batch)
        return total(out), out

    return compute_loss


def gradient(run: Call) -> Call:
    """A function that returns the adapter's gradient and the result."""
    return jax.grad(loss(run), has_aux=True)


def law(model: Model, *adapters: Any, compiled: bool = True) -> list[tuple[Any, Any]]:
    """For each adapter, gradient and result with adapted and with merged kernels; all adapters run one program."""
    adapted = call(lj.lora(model.apply), model)
    if compiled:
        chex.clear_trace_counter()
        adapted = chex.assert_max_traces(adapted, n=1)
    merged = call(dense(model.apply), model)

    # One program, because compilation takes most of the time.
    def compute(adapter: Any, batch: jax.Array) -> Any:
        return gradient(adapted)(adapter, batch), gradient(merged)(adapter, batch)

    run = jax.jit(compute) if compiled else without_compiling(compute)
    return [run(adapter, model.args[0]) for adapter in adapters]


def under(transform: str, model: Model, adapter: Any) -> tuple[Any, Any, dict[str, float]]:
    """Results of a transformed model with adapted kernels and with merged kernels, and the tolerances."""
    function, table = TRANSFORMS[transform]
    runs = call(lj.lora(model.apply), model), call(dense(model.apply), model)

    def compute(adapter: Any, batch: jax.Array) -> Any:
        return [function(run, adapter, batch) for run in runs]

    eager = transform in ("eager", "pmap")
    got, expected = (compute if eager else without_compiling(compute))(adapter, model.args[0])
    return got, expected, table


def two(adapter: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf / 2]), adapter)


def jvp(run: Call, adapter: Any, batch: jax.Array) -> Any:
    return jax.jvp(lambda adapter: run(adapter, batch), (adapter,), (jax.tree.map(jnp.ones_like, adapter),))[1]


def scan(run: Call, adapter: Any, batch: jax.Array) -> Any:
    return jax.lax.scan(lambda carry, adapter: (carry, run(adapter, batch)), 0, two(adapter))[1]


def pmap(run: Call, adapter: Any, batch: jax.Array) -> Any:
    shards = jnp.stack([batch] * 8) if batch.shape[0] % 8 else batch.reshape(8, -1, *batch.shape[1:])
    return jax.pmap(run, in_axes=(None, 0))(adapter, shards)


TRANSFORMS: dict[str, tuple[Callable[..., Any], dict[str, float]]] = {
    "eager": (lambda run, adapter, batch: run(adapter, batch), FORWARD),
    "grad": (lambda run, adapter, batch: jax.jit(gradient(run))(adapter, batch), GRADIENT),
    "vmap": (lambda run, adapter, batch: jax.jit(jax.vmap(run, (0, None)))(two(adapter), batch), FORWARD),
    "scan": (lambda run, adapter, batch: jax.jit(lambda ad, x: scan(run, ad, x))(adapter, batch), FORWARD),
    "remat": (lambda run, adapter, batch: jax.jit(gradient(jax.checkpoint(run)))(adapter, batch), GRADIENT),
    "jvp": (lambda run, adapter, batch: jax.jit(lambda ad, x: jvp(run, ad, x))(adapter, batch), GRADIENT),
    "pmap": (pmap, FORWARD),
}
