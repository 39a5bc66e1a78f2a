"""`adapt` equals `kernels`, `init` and `lora` in one call."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, bits, dense, trained

import lora_jax as lj

PARAMS = {"up": jnp.ones((4, 2, 3)), "norm": jnp.ones((2, 3)), "head": jnp.ones((2, 3, 5)) / 6}
X = jnp.ones((7, 4))
SPEC = {lj.targets.all_linear: lj.DoRA(rank=2, alpha=4), "head": lj.LoRA(rank=1, alpha=1)}


def model(params: Any, x: jax.Array, *, power: int = 1) -> jax.Array:
    y = jnp.einsum("ti,ihd->thd", x, params["up"]) * params["norm"]
    return jnp.einsum("thd,hdo->to", jnp.tanh(y) ** power, params["head"])


def test_adapt_equals_kernels_init_and_lora(key: jax.Array) -> None:
    apply, adapter = lj.adapt(model, PARAMS, SPEC, X, key=key)
    found = lj.kernels(model, PARAMS, X)
    assert apply.kernels == found
    expected = lj.init(key, PARAMS, SPEC, kernels=found)
    chex.assert_trees_all_equal_structs(adapter, expected)
    assert bits(adapter) == bits(expected)
    values = trained(key, adapter)
    assert_close(apply(PARAMS, values, X), dense(model)(PARAMS, values, X))


def test_the_model_is_traced_once(key: jax.Array) -> None:
    calls = []

    def counted(params: Any, x: jax.Array) -> jax.Array:
        calls.append(1)
        return model(params, x)

    lj.adapt(counted, PARAMS, SPEC, X, key=key)
    assert len(calls) == 1


def test_adapt_needs_shapes_only_and_the_function_accepts_other_arguments(key: jax.Array) -> None:
    apply, adapter = lj.adapt(model, PARAMS, SPEC, jax.ShapeDtypeStruct((2, 4), jnp.float32), key=key)
    assert apply(PARAMS, adapter, X, power=3).shape == (7, 5)


def test_kwargs_are_passed_to_the_model(key: jax.Array) -> None:
    with pytest.raises(ZeroDivisionError):
        lj.adapt(lambda params, x, *, power: 1 / power, PARAMS, SPEC, X, key=key, kwargs={"power": 0})


def test_options_are_passed_to_init_and_lora(key: jax.Array) -> None:
    def reads(params: Any, x: jax.Array) -> jax.Array:
        return model(params, x) + jnp.exp(params["up"]).sum()

    with pytest.raises(lj.UnsupportedError):
        apply, adapter = lj.adapt(reads, PARAMS, SPEC, X, key=key)
        apply(PARAMS, adapter, X)
    options: Any = {"param_dtype": jnp.bfloat16, "materialize": ["up"], "form": "factored"}
    apply, adapter = lj.adapt(reads, PARAMS, SPEC, X, key=key, **options)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adapter)} == {"bfloat16"}
    assert apply(PARAMS, adapter, X).shape == (7, 5)
    with pytest.raises(lj.SpecError, match="form"):
        lj.adapt(model, PARAMS, SPEC, X, key=key, form="none")


def test_adapt_works_under_eval_shape(key: jax.Array) -> None:
    shapes = jax.eval_shape(lambda params, key: lj.adapt(model, params, SPEC, X, key=key)[1], PARAMS, key)
    _, adapter = lj.adapt(model, PARAMS, SPEC, X, key=key)
    assert jax.tree.structure(shapes) == jax.tree.structure(adapter)
    assert [leaf.shape for leaf in jax.tree.leaves(shapes)] == [leaf.shape for leaf in jax.tree.leaves(adapter)]


def test_an_invalid_spec_raises_the_error_of_init(key: jax.Array) -> None:
    with pytest.raises(lj.SpecError, match=r"'nothing' matches none of 3"):
        lj.adapt(model, PARAMS, {"nothing": lj.Full()}, X, key=key)
