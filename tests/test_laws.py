"""The laws that hold for every model and every transformation, against merged kernels."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FORWARD, GRADIENT, assert_close, assert_few_ulp, bits, sweep, sweep_except, trained
from transforms import call, law, under
from zoo import ZOO, Model

import lora_jax as lj

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@functools.cache
def make(name: str, dtype: str) -> tuple[Model, Any]:
    key = jax.random.key(0)
    model = ZOO[name](key, DTYPES[dtype])
    kernels = lj.kernels(model.apply, model.params, *model.args)
    return model, jax.jit(lambda key, params: lj.init(key, params, model.spec, kernels=kernels))(key, model.params)


@pytest.mark.parametrize("dtype", sweep_except(["float32"], DTYPES))
@pytest.mark.parametrize("name", ["transformer", "lstm", sweep("conv_net"), sweep("experts")])
def test_initialization_keeps_the_compiled_model(name: str, dtype: str) -> None:
    model, adapter = make(name, dtype)
    # Without this option XLA may round a bfloat16 sum at different points in the two programs.
    jit = functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    base = jit(call(lambda params, adapter, *args: model.apply(params, *args), model))(adapter, model.args[0])
    # Factored, because the compiler may sum a product with a materialized kernel in another order.
    assert_few_ulp(jit(call(lj.lora(model.apply, form="factored"), model))(adapter, model.args[0]), base)


@pytest.mark.parametrize("dtype", sweep_except(["float32"], DTYPES))
@pytest.mark.parametrize("name", ["conv_net", "tied_embedding", "experts"])
def test_initialization_keeps_the_eager_model_bit_for_bit(name: str, dtype: str) -> None:
    model, adapter = make(name, dtype)
    with jax.disable_jit():
        base = call(lambda params, adapter, *args: model.apply(params, *args), model)(adapter, model.args[0])
        got = call(lj.lora(model.apply, form="factored"), model)(adapter, model.args[0])
    assert bits(got) == bits(base)


# One model of each kind of layer: rounding depends on the rule, and not on the framework that the model is written in.
BFLOAT16 = [
    "scanned_transformer",
    "tied_embedding",
    "grouped_conv",
    "lstm",
    "experts",
]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in ZOO]
    + [(name, "bfloat16") for name in BFLOAT16]
    + [sweep(name, "bfloat16") for name in ("gru", "decoding", "nnx_stateful")],
)
def test_the_adapted_model_and_gradients_match_merged_kernels(name: str, dtype: str) -> None:
    model, adapter = make(name, dtype)
    lj.explain(model.apply, model.params, adapter, *model.args, strict=True)
    random_adapter = trained(jax.random.key(0), adapter, size=0.1 if dtype == "bfloat16" else 0.3)
    start, ((gradient, out), (expected_gradient, expected)) = law(model, adapter, random_adapter)
    assert_close(
        start[0][1], start[1][1], FORWARD, dtype=dtype
    )  # merging a fresh adapter gives the kernels of the base
    assert_close(out, expected, FORWARD, dtype=dtype)
    assert_close(gradient, expected_gradient, GRADIENT, dtype=dtype)
    for path, part in gradient.items():
        assert all(float(np.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(part)), path
    chex.assert_trees_all_equal_dtypes(jax.eval_shape(lj.merge, model.params, adapter), model.params)


# A transformation applies to the program that `lora` returns, so a few different models are enough.
UNDER = {
    "eager": ["mlp", "scanned_transformer", "optimized_lstm", "conv_net", "experts", "nnx_scanned", "haiku_stack"],
    "vmap": ["scanned_transformer", "conv_net", "experts", "tied_embedding", "equinox_net"],
    "scan": ["transformer", "grouped_conv", "decoding", "nnx_stateful"],
    "remat": ["scanned_transformer", "minilm_encoder", "haiku_net"],
    "jvp": ["scanned_transformer", "gru", "conv_net", "plain_function"],
    "pmap": ["lstm", "nnx_transformer", "equinox_stack"],
}


@pytest.mark.parametrize(
    ("transform", "name"),
    sweep_except(
        {("remat", "scanned_transformer"), ("pmap", "nnx_transformer")}
        | {(transform, name) for transform in ("eager", "vmap", "scan", "jvp") for name in UNDER[transform]},
        [(transform, name) for transform, names in UNDER.items() for name in names],
    ),
)
def test_a_transformation_of_the_adapted_model_matches_the_merged_model(
    transform: str, name: str, key: jax.Array
) -> None:
    model, adapter = make(name, "float32")
    assert_close(*under(transform, model, trained(key, adapter)))
