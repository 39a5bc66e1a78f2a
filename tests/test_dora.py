"""DoRA, against its formula with materialized kernels: a low-rank direction and a magnitude for each output."""

from __future__ import annotations

import collections
import dataclasses
import random
import re
from typing import Any

import fuzz
import fuzz_program as fp
import fuzz_run
import jax
import jax.numpy as jnp
import pytest
from helpers import sweep
from law import assert_close, assert_law, normal
from uses import USES

import lora_jax as lj
from lora_jax import starts, testing


def dora(params: Any, axes: str, **options: Any) -> Any:
    """An adapter of a kernel `w` with nonzero arrays."""
    variant = lj.DoRA(rank=2, alpha=3, axes=axes, **options)
    shapes = jax.eval_shape(lambda key: lj.init(key, params, {"w": variant}), jax.random.key(0))
    leaves, treedef = jax.tree.flatten(shapes)
    return treedef.unflatten([normal(*leaf.shape, seed=100 + at, size=0.4) for at, leaf in enumerate(leaves)])


@pytest.mark.parametrize("axes", ["io", "oi", "ioo", "iio", "iiio", "bio", "iob", "obii"])
def test_merge_matches_the_formula_of_the_paper(axes: str) -> None:
    params = {"w": normal(*range(3, 3 + len(axes)), size=0.5)}
    part = dora(params, axes)["w"]
    names = {role: [chr(ord("a") + at) for at, letter in enumerate(axes) if letter == role] for role in "bio"}
    inputs = tuple(at for at, role in enumerate(axes) if role == "i")
    batch, into, out = map("".join, names.values())
    kernel = "".join(chr(ord("a") + at) for at in range(len(axes)))
    update = jnp.einsum(f"{batch}{into}z,{batch}z{out}->{kernel}", part.a, part.b, precision="highest")
    direction = params["w"] + 1.5 * update
    length = jnp.sqrt(jnp.sum(direction**2, inputs, keepdims=True))
    magnitude = jnp.einsum(f"{batch}{out},{kernel}->{kernel}", part.magnitude, jnp.ones_like(direction))
    assert_close(lj.merge(params, {"w": part})["w"], magnitude * direction / length)


@pytest.mark.parametrize("left", [1e-2, 1e-4, 0.0])
def test_an_update_that_cancels_the_kernel_does_not_explode(left: float) -> None:
    # Was a gain of 1e15 where the square of the norm was rounded to a negative number.
    w = normal(64, 8)
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    part = lj.Adapter(lj.DoRA(rank=8, alpha=8), "io", a=(left - 1) * u * s, b=vt, magnitude=jnp.ones(8))
    lengths = jnp.linalg.norm(lj.merge({"w": w}, {"w": part})["w"], axis=0)
    assert lengths.max() < 1.01 and (left < 1e-2 or lengths.min() > 0.99)


def test_the_norm_is_constant_in_the_gradient() -> None:
    w, x = normal(4, 5), normal(3, 4, seed=1)
    part = dora({"w": w}, "io")["w"]
    direction = w + 1.5 * part.a @ part.b
    length = jnp.linalg.norm(direction, axis=0)
    run = lambda part: jnp.sum(lj.lora(lambda p, x: x @ p["w"])({"w": w}, {"w": part}, x))  # noqa: E731
    gradient = jax.grad(run)(part)
    dw = x.T @ jnp.ones((3, 5)) * part.magnitude / length
    assert_close(gradient.a, 1.5 * dw @ part.b.T)
    assert_close(gradient.b, 1.5 * part.a.T @ dw)
    assert_close(gradient.magnitude, jnp.sum(x @ direction, 0) / length)


def test_dropout_applies_to_the_change_of_the_base_by_the_magnitude() -> None:
    # y = x·W0 + (g - 1)·d(x)·W0 + g·s·d(x)·A·B, as in the authors' code; here W0 = 1, B = 0 and g = 3.
    params = {"w": jnp.eye(4)}
    adapter = lj.init(jax.random.key(0), params, {"w": lj.DoRA(rank=2, alpha=3, dropout=0.75)})
    adapter = {"w": lj.Adapter(adapter["w"].variant, "io", **adapter["w"].arrays | {"magnitude": jnp.full(4, 3.0)})}
    apply, x = lj.lora(lambda params, x: x @ params["w"]), jnp.ones((64, 4))
    assert_close(apply(params, adapter, x), 3 * x)
    dropped = apply(params, adapter, x, dropout_key=jax.random.key(1))
    assert {round(float(value), 3) for value in dropped.ravel()} == {1.0, 1.0 + 2 * 4}
    assert 0.15 < float((dropped > 1).mean()) < 0.35


def test_the_scale_may_be_rank_stabilized() -> None:
    params, x = {"w": normal(4, 5)}, normal(3, 4, seed=1)
    adapter = dora(params, "io", rank_stabilized=True)
    assert adapter["w"].variant.scale == pytest.approx(3 / 2**0.5)
    assert_law(lambda params, x: x @ params["w"], params, adapter, x)


def test_filled_rows_have_no_gradient_even_where_the_model_makes_it_nan() -> None:
    params, ids = {"w": normal(6, 5)}, jnp.array([[0, 9], [5, -8]])

    def apply(params: Any, ids: jax.Array) -> jax.Array:
        rows = jnp.take(params["w"], ids, axis=0, mode="fill")
        return jnp.where(jnp.isin(ids, jnp.arange(6))[..., None], jnp.tanh(rows), 0)

    assert_law(apply, params, dora(params, "io"), ids)


def test_unmerge_needs_the_base() -> None:
    params = {"w": normal(4, 5)}
    adapter = dora(params, "io")
    merged = lj.merge(params, adapter)
    assert lj.unmerge(merged, adapter, base=params)["w"] is params["w"]
    with pytest.raises(lj.MergeError, match="Cannot unmerge 'w' without the base: DoRA"):
        lj.unmerge_approximately(merged, adapter)
    report = lj.merge_report(params, adapter, merged)
    assert report["w"].max_error < 1e-6


@pytest.mark.parametrize("start", [starts.pissa, starts.olora])
@pytest.mark.parametrize("name", ["a stack of layers", sweep("Dense"), sweep("a convolution")])
def test_initializations_that_change_the_base_keep_the_model(name: str, start: Any) -> None:
    case = USES[name]
    adapter = lj.init(jax.random.key(0), case.params, {"w": lj.DoRA(rank=2, alpha=3, axes=case.roles)})
    began = start(case.params, adapter)
    adapted, expected = lj.lora(case.apply), case.apply(case.params, *case.arrays)
    assert_close(adapted(began.params, began.adapter, *case.arrays), expected, {"float32": 1e-4})
    trained = jax.tree.map(lambda x: x + 0.1, began.adapter)
    plain = starts.as_plain(case.params, trained, *began)
    after = adapted(began.params, trained, *case.arrays)
    assert_close(adapted(case.params, plain, *case.arrays), after, {"float32": 1e-4})


def test_initialization_needs_values() -> None:
    shapes = {"w": jax.ShapeDtypeStruct((4, 5), jnp.float32)}
    with pytest.raises(lj.SpecError, match=r"'w' of shape .*: DoRA is initialized from the values of the kernel"):
        lj.init(jax.random.key(0), shapes, {"w": lj.DoRA(rank=2, alpha=4)})


REFUSED = {
    "a product of two": (lambda p, x: x @ (p["w"] @ p["w"]), "a product of two kernels, of which one has a gain"),
    "padding": (lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 0)), constant_values=2.0), "a value other than 0"),
    "concatenated with another, along the inputs": (
        lambda p, x: jnp.concatenate([x, x], 1) @ jnp.concatenate([p["w"], jnp.ones((4, 4))], 0),
        "a concatenation along an axis that the gain of one of the kernels does not have",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_uses_that_need_the_gain_inside_are_refused(name: str) -> None:
    call, reason = REFUSED[name]
    params, x = {"w": normal(4, 4)}, normal(3, 4)
    with pytest.raises(lj.UnsupportedError, match=reason):
        lj.lora(call)(params, dora(params, "io"), x)
    assert_law(call, params, dora(params, "io"), x, materialize=["w"])


def test_flops_are_slightly_more_than_those_of_lora() -> None:
    params = {"w": jax.ShapeDtypeStruct((768, 768), jnp.float32)}
    x = jax.ShapeDtypeStruct((512, 768), jnp.float32)

    def step(variant: Any) -> int:
        adapter = jax.eval_shape(lambda params: lj.init(jax.random.key(0), params, {"w": variant}), params)
        loss = lambda ad, params, x: lj.lora(lambda p, x: x @ p["w"])(params, ad, x).sum()  # noqa: E731
        return testing.flops(jax.grad(loss, (0, 2)), adapter, params, x)

    assert step(lj.DoRA(rank=8, alpha=16)) < 1.03 * step(lj.LoRA(rank=8, alpha=16))


def test_the_norm_does_not_materialize_the_update() -> None:
    params = {"w": jnp.ones((48, 40))}
    adapter = dora(params, "io")
    run = lambda ad, x: lj.lora(lambda p, x: x @ p["w"], form="factored")(params, ad, x).sum()  # noqa: E731
    jaxpr = jax.make_jaxpr(jax.grad(run))(adapter, jnp.ones((3, 48)))
    products = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert products
    assert not any(eqn.outvars[0].aval.shape in ((48, 40), (40, 48)) for eqn in products)


@pytest.mark.sweep
def test_random_programs_match_merged_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of `test_fuzz.py`, except that a program may also be refused because of the gain."""
    monkeypatch.setitem(fuzz_run.VARIANTS, "DoRA", lj.DoRA)
    refused, seeds = collections.Counter[str](), range(3000, 3025)
    for seed in seeds:
        program = fuzz.Drawing(random.Random(seed)).program()
        if any(isinstance(step, fp.Opaque) for step in fp.steps_of(program.body)):
            continue
        leaves = tuple(
            (name, dataclasses.replace(leaf, variant="DoRA") if leaf.variant in ("LoRA", "RSLoRA") else leaf)
            for name, leaf in program.leaves
        )
        try:
            fuzz_run.assert_program(dataclasses.replace(program, leaves=leaves))
        except AssertionError as error:
            if not (found := re.search(r"passes it to `\w+`: (.* gain.*)\.", str(error))):
                raise
            refused[found[1]] += 1
    assert refused.total() < 0.4 * len(seeds)
