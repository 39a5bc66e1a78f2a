"""The laws: what holds for every model and every transform, against the dense kernel."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from helpers import FORWARD, GRADIENT, assert_close, dense, trained
from zoo import ZOO, Model

import lora_jax as lj

Call = Callable[[Any, jax.Array], Any]  # (adapter, batch) -> arrays
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make(name: str, dtype: str, key: jax.Array) -> tuple[Model, Any]:
    model = ZOO[name](key, DTYPES[dtype])
    kernels = lj.kernels(model.apply, model.params, *model.args)
    return model, jax.jit(lambda key, params: lj.init(key, params, model.spec, kernels=kernels))(key, model.params)


def call(apply: Callable[..., Any], model: Model, *, params: Any = None) -> Call:
    """The model as a function of the adapter and the batch; what it returns that is no array is left out."""
    batch, *rest = model.args
    del batch

    def run(adapter: Any, batch: jax.Array) -> Any:
        out = apply(model.params if params is None else params, adapter, batch, *rest)
        return [leaf for leaf in jax.tree.leaves(out) if isinstance(leaf, jax.Array)]

    return run


def loss(run: Call) -> Callable[[Any, jax.Array], jax.Array]:
    return lambda adapter, batch: sum(jnp.sum(jnp.sin(leaf.astype(jnp.float32))) for leaf in run(adapter, batch))


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
    "jit": (lambda run, adapter, batch: jax.jit(run)(adapter, batch), FORWARD),
    "grad": (lambda run, adapter, batch: jax.jit(jax.grad(loss(run)))(adapter, batch), GRADIENT),
    "vmap": (lambda run, adapter, batch: jax.jit(jax.vmap(run, (0, None)))(two(adapter), batch), FORWARD),
    "scan": (lambda run, adapter, batch: jax.jit(lambda ad, x: scan(run, ad, x))(adapter, batch), FORWARD),
    "remat": (lambda run, adapter, batch: jax.jit(jax.grad(loss(jax.checkpoint(run))))(adapter, batch), GRADIENT),
    "jvp": (lambda run, adapter, batch: jax.jit(lambda ad, x: jvp(run, ad, x))(adapter, batch), GRADIENT),
    "pmap": (pmap, FORWARD),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ZOO)
def test_at_the_start_the_model_is_what_it_was_bit_for_bit(name: str, dtype: str, key: jax.Array) -> None:
    model, adapter = make(name, dtype, key)
    # Without this option XLA may round a bfloat16 sum later in one program than in the other.
    jit = functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    base = jit(call(lambda params, adapter, *args: model.apply(params, *args), model))(adapter, model.args[0])
    chex.assert_trees_all_equal(jit(call(lj.lora(model.apply), model))(adapter, model.args[0]), base)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ZOO)
def test_the_adapted_model_is_the_model_with_merged_kernels(name: str, transform: str, key: jax.Array) -> None:
    model, adapter = make(name, "float32", key)
    under, table = TRANSFORMS[transform]
    adapter, batch = trained(key, adapter), model.args[0]
    got = under(call(lj.lora(model.apply), model), adapter, batch)
    assert_close(got, under(call(dense(model.apply), model), adapter, batch), table)


@pytest.mark.parametrize("transform", ["jit", "grad"])
@pytest.mark.parametrize("name", ZOO)
def test_a_base_in_bfloat16_keeps_its_dtype_and_the_laws(name: str, transform: str, key: jax.Array) -> None:
    dtype = "bfloat16"
    model, adapter = make(name, dtype, key)
    under, table = TRANSFORMS[transform]
    adapter, batch = trained(key, adapter, size=0.1), model.args[0]
    got = under(call(lj.lora(model.apply), model), adapter, batch)
    assert_close(got, under(call(dense(model.apply), model), adapter, batch), table, dtype=dtype)
    chex.assert_trees_all_equal_dtypes(lj.merge(model.params, adapter), model.params)


@pytest.mark.parametrize("name", ZOO)
def test_a_second_call_with_new_values_traces_nothing(name: str, key: jax.Array) -> None:
    model, adapter = make(name, "float32", key)
    chex.clear_trace_counter()
    run = jax.jit(chex.assert_max_traces(call(lj.lora(model.apply), model), n=1))
    for values in (adapter, trained(key, adapter)):
        run(values, model.args[0])


@pytest.mark.parametrize("name", ZOO)
def test_every_leaf_of_the_adapter_is_used_and_gets_a_gradient(name: str, key: jax.Array) -> None:
    model, adapter = make(name, "float32", key)
    lj.explain(model.apply, model.params, adapter, *model.args, strict=True)
    adapter = trained(key, adapter)
    gradient = jax.jit(jax.grad(loss(call(lj.lora(model.apply), model))))(adapter, model.args[0])
    for path, part in gradient.items():
        assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(part)), path
