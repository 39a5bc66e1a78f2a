"""A bias on `B` changes the bias of the layer."""

import jax
import jax.numpy as jnp
import pytest
from helpers import bits, trained
from law import assert_close, assert_law, normal

import lora_jax as lj

SPEC = {"kernel": lj.LoRA(rank=2, alpha=4), "bias": lj.LoRABias(scale=2.0)}


def layer(params, x):
    return x @ params["kernel"] + params["bias"]


def make(dtype="float32"):
    params = {"kernel": normal(4, 6, dtype=dtype), "bias": normal(6, seed=1, dtype=dtype)}
    return params, lj.init(jax.random.key(0), params, SPEC)


def test_the_bias_is_added_before_the_scale():
    params, adapter = make()
    adapter, x = trained(jax.random.key(1), adapter), normal(3, 4, seed=2)
    part, beta = adapter["kernel"], adapter["bias"].bias
    expected = x @ params["kernel"] + params["bias"] + 2.0 * (x @ part.a @ part.b + beta)
    assert_close(lj.lora(layer)(params, adapter, x), expected)
    assert_law(layer, params, adapter, x)


def test_initialization_keeps_the_model():
    params, adapter = make()
    x = normal(3, 4, seed=2)
    assert bits(lj.lora(layer, form="factored")(params, adapter, x)) == bits(layer(params, x))


def test_the_model_receives_the_bias_in_the_dtype_of_the_base():
    params, adapter = make("bfloat16")
    adapter, x = trained(jax.random.key(1), adapter), normal(3, 4, seed=2, dtype="bfloat16")
    assert adapter["bias"].bias.dtype == jnp.float32
    assert_law(layer, params, adapter, x, dtype="bfloat16")


def test_unmerge_restores_the_bias():
    params, adapter = make()
    adapter = trained(jax.random.key(1), adapter)
    restored, drift = lj.unmerge_approximately(lj.merge(params, adapter), adapter)
    for name in params:
        assert float(jnp.abs(restored[name] - params[name]).max()) <= drift[name]


def test_a_stack_of_layers_has_a_bias_per_layer(tmp_path):
    params = {"bias": normal(3, 6)}
    adapter = trained(jax.random.key(1), lj.init(jax.random.key(0), params, {"bias": lj.LoRABias(scale=0.5)}))
    assert adapter["bias"].bias.shape == (3, 6)
    lj.save(tmp_path / "adapter", adapter, base=params)
    assert bits(lj.restore(tmp_path / "adapter", base=params)) == bits(adapter)


def test_a_scale_of_zero_is_an_error():
    with pytest.raises(lj.SpecError, match="Expected a scale other than 0"):
        lj.LoRABias(scale=0)
