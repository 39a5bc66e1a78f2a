"""The laws: what holds for every model and every transform, against the dense kernel."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, assert_few_ulp, bits, dense, trained
from transforms import TRANSFORMS, call, loss
from zoo import ZOO, Model

import lora_jax as lj

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@functools.cache
def make(name: str, dtype: str) -> tuple[Model, Any]:
    key = jax.random.key(0)
    model = ZOO[name](key, DTYPES[dtype])
    kernels = lj.kernels(model.apply, model.params, *model.args)
    return model, jax.jit(lambda key, params: lj.init(key, params, model.spec, kernels=kernels))(key, model.params)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ZOO)
def test_at_the_start_the_model_is_what_it_was(name: str, dtype: str) -> None:
    model, adapter = make(name, dtype)
    # Without this option XLA may round a bfloat16 sum later in one program than in the other.
    jit = functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    base = jit(call(lambda params, adapter, *args: model.apply(params, *args), model))(adapter, model.args[0])
    # Factored: the compiler may sum a product with a formed kernel in another order, though the kernel is the same.
    assert_few_ulp(jit(call(lj.lora(model.apply, form="factored"), model))(adapter, model.args[0]), base)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["mlp", "conv_net", "tied_embedding", "experts", "equinox_net", "plain_function"])
def test_evaluated_operation_by_operation_it_is_what_it_was_bit_for_bit(name: str, dtype: str) -> None:
    model, adapter = make(name, dtype)
    with jax.disable_jit():
        base = call(lambda params, adapter, *args: model.apply(params, *args), model)(adapter, model.args[0])
        got = call(lj.lora(model.apply, form="factored"), model)(adapter, model.args[0])
    assert bits(got) == bits(base)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ZOO)
def test_the_adapted_model_is_the_model_with_merged_kernels(name: str, transform: str, key: jax.Array) -> None:
    model, adapter = make(name, "float32")
    under, table = TRANSFORMS[transform]
    adapter, batch = trained(key, adapter), model.args[0]
    got = under(call(lj.lora(model.apply), model), adapter, batch)
    assert_close(got, under(call(dense(model.apply), model), adapter, batch), table)


@pytest.mark.parametrize("transform", ["jit", "grad"])
@pytest.mark.parametrize("name", ZOO)
def test_a_base_in_bfloat16_keeps_its_dtype_and_the_laws(name: str, transform: str, key: jax.Array) -> None:
    dtype = "bfloat16"
    model, adapter = make(name, dtype)
    under, table = TRANSFORMS[transform]
    adapter, batch = trained(key, adapter, size=0.1), model.args[0]
    got = under(call(lj.lora(model.apply), model), adapter, batch)
    assert_close(got, under(call(dense(model.apply), model), adapter, batch), table, dtype=dtype)
    chex.assert_trees_all_equal_dtypes(lj.merge(model.params, adapter), model.params)


@pytest.mark.parametrize("name", ZOO)
def test_a_second_call_with_new_values_traces_nothing(name: str, key: jax.Array) -> None:
    model, adapter = make(name, "float32")
    chex.clear_trace_counter()
    run = jax.jit(chex.assert_max_traces(call(lj.lora(model.apply), model), n=1))
    for values in (adapter, trained(key, adapter)):
        run(values, model.args[0])


@pytest.mark.parametrize("name", ZOO)
def test_every_leaf_of_the_adapter_is_used_and_gets_a_gradient(name: str, key: jax.Array) -> None:
    model, adapter = make(name, "float32")
    lj.explain(model.apply, model.params, adapter, *model.args, strict=True)
    adapter = trained(key, adapter)
    gradient = jax.jit(jax.grad(loss(call(lj.lora(model.apply), model))))(adapter, model.args[0])
    for path, part in gradient.items():
        assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(part)), path
