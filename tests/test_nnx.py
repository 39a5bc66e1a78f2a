"""NNX modules as functions, adapters as NNX modules, and Flax's `TrainState`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from helpers import assert_close, bits, trained

import lora_jax as lj


class Net(nnx.Module):
    """A layer, batch statistics, dropout and a counter."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(6, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(self.hidden(x))

    def hidden(self, x: Any) -> Any:
        return self.dropout(nnx.relu(self.norm(self.linear(x))))


SPEC = {"linear/kernel": lj.LoRA(rank=2, alpha=4), "head/*": lj.Full()}


def net() -> Net:
    return Net(nnx.Rngs(0, dropout=1))


def inputs(seed: int = 2) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (5, 6))


def test_a_functional_module_computes_what_the_module_does() -> None:
    module = net()
    apply, params, rest = lj.nnx.functional(net())
    for step in range(3):
        out, rest = apply(params, rest, inputs(step))
        assert_close(out, module(inputs(step)))
    assert bits(rest) == bits(nnx.split(module, nnx.Param, ...)[2])


def test_calls_of_the_function_leave_the_module_as_it_is() -> None:
    module = net()
    before = bits(nnx.state(module))
    apply, params, rest = lj.nnx.functional(module)
    jax.jit(lj.lora(apply))(params, lj.init(jax.random.key(0), params, SPEC), rest, inputs())
    assert bits(nnx.state(module)) == before


def test_state_is_written_back_with_update() -> None:
    module, expected = net(), net()
    apply, params, rest = lj.nnx.functional(module)
    _, rest = apply(params, rest, inputs())
    nnx.update(module, params, rest)
    expected(inputs())
    assert bits(nnx.state(module)) == bits(nnx.state(expected))


def test_an_adapted_module_is_the_module_with_merged_parameters(key: jax.Array) -> None:
    apply, params, rest = lj.nnx.functional(net())
    adapter = trained(key, lj.init(key, params, SPEC))
    got, got_rest = lj.lora(apply)(params, adapter, rest, inputs())
    expected, expected_rest = apply(lj.merge(params, adapter), rest, inputs())
    assert_close(got, expected)
    assert_close(nnx.to_pure_dict(got_rest["norm"]), nnx.to_pure_dict(expected_rest["norm"]))


def test_another_method_is_called_by_its_name() -> None:
    apply, params, rest = lj.nnx.functional(net(), method="hidden")
    assert_close(apply(params, rest, inputs())[0], net().hidden(inputs()))


def test_a_filter_selects_the_parameters() -> None:
    _, params, rest = lj.nnx.functional(net(), wrt=nnx.All(nnx.Param, nnx.PathContains("linear")))
    assert set(params) == {"linear"}
    assert "head" in rest


@pytest.mark.parametrize(
    ("module", "options", "error", "text"),
    [(jnp.tanh, {}, TypeError, "Expected an nnx.Module"), (None, {"method": "nothing"}, AttributeError, "nothing")],
)
def test_what_cannot_be_converted_is_an_error(module: Any, options: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        lj.nnx.functional(module or net(), **options)


def test_a_call_without_the_rest_of_the_state_is_an_error() -> None:
    apply, params, _ = lj.nnx.functional(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError) as caught:
        lj.kernels(apply, params, jnp.ones(2))
    assert str(caught.value) == (
        "Expected the rest of the state of `Linear`, the third result of `functional`, after the parameters and the "
        "adapter; got an array.\n"
        "  Call apply(params, rest, *args), or lora(apply)(params, adapter, rest, *args)."
    )


def test_an_adapter_is_trained_by_the_optimizer_of_nnx(key: jax.Array) -> None:
    apply, params, rest = lj.nnx.functional(net())
    adapted, adapter = lj.adapt(apply, params, SPEC, rest, inputs(), key=key)
    tx = optax.adam(1e-2)
    module = lj.nnx.AdapterModule(adapter)
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)

    def loss_of(adapter: Any, rest: Any, x: Any) -> Any:
        out, rest = adapted(params, adapter, rest, x)
        return jnp.mean((out - 1) ** 2), rest

    @nnx.jit
    def nnx_step(module: Any, optimizer: Any, rest: Any, x: Any) -> Any:
        gradient, rest = nnx.grad(lambda module: loss_of(module.adapter, rest, x), has_aux=True)(module)
        optimizer.update(module, gradient)
        return rest

    @jax.jit
    def plain_step(adapter: Any, opt_state: Any, rest: Any, x: Any) -> Any:
        gradient, rest = jax.grad(loss_of, has_aux=True)(adapter, rest, x)
        updates, opt_state = tx.update(gradient, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, rest

    opt_state, rest_of_nnx = tx.init(adapter), rest
    for step in range(3):
        rest_of_nnx = nnx_step(module, optimizer, rest_of_nnx, inputs(step))
        adapter, opt_state, rest = plain_step(adapter, opt_state, rest, inputs(step))
    assert_close(module.adapter, adapter)
    assert bool(jnp.any(module.adapter["linear/kernel"].b))


def test_a_train_state_trains_the_adapter_only(key: jax.Array) -> None:
    params = {"kernel": jax.random.normal(key, (6, 4))}
    adapted = lj.lora(lambda params, x: x @ params["kernel"])
    adapter = lj.init(key, params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    tx = optax.adamw(1e-2)
    state = lj.optim.train_state(adapted, params, adapter, tx)
    gradient = jax.jit(jax.grad(lambda tree: jnp.mean(state.apply_fn(tree, inputs()) ** 2)))(state.params)
    new = state.apply_gradients(grads=gradient)
    expected = jax.grad(lambda adapter: jnp.mean(adapted(params, adapter, inputs()) ** 2))(adapter)
    updates, _ = tx.update(expected, tx.init(adapter), adapter)
    assert_close(new.params["adapter"], optax.apply_updates(adapter, updates))
    assert bits(new.params["base"]) == bits(params)
    assert int(new.step) == 1
