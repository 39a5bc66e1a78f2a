"""The planner: its FLOPs against counted programs, its choices, and the equality of all forms."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import GRADIENT, dense
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.experimental import jet
from law import Case, adapted, assert_close, assert_law, normal, total

import lora_jax as lj
from lora_jax import testing
from lora_jax._transform.contraction import costs as _plan
from lora_jax._transform.contraction import forms as _forms
from lora_jax._transform.contraction.costs import Costs, Form, Gradients, Passes, choose_form

FORMS = ["factored", "hybrid", "merged"]
ALL_ASKED = [Gradients(*some) for some in itertools.product([False, True], repeat=3)]


def dot(n: int, d_in: int, d_out: int, rank: int) -> Costs:
    """The costs of `x @ w`, x (n, d_in), w (d_in, d_out)."""
    base, first, second = (Passes.equal(2 * n * k * m) for k, m in ((d_in, d_out), (d_in, rank), (rank, d_out)))
    return Costs(base, first, second, 2 * d_in * rank * d_out, n * d_in, n * d_out, n * rank, d_in * (rank + d_out))


def abstract_case(n: int, d_in: int, d_out: int, rank: int) -> tuple[Any, Any, Any]:
    """An abstract product that is differentiated with respect to everything."""
    params = {"w": jax.ShapeDtypeStruct((d_in, d_out), jnp.float32)}
    spec = {"w": lj.LoRA(rank=rank, alpha=3)}
    adapter = jax.eval_shape(lambda: lj.init(jax.random.key(0), params, spec))
    return params, adapter, jax.ShapeDtypeStruct((n, d_in), jnp.float32)


def count_flops(form: str | None, asked: Gradients, params: Any, adapter: Any, x: Any, call: Any = jnp.matmul) -> int:
    """The FLOPs of a step with some gradients, from its jaxpr without unused equations."""
    apply = lj.lora(lambda params, x: call(x, params["w"]), form=form)
    part = adapter["w"]

    def run(x: Any, w: Any, a: Any, b: Any) -> Any:
        return apply({"w": w}, {"w": lj.Adapter(part.variant, part.axes, a=a, b=b)}, x)

    operands = (x, params["w"], part.a, part.b)
    moving = [number for number, differentiated in enumerate((asked.x, False, asked.a, asked.b)) if differentiated]

    def step(cotangent: Any, *operands: Any) -> Any:
        def run_moving(*values: Any) -> Any:
            given = dict(zip(moving, values, strict=True))
            return run(*(given.get(number, operand) for number, operand in enumerate(operands)))

        if not moving:
            return run(*operands)
        y, back = jax.vjp(run_moving, *(operands[number] for number in moving))
        return y, back(cotangent)

    return testing.flops(step, jax.eval_shape(run, *operands), *operands)


SIZES = [(8, 16, 16, 2), (64, 16, 16, 2), (64, 16, 24, 12), (512, 32, 16, 4), (512, 32, 32, 24), (3, 48, 40, 8)]


@pytest.mark.parametrize("asked", ALL_ASKED, ids=lambda asked: "".join(n for n in asked._fields if getattr(asked, n)))
@pytest.mark.parametrize("form", FORMS)
def test_counts_match_the_program(form: str, asked: Gradients) -> None:
    for sizes in SIZES:
        expected = count_flops(form, asked, *abstract_case(*sizes))
        assert _plan.flops(Form(form), dot(*sizes), asked) == pytest.approx(expected, rel=0.02), sizes


@pytest.mark.parametrize("asked", [_plan.INFERENCE, _plan.TRAINING, Gradients(a=True, b=True), Gradients(x=True)])
def test_the_planned_program_is_within_a_percent_of_the_cheapest_form(asked: Gradients) -> None:
    for sizes in SIZES:
        one = abstract_case(*sizes)
        cheapest = min(count_flops(form, asked, *one) for form in FORMS)
        # The counts ignore terms smaller than the activations: half a percent at these sizes.
        assert count_flops(None, asked, *one) <= 1.015 * cheapest, sizes


def convolution(**options: Any) -> Any:
    return lambda x, w: lax.conv_general_dilated(x, w, **options, dimension_numbers=("NHWC", "HWIO", "NHWC"))


CONVOLUTIONS = {
    "plain": (convolution(window_strides=(1, 1), padding="SAME"), (4, 10, 9, 8), (3, 3, 8, 6)),
    "strided": (convolution(window_strides=(2, 3), padding="SAME"), (4, 12, 12, 8), (3, 3, 8, 6)),
    "dilated": (convolution(window_strides=(1, 1), padding="VALID", rhs_dilation=(2, 1)), (4, 12, 12, 8), (3, 3, 8, 6)),
    "transposed": (
        convolution(window_strides=(1, 1), padding=((1, 2), (1, 2)), lhs_dilation=(2, 2)),
        (4, 6, 6, 8),
        (3, 3, 8, 6),
    ),
    "in groups": (
        convolution(window_strides=(1, 1), padding="SAME", feature_group_count=2),
        (4, 10, 9, 8),
        (3, 3, 4, 12),
    ),
    "depthwise": (
        convolution(window_strides=(1, 1), padding="SAME", feature_group_count=8),
        (4, 10, 9, 8),
        (3, 3, 1, 16),
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_counts_of_a_convolution_match_the_program(form: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, x, w = CONVOLUTIONS[name]
    params = {"w": jax.ShapeDtypeStruct(w, jnp.float32)}
    spec = {"w": lj.LoRA(rank=4, alpha=3, axes="iiio")}
    adapter = jax.eval_shape(lambda: lj.init(jax.random.key(0), params, spec))
    seen: list[Costs] = []
    monkeypatch.setattr(_forms, "fixed_form", lambda kernel, contraction, form: seen.append(contraction.costs) or form)
    for asked in (_plan.INFERENCE, _plan.TRAINING, Gradients(a=True, b=True), Gradients(x=True)):
        expected = count_flops(form, asked, params, adapter, jax.ShapeDtypeStruct(x, jnp.float32), call)
        assert _plan.flops(Form(form), seen[-1], asked) == pytest.approx(expected, rel=0.03), asked


@given(st.tuples(*[st.integers(1, 2000)] * 3, st.integers(1, 64)), st.sampled_from(ALL_ASKED))
def test_the_plan_uses_the_least_memory_within_a_percent_of_the_cheapest(sizes: Any, asked: Gradients) -> None:
    costs = dot(*sizes)
    possible = list(Form) if any(asked) else [Form.FACTORED, Form.MERGED]
    totals = [_plan.flops(form, costs, asked) for form in possible]
    chosen = possible.index(choose_form(costs, asked))
    assert totals[chosen] <= 1.01 * min(totals)
    assert all(total > 1.01 * min(totals) for total in totals[:chosen])


def test_a_model_is_within_a_percent_of_the_cheapest_mix_of_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"wide": (3, 3, 8, 24), "square": (3, 3, 24, 24), "head": (24, 16)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    spec = {"{wide,square}": lj.LoRA(rank=16, alpha=3, axes="iiio"), "head": lj.LoRA(rank=2, alpha=3)}
    adapter = jax.eval_shape(lambda: lj.init(jax.random.key(0), params, spec))
    convolve = convolution(window_strides=(2, 2), padding="SAME")

    def apply(params: Any, x: Any) -> Any:
        x = convolve(jnp.tanh(convolve(x, params["wide"])), params["square"])
        return jnp.tanh(x).mean((1, 2)) @ params["head"]

    def count() -> int:
        loss = lambda adapter, params, x: lj.lora(apply)(params, adapter, x).sum()  # noqa: E731
        return testing.flops(jax.grad(loss), adapter, params, jax.ShapeDtypeStruct((4, 16, 16, 8), jnp.float32))

    planned = count()
    mixes = []
    for mix in itertools.product([Form.FACTORED, Form.HYBRID, Form.MERGED], repeat=len(shapes)):
        chosen = dict(zip(shapes, mix, strict=True))
        monkeypatch.setattr(_forms, "fixed_form", lambda kernel, costs, form, chosen=chosen: chosen[kernel.paths[0]])
        mixes.append(count())
    assert len(set(mixes)) == 27
    assert planned <= 1.01 * min(mixes) < 0.9 * mixes[0]


CHOICES = {
    "a transformer at the usual rank": (dot(128, 768, 768, 8), _plan.TRAINING, Form.FACTORED),
    "one token at a time": (dot(1, 768, 768, 64), _plan.INFERENCE, Form.FACTORED),
    "a long prompt": (dot(8192, 768, 768, 64), _plan.INFERENCE, Form.MERGED),
    "a wide rank": (dot(4096, 256, 256, 64), _plan.TRAINING, Form.HYBRID),
    "a rank as wide as the kernel": (dot(8192, 64, 64, 64), _plan.TRAINING, Form.MERGED),
    "the first layer, whose input is data": (dot(8192, 64, 64, 64), Gradients(a=True, b=True), Form.MERGED),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_planned_form_of(name: str) -> None:
    costs, asked, form = CHOICES[name]
    assert choose_form(costs, asked) is form


def test_products_that_are_always_factored_stay_plain_operations() -> None:
    assert _plan.always_factored(dot(16, 768, 768, 8))
    params, adapter, x = abstract_case(16, 768, 768, 8)
    jaxpr = jax.make_jaxpr(lj.lora(lambda params, x: x @ params["w"]))(params, adapter, x)
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["dot_general", "dot_general", "mul", "dot_general", "add"]


# Equality of the forms

SMALL = Case(lambda w, x: jnp.tanh(x @ w), (4, 5), [(3, 4)], "io")


def in_form(form: str | None, case: Case = SMALL) -> Any:
    return lj.lora(case.apply, form=form)


def hessian_product(run: Any, adapter: Any) -> Any:
    direction = jax.tree.map(jnp.cos, adapter)
    return jax.jvp(jax.grad(lambda ad: total(run(ad))), (adapter,), (direction,))[1]


UNDER = {
    "plain": lambda run, ad: run(ad),
    "grad": lambda run, ad: jax.grad(lambda ad: total(run(ad)))(ad),
    "jvp": lambda run, ad: jax.jvp(run, (ad,), (jax.tree.map(jnp.cos, ad),)),
    "forward over reverse": hessian_product,
    "reverse over reverse": lambda run, ad: jax.grad(lambda ad: total(jax.grad(lambda ad: total(run(ad)))(ad)))(ad),
    "vmap of grad": lambda run, ad: jax.vmap(jax.grad(lambda ad: total(run(ad))))(
        jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), ad)
    ),
    "grad of remat": lambda run, ad: jax.grad(jax.checkpoint(lambda ad: total(run(ad))))(ad),
    "grad of scan": lambda run, ad: jax.grad(
        lambda ad: lax.scan(lambda c, _: (c + total(run(jax.tree.map(lambda x: x * c, ad))), None), 1.0, length=2)[0]
    )(ad),
}


@pytest.mark.parametrize("under", UNDER)
@pytest.mark.parametrize("form", [None, *FORMS])
def test_all_forms_are_the_same_function(form: str | None, under: str) -> None:
    with jax.enable_x64(True):
        params, x = {"w": normal(4, 5, dtype="float64")}, normal(3, 4, seed=1, dtype="float64")
        adapter = adapted(params, {"w": "io"}, dtype="float64")
        got, expected = (
            jax.jit(lambda ad, f=f: UNDER[under](lambda ad: f(params, ad, x), ad))(adapter)
            for f in (in_form(form), dense(SMALL.apply))
        )
        assert_close(got, expected, GRADIENT)


@pytest.mark.parametrize("wrt", ["x", "w", "a", "b", "xw", "wab"])
def test_all_forms_have_the_same_partial_gradients(wrt: str) -> None:
    with jax.enable_x64(True):
        operands = {
            name: normal(*shape, seed=seed, dtype="float64")
            for seed, (name, shape) in enumerate({"x": (3, 4), "w": (4, 5), "a": (4, 2), "b": (2, 5)}.items())
        }
        part = lj.LoRA(rank=2, alpha=3)

        def gradient(apply: Any) -> Any:
            def run(moving: Any) -> Any:
                values = operands | moving
                return total(
                    apply({"w": values["w"]}, {"w": lj.Adapter(part, "io", a=values["a"], b=values["b"])}, values["x"])
                )

            return jax.jit(jax.grad(run))({name: operands[name] for name in wrt})

        expected = gradient(dense(SMALL.apply))
        for form in (None, *FORMS):
            assert_close(gradient(in_form(form)), expected, GRADIENT)


def test_a_16_bit_kernel_is_not_materialized_by_default() -> None:
    params, adapter, x = abstract_case(512, 32, 32, 24)
    params, x = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), (params, x))
    apply = lambda params, x: x @ params["w"]  # noqa: E731
    assert (32, 32) not in testing.shapes_made(lj.lora(apply), params, adapter, x)
    assert (32, 32) in testing.shapes_made(lj.lora(apply, form="hybrid"), params, adapter, x)


def test_the_factored_form_never_materializes() -> None:
    one = abstract_case(512, 32, 32, 24)
    apply = lambda params, x: x @ params["w"]  # noqa: E731
    assert (32, 32) in testing.shapes_made(lj.lora(apply), *one)
    assert (32, 32) not in testing.shapes_made(lj.lora(apply, form="factored"), *one)


@pytest.mark.parametrize("form", FORMS)
def test_explain_shows_the_form(form: str) -> None:
    one = abstract_case(512, 32, 32, 24)
    apply = lambda params, x: x @ params["w"]  # noqa: E731
    row = lj.explain(apply, *one, form=form).rows[0]
    assert row.used == f"{form} dot_general ×1"
    more = testing.flops(lj.lora(apply, form=form), *one) - testing.flops(apply, one[0], one[2])
    assert row.flops == pytest.approx(more, rel=0.01)


def test_explain_shows_the_form_of_a_training_step() -> None:
    apply = lambda params, x: x @ params["w"]  # noqa: E731
    assert lj.explain(apply, *abstract_case(4096, 256, 256, 64)).rows[0].used == "hybrid dot_general ×1"


def test_an_unknown_form_is_an_error_immediately() -> None:
    with pytest.raises(lj.SpecError) as error:
        lj.lora(SMALL.apply, form="dense")
    assert str(error.value) == (
        "Expected a form among ['factored', 'hybrid', 'merged'], or None for the cheapest; got form='dense'."
    )


# A bias is added before the low-rank term


BIASED = {
    "a bias": lambda w, x: x @ w + jnp.arange(5.0),
    "a bias on the left": lambda w, x: jnp.arange(5.0) + x @ w,
    "a number": lambda w, x: x @ w + 1,
    "two kernels": lambda w, x: x @ w + jnp.sin(x) @ w,
    "used before and after": lambda w, x: (jnp.tanh(y := x @ w), y + 1.0),
    "used after": lambda w, x: ((y := x @ w) + 1.0, y),
    "twice the same": lambda w, x: (y := x @ w) + y,
    "in a scan": lambda w, x: lax.scan(lambda c, x: (c + x @ w, x @ w), jnp.zeros(5), x),
    "cast before": lambda w, x: (x @ w).astype(jnp.bfloat16).astype(jnp.float32) + 1.0,
}


@pytest.mark.parametrize("name", BIASED)
def test_adding_to_a_contraction_gives_the_same_sum(name: str) -> None:
    case = Case(BIASED[name], (4, 5), [(3, 4)], "io")
    # A cast in between rounds another sum.
    assert_law(case.apply, case.params, case.adapter, *case.arrays, dtype="bfloat16" if "cast" in name else None)


def test_a_bias_is_added_before_the_low_rank_term() -> None:
    params, adapter, x = abstract_case(16, 768, 768, 8)
    jaxpr = jax.make_jaxpr(lj.lora(lambda params, x: x @ params["w"] + jnp.ones(768)))(params, adapter, x)
    equations = {eqn.outvars[0]: eqn for eqn in jaxpr.eqns}
    last = equations[jaxpr.jaxpr.outvars[0]]
    operands = [equations[var].primitive.name for var in last.invars]
    assert (last.primitive.name, operands) == ("add", ["add", "dot_general"])


# Taylor mode, which does not support a `custom_jvp`

PINN = {"w": normal(3, 16), "v": normal(16, 1, seed=1)}
POINTS = normal(32, 3, seed=2)


def solution(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"]) @ params["v"]


def with_inner_jit(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(jax.jit(jnp.matmul)(x, params["w"])) @ params["v"]


def taylor(function: Callable[..., Any]) -> Any:
    return jet.jet(function, (POINTS,), ((POINTS, 0 * POINTS),))


@pytest.mark.parametrize("apply", [solution, with_inner_jit])
def test_under_jet_the_default_form_has_the_derivatives_of_the_merged_model(apply: Callable[..., Any]) -> None:
    adapter = adapted(PINN, {"w": "io"}, rank=3)
    assert lj.explain(apply, PINN, adapter, POINTS).rows[0].used != "factored dot_general ×1"  # a deferred choice

    def run(function: Callable[..., Any]) -> Any:
        call = functools.partial(function, PINN)
        residual = lambda adapter: jnp.sum(taylor(functools.partial(call, adapter))[1][1])  # noqa: E731
        vmapped = taylor(jax.vmap(functools.partial(call, adapter)))
        return taylor(functools.partial(call, adapter)), vmapped, jax.jit(jax.grad(residual))(adapter)

    assert_close(run(lj.lora(apply)), run(dense(apply)), GRADIENT)


@pytest.mark.parametrize("form", ["factored", "merged"])
def test_jet_transforms_a_jitted_function_whose_form_is_fixed(form: Any) -> None:
    adapter = adapted(PINN, {"w": "io"}, rank=3)
    got, expected = (
        taylor(jax.jit(functools.partial(function, PINN, adapter)))
        for function in (lj.lora(solution, form=form), dense(solution))
    )
    assert_close(got, expected, GRADIENT)


def test_an_error_unrelated_to_forms_is_unchanged() -> None:
    leaked = []
    jax.make_jaxpr(lambda x: leaked.append(x * 2) or x)(normal(32, 3))
    with pytest.raises(jax.errors.UnexpectedTracerError):
        lj.lora(solution)(PINN, adapted(PINN, {"w": "io"}, rank=3), leaked[0])


def test_under_jet_the_hybrid_form_is_refused() -> None:
    adapter = adapted(PINN, {"w": "io"}, rank=3)
    with pytest.raises(lj.SpecError) as error:
        taylor(functools.partial(lj.lora(solution, form="hybrid"), PINN, adapter))
    assert str(error.value) == (
        "Expected a form without a `custom_jvp`, which the transformation around the call, such as "
        "`jax.experimental.jet`, does not support; got form='hybrid'.\n"
        "  Use 'factored' or 'merged', or None, which is 'factored' there."
    )
    assert isinstance(error.value.__cause__, Exception)
