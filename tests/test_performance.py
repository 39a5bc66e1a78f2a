"""Performance: a training step through `lora` costs no more than LoRA written into the model by hand.

FLOPs and bytes are read from the jaxpr and the compiled program, so that they do not depend on the machine.
`benchmarks/` measures times.
"""

import contextlib
import functools
import logging
from typing import Any, NamedTuple

import chex
import helpers
import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

import lora_jax as lj
from benchmarks import conv, models
from lora_jax import testing

# All axes have different sizes, so that no activation has the shape of a kernel.
SIZE = models.Size(layers=2, width=24, heads=3, hidden=56, vocabulary=80, batch=4, length=10, rank=5)
FORMS = pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
STEPS = [(False, "float32"), (True, "bfloat16")]  # compiled and run


@functools.cache
def case(scanned, dtype="float32", *, tied=True):
    return models.case(SIZE, scanned=scanned, tied=tied, dtype=jnp.dtype(dtype))


def test_eager_calls_trace_the_model_each_time_and_jitted_calls_once():
    traced = []

    def model(params, x):
        traced.append(x.shape)
        return x @ params["kernel"]

    params, x = {"kernel": jnp.ones((5, 7))}, jnp.ones((3, 5))
    adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    for apply, times in ((lj.lora(model), 3), (jax.jit(lj.lora(model)), 1)):
        traced.clear()
        for _ in range(3):
            apply(params, adapter, x)
        assert len(traced) == times


def library_and_by_hand(case):
    # Factored, as by hand; other forms are cheaper at these sizes.
    return models.through_lora(case, form="factored"), models.by_hand(case)


def value_and_grad(method, tokens, argnums=0):
    """A function that returns the loss and its gradient, and the arguments."""
    return jax.value_and_grad(method.loss, argnums), (method.trained, method.frozen, tokens)


def kernels_of(case):
    return {path: kernel for path, kernel in flatten_dict(case.params, sep="/").items() if path in case.adapter}


def shapes_of_kernels(case):
    """The shapes of the adapted kernels, and of single layers of stacked kernels."""
    shapes = {kernel.shape for kernel in kernels_of(case).values()}
    return shapes | {shape[1:] for shape in shapes} if case.model.scanned else shapes


class Step(NamedTuple):
    """The results of one step, and the temporary bytes of the program."""

    loss: jax.Array
    gradient: Any
    temporary: int


@functools.cache
def steps(scanned, dtype):
    """A step through `lora` and a step by hand, compiled once for all tests."""
    one = case(scanned, dtype)

    def run(method):
        frozen, trained, state = method.initial_args()
        args = (frozen, *jax.tree.map(jnp.copy, (trained, state)), one.tokens)
        program = jax.jit(method.step, donate_argnums=(1, 2)).lower(*args).compile()
        _, state, loss = program(*args)
        # After the first step, Adam's first moment is the gradient times 1 - 0.9.
        return Step(loss, state[0].mu, program.memory_analysis().temp_size_in_bytes)

    return tuple(map(run, library_and_by_hand(one)))


@pytest.mark.parametrize(("scanned", "dtype"), STEPS)
def test_loss_and_gradient_match_lora_by_hand(scanned, dtype):
    measured, by_hand = steps(scanned, dtype)
    helpers.assert_close(measured.loss, by_hand.loss, dtype=dtype)
    helpers.assert_close(models.as_collection(measured.gradient), by_hand.gradient, helpers.GRADIENT, dtype=dtype)


@pytest.mark.parametrize(("scanned", "dtype"), STEPS)
def test_a_step_takes_no_more_memory_than_lora_by_hand(scanned, dtype):
    measured, by_hand = steps(scanned, dtype)
    assert measured.temporary <= by_hand.temporary


@FORMS
@pytest.mark.parametrize(("dtype", "tied"), [("float32", True), ("bfloat16", True), ("float32", False)])
def test_a_step_takes_no_more_flops_than_lora_by_hand(scanned, dtype, tied):
    one = case(scanned, dtype, tied=tied)
    measured, by_hand = (testing.flops(m.step, *m.initial_args(), one.tokens) for m in library_and_by_hand(one))
    assert measured <= by_hand


@FORMS
@DTYPES
def test_no_array_of_a_kernels_shape_is_materialized_forward_or_backward(scanned, dtype):
    one = case(scanned, dtype)
    step, args = value_and_grad(models.through_lora(one, form="factored"), one.tokens)
    assert not testing.shapes_made(step, *args) & shapes_of_kernels(one)


@FORMS
def test_materialized_kernels_are_found_by_their_shapes(scanned):
    one = case(scanned)
    step, args = value_and_grad(models.merged(one), one.tokens)
    assert testing.shapes_made(step, *args) >= {kernel.shape for kernel in kernels_of(one).values()}


@FORMS
def test_the_gradient_of_the_base_costs_nothing(scanned):
    one = case(scanned)
    method = models.through_lora(one, form="factored")
    adapter_alone, args = value_and_grad(method, one.tokens)
    base_too, _ = value_and_grad(method, one.tokens, argnums=(0, 1))
    saved = testing.flops(base_too, *args) - testing.flops(adapter_alone, *args)
    assert saved >= sum(2 * one.tokens.size * kernel.size for kernel in kernels_of(one).values())


@contextlib.contextmanager
def compilations(caplog):
    """Collects JAX's log messages about compilation."""
    found = []
    caplog.clear()
    with caplog.at_level(logging.WARNING), jax.log_compiles(True):
        yield found
    found += [record.getMessage() for record in caplog.records if record.getMessage().startswith("Compiling")]


@FORMS
def test_a_second_jitted_call_with_new_values_traces_and_compiles_nothing(scanned, caplog):
    one = case(scanned)
    chex.clear_trace_counter()  # the counter distinguishes functions by name
    apply = chex.assert_max_traces(models.plain(one.model), n=1)
    adapted = lj.lora(apply)

    @jax.jit
    def gradient(params, adapter, tokens):
        return jax.grad(lambda adapter: models.cross_entropy(adapted(params, adapter, tokens), tokens))(adapter)

    first = (one.params, one.adapter, one.tokens)
    second = jax.tree.map(lambda x: x // 2 if x.dtype == jnp.int32 else x / 2, first)
    with compilations(caplog) as found:
        gradient(*first)
    assert len(found) == 1, found
    with compilations(caplog) as found:
        gradient(*second)
    assert not found


def test_a_second_eager_call_with_new_values_compiles_nothing(caplog):
    one = case(scanned=False)
    adapted = lj.lora(models.plain(one.model))
    adapted(one.params, one.adapter, one.tokens)
    second = (*jax.tree.map(lambda x: x / 2, (one.params, one.adapter)), one.tokens // 2)
    with compilations(caplog) as found:
        adapted(*second)
    assert not found


def test_a_large_rank_in_a_convolutional_net_takes_far_fewer_flops_than_by_hand():
    one = conv.case(rank=64, images=2)
    planned, factored, by_hand = (
        make(one) for make in (conv.through_lora, functools.partial(conv.through_lora, form="factored"), conv.by_hand)
    )
    measured, same, reference = (
        testing.flops(method.step, *method.initial_args(), one.tokens) for method in (planned, factored, by_hand)
    )
    assert measured <= 0.65 * reference
    assert same <= 1.005 * reference
    losses = [jax.jit(method.loss)(method.trained, method.frozen, one.tokens) for method in (planned, by_hand)]
    helpers.assert_close(*losses)
