"""AdaLoRA as a variant, against `W0 + s·A·diag(e)·B`. `test_adaptive.py` tests the budget and pruning."""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

import fuzz
import fuzz_program as fp
import fuzz_run
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import GRADIENT, assert_close, assert_few_ulp, bits, sweep, trained
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from law import normal, total
from transforms import call, law, under
from zoo import ZOO, Model

import lora_jax as lj
from lora_jax import analysis, optim, starts, testing

VARIANT = lj.AdaLoRA(rank=2, alpha=4)


def adalora(params: Any, axes: str, **options: Any) -> Any:
    """An adapter of a kernel `w` with nonzero arrays."""
    variant = lj.AdaLoRA(**{"rank": 2, "alpha": 3, "axes": axes} | options)
    shapes = jax.eval_shape(lambda key: lj.init(key, params, {"w": variant}), jax.random.key(0))
    leaves, treedef = jax.tree.flatten(shapes)
    return treedef.unflatten([normal(*leaf.shape, seed=100 + at, size=0.4) for at, leaf in enumerate(leaves)])


def update_of(part: Any, axes: str) -> jax.Array:
    """`s·A·diag(e)·B`, by einsum."""
    names = {role: "".join(chr(ord("a") + at) for at, letter in enumerate(axes) if letter == role) for role in "bio"}
    kernel = "".join(chr(ord("a") + at) for at in range(len(axes)))
    how = f"{names['b']}{names['i']}z,{names['b']}z,{names['b']}z{names['o']}->{kernel}"
    return part.variant.scale * jnp.einsum(how, part.a, part.e, part.b, precision="highest")


@pytest.mark.parametrize("axes", ["io", "oi", "ioo", "iio", "iiio", "bio", "iob", "obii"])
def test_merge_matches_the_formula_of_the_paper(axes: str) -> None:
    params = {"w": normal(*range(3, 3 + len(axes)), size=0.5)}
    adapter = adalora(params, axes)
    assert_close(lj.merge(params, adapter)["w"], params["w"] + update_of(adapter["w"], axes))
    assert_close(lj.unmerge_approximately(lj.merge(params, adapter), adapter)[0], params)


def make(name: str, dtype: str) -> tuple[Model, Any]:
    """A model of the zoo with AdaLoRA in place of LoRA."""
    key = jax.random.key(0)
    model = ZOO[name](key, jnp.dtype(dtype))

    def as_adalora(variant: Any) -> Any:
        return (
            lj.AdaLoRA(rank=variant.rank, alpha=variant.alpha, axes=variant.axes)
            if hasattr(variant, "rank")
            else variant
        )

    spec = {pattern: as_adalora(variant) for pattern, variant in model.spec.items()}
    kernels = lj.kernels(model.apply, model.params, *model.args)
    return model, jax.jit(lambda key, params: lj.init(key, params, spec, kernels=kernels))(key, model.params)


@pytest.mark.parametrize(("name", "dtype"), [("scanned_transformer", "float32"), ("grouped_conv", "bfloat16")])
def test_initialization_keeps_the_model(name: str, dtype: str) -> None:
    model, adapter = make(name, dtype)
    jit = functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    base = jit(call(lambda params, adapter, *args: model.apply(params, *args), model))(adapter, model.args[0])
    assert_few_ulp(jit(call(lj.lora(model.apply, form="factored"), model))(adapter, model.args[0]), base)


@pytest.mark.parametrize(
    "name", ["scanned_transformer", sweep("tied_embedding"), sweep("grouped_conv"), sweep("experts")]
)
def test_gradients_match_those_of_the_merged_kernels(name: str, key: jax.Array) -> None:
    model, adapter = make(name, "float32")
    lj.explain(model.apply, model.params, adapter, *model.args, strict=True)
    (((gradient, out), (expected_gradient, expected)),) = law(model, trained(key, adapter), compiled=False)
    assert_close(out, expected)
    assert_close(gradient, expected_gradient, GRADIENT)
    for path, part in gradient.items():
        assert all(float(np.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(part)), path


@pytest.mark.parametrize("transform", ["vmap", "jvp"])
def test_adalora_works_under_every_transform(transform: str, key: jax.Array) -> None:
    model, adapter = make("scanned_transformer", "float32")
    assert_close(*under(transform, model, trained(key, adapter)))


@pytest.mark.sweep
def test_random_programs_match_merged_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of `test_fuzz.py` with AdaLoRA."""
    monkeypatch.setitem(fuzz_run.VARIANTS, "AdaLoRA", lj.AdaLoRA)
    for seed in range(4000, 4020):
        program = fuzz.Drawing(random.Random(seed)).program()
        if any(isinstance(step, fp.Opaque) for step in fp.steps_of(program.body)):
            continue
        leaves = tuple(
            (name, dataclasses.replace(leaf, variant="AdaLoRA") if leaf.variant in ("LoRA", "RSLoRA") else leaf)
            for name, leaf in program.leaves
        )
        fuzz_run.assert_program(dataclasses.replace(program, leaves=leaves))


# Initialization and sharding


def test_initialization_matches_the_authors_code() -> None:
    params = {"w": jax.ShapeDtypeStruct((3, 40, 50, 20), jnp.float32)}
    part = lj.init(jax.random.key(0), params, {"w": lj.AdaLoRA(rank=20, alpha=4, axes="bioo")})["w"]
    assert (part.a.shape, part.e.shape, part.b.shape) == ((3, 40, 20), (3, 20), (3, 20, 50, 20))
    assert not part.e.any()
    assert float(part.b.std()) == pytest.approx(0.02, rel=0.02) and abs(float(part.b.mean())) < 5e-4
    assert float(part.a.std()) == pytest.approx(0.02, rel=0.1)
    assert part.variant.scale == 4 / 20


def test_factors_are_drawn_independently() -> None:
    part = lj.init(jax.random.key(0), {"w": jnp.ones((6, 6))}, {"w": lj.AdaLoRA(rank=6, alpha=1)})["w"]
    assert abs(np.corrcoef(part.a.ravel(), part.b.ravel())[0, 1]) < 0.5


def test_arrays_are_sharded_like_the_kernel() -> None:
    params = {"w": jnp.ones((4, 8, 6))}
    adapter = adalora(params, "bio")
    placed = lj.sharding.like_base(adapter, {"w": P("layers", "x", "y")})["w"]
    assert (placed.a, placed.e, placed.b) == (P("layers", "x", None), P("layers", None), P("layers", None, "y"))


@pytest.mark.parametrize("spec", [P(None, None, "model"), P(None, "model"), P("model")])
def test_the_function_is_the_same_on_an_explicit_mesh(spec: P) -> None:
    params = {"w": normal(8, 8, 8, size=0.5)}
    adapter, x = adalora(params, "bio"), normal(8, 3, 8, seed=2)
    apply = lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"], out_sharding=jax.typeof(x).sharding)  # noqa: E731
    expected = jax.grad(lambda ad: total(jnp.einsum("etd,edf->etf", x, lj.merge(params, ad)["w"])))(adapter)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, spec))
        sharded = jax.device_put(adapter, lj.sharding.like_base(adapter, NamedSharding(mesh, spec)))
        x_on_mesh = jax.device_put(x, NamedSharding(mesh, P("model" if spec == P("model") else None)))
        gradient = jax.jit(jax.grad(lambda ad: total(lj.lora(apply)(placed, ad, x_on_mesh))))(sharded)
    assert_close(jax.device_get(gradient), jax.device_get(expected), {"float32": 1e-4})


def test_explain_counts_the_trainable_parameters() -> None:
    params = {"w": normal(4, 5)}
    (row,) = lj.explain(lambda params, x: x @ params["w"], params, adalora(params, "io"), normal(3, 4)).rows
    assert (row.variant, row.rank, row.scale, row.parameters) == ("AdaLoRA", 2, 1.5, 4 * 2 + 2 + 2 * 5)


def test_flops_are_slightly_more_than_those_of_lora() -> None:
    params = {"w": jax.ShapeDtypeStruct((768, 768), jnp.float32)}
    x = jax.ShapeDtypeStruct((512, 768), jnp.float32)

    def step(variant: Any) -> int:
        adapter = jax.eval_shape(lambda: lj.init(jax.random.key(0), params, {"w": variant}))
        loss = lambda ad, params, x: lj.lora(lambda p, x: x @ p["w"])(params, ad, x).sum()  # noqa: E731
        return testing.flops(jax.grad(loss, (0, 2)), adapter, params, x)

    assert step(lj.AdaLoRA(rank=8, alpha=16)) < 1.001 * step(lj.LoRA(rank=8, alpha=16))


def test_the_update_is_never_materialized() -> None:
    params = {"w": jnp.ones((48, 40))}
    run = lambda ad, x: lj.lora(lambda p, x: x @ p["w"], form="factored")(params, ad, x).sum()  # noqa: E731
    jaxpr = jax.make_jaxpr(jax.grad(run))(adalora(params, "io"), jnp.ones((3, 48)))
    products = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert products
    assert not any(eqn.outvars[0].aval.shape in ((48, 40), (40, 48)) for eqn in products)


# Functions that need the factors


@pytest.mark.parametrize("axes", ["io", "bio"])
def test_analysis_measures_the_full_update(axes: str) -> None:
    params = {"w": normal(*(3, 6, 5)[3 - len(axes) :])}
    adapter = adalora(params, axes)
    update = update_of(adapter["w"], axes)
    values = jnp.linalg.svd(update, compute_uv=False)[..., :2]
    assert_close(analysis.singular_values(adapter)["w"], values)
    norms = jnp.linalg.norm(update, axis=(-2, -1)) / jnp.linalg.norm(params["w"], axis=(-2, -1))
    assert_close(analysis.relative_norms(params, adapter)["w"], norms)
    plain = {"w": lj.Adapter(lj.LoRA(rank=2, alpha=3), axes, a=adapter["w"].a, b=adapter["w"].b)}
    other = analysis.subspace_similarity(adapter, plain)["w"]
    assert_close(other[..., -1, -1], jnp.ones(other.shape[:-2]))  # both span the columns of `a`
    assert analysis.intruders(params, adapter, top=2)["w"].similarity.shape == (*values.shape[:-1], 2)


def test_functions_for_two_factors_raise() -> None:
    params = {"w": normal(6, 5)}
    adapter = adalora(params, "io")
    text = (
        "Expected leaves whose update is s·A·B; got AdaLoRA(rank=2, alpha=3) at 'w'.\n"
        "  Convert such leaves first: lora_jax.adaptive.compact(adapter)."
    )
    with pytest.raises(lj.SpecError) as caught:
        lj.compress(adapter, 1)
    assert str(caught.value) == text
    assert_close(lj.compress(lj.adaptive.compact(adapter), 2)[1]["w"], jnp.zeros(()))
    with pytest.raises(lj.SpecError, match=r"'w' of shape .*: expected LoRA or RSLoRA"):
        lj.extract({"w": jnp.zeros((6, 5))}, params, {"w": VARIANT})


@pytest.mark.parametrize("start", [starts.pissa, starts.olora, functools.partial(starts.gaussian, jax.random.key(0))])
def test_initializations_of_two_factors_are_errors(start: Any) -> None:
    params = {"w": normal(6, 5)}
    with pytest.raises(lj.SpecError) as caught:
        start(params, lj.init(jax.random.key(0), params, {"w": VARIANT}))
    assert str(caught.value) == (
        "At 'w': expected a variant whose update is s·A·B; AdaLoRA(rank=2, alpha=4) has a diagonal in addition."
    )


# Optimizers that treat `a` and `b` as one product


def test_lora_plus_does_not_treat_e_as_a_factor() -> None:
    adapter = adalora({"w": normal(6, 5)}, "io")
    tx = optim.lora_plus(16)
    updates, _ = tx.update(adapter, tx.init(adapter), adapter)
    assert_close(updates["w"].b, 16 * adapter["w"].b)
    assert bits((updates["w"].a, updates["w"].e)) == bits((adapter["w"].a, adapter["w"].e))


@pytest.mark.parametrize("axes", ["io", "bio"])
def test_lora_fa_steps_are_the_nearest_to_full_fine_tuning_for_a_and_e(axes: str) -> None:
    shape = (3, 6, 5)[3 - len(axes) :]
    with jax.enable_x64(True):
        params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(shape))}
        adapter = jax.tree.map(lambda x: x.astype(jnp.float64), adalora(params, axes))
        part, x = adapter["w"], jnp.cos(jnp.arange(params["w"].size, dtype=jnp.float64)).reshape(shape)
        loss = lambda w: jnp.sum(jnp.sin(w * x))  # noqa: E731
        slope = jax.grad(loss)(lj.merge(params, adapter)["w"])
        gradient = jax.grad(lambda ad: loss(lj.merge(params, ad)["w"]))(adapter)
        tx = optim.lora_fa(optax.sgd(1.0), damping=0)
        updates, _ = tx.update(gradient, tx.init(adapter), adapter)
        assert not updates["w"].a.any()
        assert_close(updates["w"].e, -gradient["w"].e)
        scaled = part.a * part.e[..., None, :]
        step = 1.5 * scaled @ updates["w"].b
        assert_close(step, -scaled @ jnp.linalg.pinv(scaled) @ slope, {"float64": 1e-8})


def test_riemannian_steps_do_not_depend_on_the_factorization() -> None:
    """Scales `a` and `b` by matrices that cancel around `e`."""
    with jax.enable_x64(True):
        params = {"w": jnp.zeros((6, 5))}
        adapter = jax.tree.map(lambda x: x.astype(jnp.float64), adalora(params, "io"))
        part = adapter["w"]
        mix, e = jnp.array([[3.0, 1.0], [0.5, 0.2]]), jnp.diag(part.e)
        unmix = jnp.linalg.inv(e) @ jnp.linalg.inv(mix) @ e  # so that a·mix·e·unmix·b = a·e·b
        equal_part = lj.Adapter(part.variant, "io", a=part.a @ mix, e=part.e, b=unmix @ part.b)
        tx = optim.riemannian(damping=1e-14)

        def speed(part: Any) -> jax.Array:
            gradient = jax.grad(lambda part: jnp.sum(jnp.sin(lj.merge(params, {"w": part})["w"])))(part)
            updates, _ = tx.update({"w": gradient}, tx.init({"w": part}), {"w": part})
            moved = lj.Adapter(part.variant, "io", **updates["w"].arrays | {"e": jnp.zeros_like(part.e)})
            return jax.jvp(lambda part: lj.merge(params, {"w": part})["w"], (part,), (moved,))[1]

        assert_close(update_of(equal_part, "io"), update_of(part, "io"))
        assert_close(speed(equal_part), speed(part), {"float64": 1e-6})
