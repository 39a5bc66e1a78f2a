"""The boundary of the trace: arguments and results that are not arrays, and errors of Python code."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from law import adapted, assert_close, normal

import lora_jax as lj

PARAMS, X = {"w": normal(4, 4)}, normal(2, 4, seed=1)
ADAPTER = adapted(PARAMS, {"w": "io"})


# Results


@dataclasses.dataclass
class Output:
    """A class that JAX does not know."""

    y: Any

    def method(self) -> Any:
        return self.y


class Slots:
    __slots__ = ("y",)

    def __init__(self, y: Any) -> None:
        self.y = y


class Record(dict[str, Any]):
    """A subclass of dict that JAX does not know."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Known:
    y: Any


HIDING: dict[str, tuple[Callable[[jax.Array], Any], str]] = {
    "an attribute": (Output, "Output"),
    "a slot": (Slots, "Slots"),
    "an item": (lambda y: Record(y=y), "Record"),
    "an element of a set of functions": (lambda y: {lambda: y}, "set"),
    "an object in an object": (lambda y: Output({"a": [Output(y)]}), "Output"),
    "a closure": (lambda y: lambda: y, "function"),
    "a default": (lambda y: lambda x=y: x, "function"),
    "a bound method": (lambda y: Output(y).method, "method"),
    "a partial": (lambda y: functools.partial(lambda x: x, y), "partial"),
    "a generator": (lambda y: Output(y + n for n in range(2)), "Output"),
    "an iterator": (lambda y: Output(iter([y])), "Output"),
    "a jitted function": (lambda y: jax.jit(lambda: y), "PjitFunction"),
}


@pytest.mark.parametrize("name", HIDING)
def test_a_result_that_hides_a_traced_array_is_refused(name: str) -> None:
    hide, kind = HIDING[name]
    with pytest.raises(lj.TracingError) as error:
        lj.lora(lambda p, x: {"first": x, "rest": [None, hide(x @ p["w"])]})(PARAMS, ADAPTER, X)
    assert isinstance(error.value, TypeError)
    assert str(error.value) == (
        "Expected `test_a_result_that_hides_a_traced_array_is_refused.<locals>.<lambda>` to return arrays, pytrees of "
        f"arrays, or values without arrays; its result['rest'][1] is a `{kind}`, which is not a pytree, and contains "
        "the traced array float32[2,4].\n"
        "  Register the type as a pytree, as with `jax.tree_util.register_dataclass`, or return its arrays."
    )


@pytest.mark.parametrize("inspect_model", [lj.kernels, lj.explain])
def test_kernels_and_explain_refuse_it_too(inspect_model: Callable[..., Any]) -> None:
    with pytest.raises(lj.TracingError, match="`Output`, which is not a pytree"):
        inspect_model(lambda p, x: Output(x @ p["w"]), PARAMS, *([ADAPTER] if inspect_model is lj.explain else []), X)


CONSTANTS = {
    "a weak number": lambda: jnp.asarray(3.0),
    "a number": lambda: jnp.bfloat16(2),
    "zero": lambda: jnp.zeros((), jnp.int32),
    "a boolean": lambda: jnp.bool_(True),
    "an array": lambda: jnp.arange(3),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_result_that_is_constant_is_an_array(name: str) -> None:
    constant = CONSTANTS[name]()
    got = lj.lora(lambda p, x: (x @ p["w"], CONSTANTS[name]()))(PARAMS, ADAPTER, X)[1]
    assert isinstance(got, jax.Array)
    assert jax.typeof(got) == jax.typeof(constant)
    assert got.weak_type == constant.weak_type
    np.testing.assert_array_equal(got, constant)


STATIC = {
    "a number": 3,
    "text": "logits",
    "a type": Output,
    "a NumPy array": np.arange(3),
    "an object": Output({"scale": 2.0, "name": "x"}),
    "an object with a concrete array": Output(jnp.ones(2)),
    "an activation": jax.nn.gelu,
    "a jitted function": jax.jit(jnp.sin),
    "a function": functools.partial(lambda x, y: x + y, 1),
    "an iterator": itertools.count(),
    "an optimizer": optax.adam(1e-3).update,
    "a module": np,
}


@pytest.mark.parametrize("name", STATIC)
def test_a_result_without_traced_arrays_is_returned_unchanged(name: str) -> None:
    y, [static, nothing] = lj.lora(lambda p, x: (x @ p["w"], [STATIC[name], None]))(PARAMS, ADAPTER, X)
    assert static is STATIC[name] and nothing is None
    assert_close(y, X @ lj.merge(PARAMS, ADAPTER)["w"])


@pytest.mark.parametrize("name", ["a number", "text", "an object", "an activation", "a module"])
def test_an_argument_that_is_not_an_array_reaches_the_model_unchanged(name: str) -> None:
    _, given = lj.lora(lambda p, x, given: (x @ p["w"], given))(PARAMS, ADAPTER, X, STATIC[name])
    assert given is STATIC[name]


def test_registered_types_may_be_results() -> None:
    out = lj.lora(lambda p, x: Known(x @ p["w"]))(PARAMS, ADAPTER, X)
    assert_close(out.y, X @ lj.merge(PARAMS, ADAPTER)["w"])


def test_a_closure_over_an_outer_trace_may_be_a_result() -> None:
    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        y, add = lj.lora(lambda p, z: (z @ p["w"], lambda z: z + x))(PARAMS, ADAPTER, x)
        return add(y)

    assert_close(run(X), X @ lj.merge(PARAMS, ADAPTER)["w"] + X)


# Python code that needs values


def generate(p: Any, x: jax.Array) -> jax.Array:
    for _ in range(3):
        x = jnp.tanh(x @ p["w"])
        if float(jnp.abs(x).max()) < 0.1:  # here
            break
    return x


def branch(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"] if (x > 0).all() else x  # here


def count(p: Any, x: jax.Array) -> jax.Array:
    for _ in range(x.sum().astype(int)):  # here
        x = x @ p["w"]
    return x


def on_host(p: Any, x: jax.Array) -> jax.Array:
    return jnp.asarray(np.asarray(x @ p["w"]))  # here


def filtered(p: Any, x: jax.Array) -> jax.Array:
    y = x @ p["w"]
    return y[y > 0]  # here


def in_a_jit_in_a_loop(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda x, _: (jax.jit(lambda x: branch(p, x))(x), None), x, length=2)[0]


NEEDING = {
    generate: "ConcretizationTypeError",
    branch: "TracerBoolConversionError",
    count: "TracerIntegerConversionError",
    on_host: "TracerArrayConversionError",
    filtered: "NonConcreteBooleanIndexError",
    in_a_jit_in_a_loop: "TracerBoolConversionError",
}


def line_of(function: Callable[..., Any]) -> str:
    lines, first = inspect.getsourcelines(function)
    return f"{__file__}:{first + next(at for at, line in enumerate(lines) if '# here' in line)} ({function.__name__})"


@pytest.mark.parametrize("apply", NEEDING)
def test_python_code_that_needs_a_value_is_an_error_with_line_and_advice(apply: Callable[..., Any]) -> None:
    with pytest.raises(lj.TracingError) as error:
        lj.lora(apply)(PARAMS, ADAPTER, X)
    assert str(error.value) == (
        f"Cannot trace `{apply.__name__}`: its Python code needs the value of an array, which is not known while it is "
        f"traced ({NEEDING[apply]}).\n"
        f"  at {line_of(branch if apply is in_a_jit_in_a_loop else apply)}\n"
        "  Adapt what can be traced, such as the step inside a loop: `lora(step)`; or run the loop on "
        "`merge(params, adapter)`.\n"
        "  Python code may depend on shapes and on arguments that are not arrays, such as numbers and strings."
    )
    assert type(error.value.__cause__) is getattr(jax.errors, NEEDING[apply])


class Linear(nn.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return x


WHOLE = "Expected a function of parameters, `apply(params, *args)`; got "
NO_FUNCTIONS = {
    "Linen": (Linear(), "the Linen module `Linear`.\n  Pass its method: `model.apply`."),
    "NNX": (
        nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
        "the NNX module `Linear`, which holds its parameters.\n  Split it: apply, params, rest = "
        "lora_jax.nnx.functional(module); `rest` is the model's first argument.",
    ),
    "parameters": (
        PARAMS,
        "a value of type `dict`.\n  The arguments come in this order: first `apply`, then `params`.",
    ),
}


@pytest.mark.parametrize("name", NO_FUNCTIONS)
def test_a_module_in_place_of_a_function_is_an_error_with_advice(name: str) -> None:
    apply, text = NO_FUNCTIONS[name]
    for call in (lj.lora, lambda apply: lj.kernels(apply, PARAMS, X)):
        with pytest.raises(lj.TracingError) as error:
            call(apply)
        assert str(error.value) == WHOLE + text


def test_kernels_explain_plan_and_jit_raise_the_same_error() -> None:
    mesh = jax.make_mesh((1,), ("x",))
    spec = {"w": lj.LoRA(rank=2, alpha=4)}
    for call in (
        lambda: lj.kernels(generate, PARAMS, X),
        lambda: lj.explain(generate, PARAMS, ADAPTER, X),
        lambda: lj.plan(generate, PARAMS, spec, optax.sgd(1.0), mesh, X),
        lambda: jax.jit(lj.lora(generate))(PARAMS, ADAPTER, X),
        lambda: lj.lora(lj.lora(generate))(PARAMS, ADAPTER, ADAPTER, X),
    ):
        with pytest.raises(lj.TracingError, match=re.escape(line_of(generate))):
            call()


def test_the_advice_works() -> None:
    merged = lj.merge(PARAMS, ADAPTER)
    expected = generate(merged, X)

    def by_step(x: jax.Array) -> jax.Array:
        step = lj.lora(lambda p, x: jnp.tanh(x @ p["w"]))
        for _ in range(3):
            x = step(PARAMS, ADAPTER, x)
            if float(jnp.abs(x).max()) < 0.1:
                break
        return x

    assert_close(by_step(X), expected)

    def power(p: Any, x: jax.Array, times: int, name: str) -> jax.Array:
        for _ in range(times):
            x = x @ p["w"] if name == "linear" else jnp.tanh(x @ p["w"])
        return x

    assert_close(lj.lora(power)(PARAMS, ADAPTER, X, 2, name="linear"), power(merged, X, 2, "linear"))


def test_other_errors_of_the_model_are_unchanged() -> None:
    def fails(p: Any, x: jax.Array) -> jax.Array:
        raise KeyError("w2")

    with pytest.raises(KeyError, match="w2"):
        lj.lora(fails)(PARAMS, ADAPTER, X)
    with pytest.raises(TypeError, match="dot_general") as error:
        lj.lora(lambda p, x: x.T @ p["w"])(PARAMS, ADAPTER, X)
    assert not isinstance(error.value, lj.LoRAError)
