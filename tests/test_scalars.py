"""A kernel times a scalar, or times an array that is constant along inputs or outputs, keeps its factors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FORWARD
from jax import lax
from law import Case, adapted, assert_case, assert_close, assert_law, normal

import lora_jax as lj

X = (3, 4)


def matrix(call: Callable[..., Any], *more: tuple[int, ...]) -> Case:
    return Case(call, (4, 5), [X, *more], "io")


NUMBERS = {
    "times two": matrix(lambda w, x: x @ (w * 2.0)),
    "two times": matrix(lambda w, x: x @ (2 * w)),
    "halved": matrix(lambda w, x: x @ (w / 2)),
    "negated": matrix(lambda w, x: x @ -w),
    "negated, and halved, and transposed": matrix(lambda w, x: (-w / 2).T @ x.T),
    "times a number of NumPy": matrix(lambda w, x: x @ (w * np.float32(0.3))),
    "times an array of NumPy": matrix(lambda w, x: x @ (w * np.array(0.3, np.float32))),
    "times nothing": matrix(lambda w, x: x @ (w * 0.0)),
    "times a number in a jit": matrix(lambda w, x: x @ jax.jit(lambda w: w * 3.0)(w)),
    "times a number in a remat": matrix(lambda w, x: jax.checkpoint(lambda w, x: x @ (w * 3.0))(w, x)),
    "every layer of a stack": Case(
        lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ (w / 2)), None), x, w)[0], (2, 4, 4), [X], "bio"
    ),
    "a lookup": Case(lambda w, ids: (w * 3.0)[ids], (6, 5), [[0, 5, 2]], "io"),
    "a convolution": Case(lambda w, x: lax.conv(x, w / 3, (1,), "SAME"), (4, 3, 3), [(2, 3, 5)], "oii"),
}
ARRAYS = {
    "times a root": matrix(lambda w, x: x @ (w / jnp.sqrt(4.0))),
    "times an argument": matrix(lambda w, x, c: x @ (w * c), ()),
    "an argument times": matrix(lambda w, x, c: x @ (c * w), ()),
    "divided by an argument": matrix(lambda w, x, c: x @ (w / (2 + c)), ()),
    "times an argument with axes of size 1": matrix(lambda w, x, c: x @ (w * c[None, None]), ()),
    "times what depends on x": matrix(lambda w, x: x @ (w * jnp.tanh(x).sum())),
    "times what comes into a jit": matrix(lambda w, x, c: x @ jax.jit(lambda w: w * c)(w), ()),
    "times a column of outputs": matrix(lambda w, x, c: x @ (w * c), (5,)),
    "divided by a column of inputs": matrix(lambda w, x, c: x @ (w / (3 + c)), (4, 1)),
    "times a scalar per head": Case(
        lambda w, x, c: jnp.einsum("bd,dhk->bhk", x, w * c[:, None]), (4, 2, 3), [X, (2,)], "ioo"
    ),
    "times a scalar per layer": Case(
        lambda w, x, c: jnp.einsum("lbd,ldk->lbk", x, w * c[:, None, None]), (2, 4, 5), [(2, *X), (2,)], "bio"
    ),
    "times a scalar per layer and output": Case(
        lambda w, x, c: jnp.einsum("lbd,ldk->lbk", x, w * c[:, None]), (2, 4, 5), [(2, *X), (2, 5)], "bio"
    ),
    "layers not first, times a scalar per layer": Case(
        lambda w, x, c: jnp.einsum("lbd,dlk->lbk", x, w * c[:, None]), (4, 2, 5), [(2, *X), (2,)], "ibo"
    ),
    "one layer times many numbers": Case(
        lambda w, x, c: jnp.einsum("lbd,ldk->lbk", x, w * c[:, None, None]), (1, 4, 5), [(2, *X), (2,)], None, "bio"
    ),
    "times a scalar per example, by vmap": matrix(lambda w, x, c: jax.vmap(lambda x, c: x @ (w * c))(x, c), (3,)),
    "times a scalar per layer, by vmap": Case(
        lambda w, x, c: jax.vmap(lambda w, x, c: x @ (w * c))(w, x, c), (3, 4, 5), [X, (3,)], "bio"
    ),
    "times a number that a scan carries": matrix(
        lambda w, x: lax.scan(lambda c, _: (c / 2, x @ (w * c)), 1.0, length=3)[1]
    ),
}
SCALED = NUMBERS | ARRAYS


@pytest.mark.parametrize("name", SCALED)
def test_a_scaled_kernel_matches_the_scaled_merged_kernel(name: str) -> None:
    assert_case(SCALED[name])


@pytest.mark.parametrize("name", SCALED)
def test_kernels_ignores_a_scale(name: str) -> None:
    case = SCALED[name]
    assert lj.kernels(case.apply, case.params, *case.arrays)["w"].axes == case.roles


@pytest.mark.parametrize("name", ["times two", "halved", "negated", "times an argument", "times a column of outputs"])
def test_a_scaled_kernel_works_outside_jit_and_under_vmap(name: str) -> None:
    case = SCALED[name]
    x, *rest = case.arrays
    run = functools.partial(lj.lora(case.apply), case.params, case.adapter)
    expected = case.apply(lj.merge(case.params, case.adapter), x, *rest)
    assert_close(run(x, *rest), expected)
    assert_close(jax.vmap(lambda x: run(x[None], *rest)[0])(x), expected)


@pytest.mark.parametrize("name", [name for name, case in SCALED.items() if "b" not in (case.axes or case.roles)])
def test_only_the_scaled_base_has_the_shape_of_the_kernel(name: str) -> None:
    case = SCALED[name]
    jaxpr = jax.make_jaxpr(lj.lora(case.apply, form="factored"))(case.params, case.adapter, *case.arrays)
    primitives = {eqn.primitive.name for eqn in jaxpr.eqns if case.kernel in {var.aval.shape for var in eqn.outvars}}
    assert primitives <= {"mul", "div", "neg", "jit"}


def test_a_scalar_joins_the_scale_and_adds_no_equation() -> None:
    plain, scaled = (matrix(call) for call in (lambda w, x: x @ w, lambda w, x: x @ (w * 2.0)))
    row, other = (lj.explain(case.apply, case.params, case.adapter, *case.arrays).rows[0] for case in (plain, scaled))
    assert row.flops == other.flops
    primitives = [
        [
            eqn.primitive.name
            for eqn in jax.make_jaxpr(lj.lora(case.apply, form="factored"))(
                case.params, case.adapter, *case.arrays
            ).eqns
        ]
        for case in (plain, scaled)
    ]
    assert sorted(primitives[1]) == sorted([*primitives[0], "mul"])


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")], ids=str)
@pytest.mark.parametrize("name", ["times two", "times an argument", "times a column of outputs"])
def test_a_scale_does_not_round_factors_of_another_dtype(name: str, dtypes: tuple[str, str]) -> None:
    case, (w_dtype, factor_dtype) = SCALED[name], dtypes
    params = {"w": normal(4, 5, dtype=w_dtype)}
    arrays = [array.astype(w_dtype) for array in case.arrays]
    assert_law(case.apply, params, adapted(params, {"w": "io"}, dtype=factor_dtype), *arrays, dtype="bfloat16")


def test_a_traced_scale_is_applied_to_the_factors_in_the_wider_dtype() -> None:
    case = Case(lambda w, x, c: x @ (w * c).astype(jnp.float32), (4, 5), [X, ()], "io")
    params = {"w": jnp.zeros((4, 5), jnp.bfloat16)}
    x, c = case.arrays
    got = lj.lora(case.apply)(params, case.adapter, x, c.astype(jnp.bfloat16))
    exact = lj.lora(lambda p, x: x @ p["w"].astype(jnp.float32))(params, case.adapter, x)
    assert_close(got, exact * c.astype(jnp.bfloat16).astype(jnp.float32), FORWARD)


def test_the_gradient_of_a_scale_matches_the_merged_kernel() -> None:
    case = SCALED["times an argument"]
    x, c = case.arrays
    got = jax.grad(lambda c: lj.lora(case.apply)(case.params, case.adapter, x, c).sum())(c)
    merged = lj.merge(case.params, case.adapter)
    assert_close(got, jax.grad(lambda c: case.apply(merged, x, c).sum())(c))


def test_a_leaf_that_scales_a_kernel_is_read() -> None:
    params = {"kernel": normal(4, 5), "scale": normal(5, seed=3), "norm": normal(4, seed=4)}

    def model(params: Any, x: jax.Array) -> jax.Array:
        return (x * params["norm"]) @ (params["kernel"] * params["scale"])

    found = lj.kernels(model, params, normal(*X, seed=1))
    assert {path: kernel.axes for path, kernel in found.items()} == {"kernel": "io", "scale": None, "norm": None}
    assert [(use.kind, use.primitive) for use in found["scale"].uses] == [("opaque", "mul")]
    adapter = adapted(params, {"kernel": "io"}) | lj.init(jax.random.key(0), params, {"{scale,norm}": lj.Full()})
    assert_law(model, params, adapter, normal(*X, seed=1))
    used = {row.path: row.used for row in lj.explain(model, params, adapter, normal(*X, seed=1), form="factored").rows}
    assert used == {"kernel": "factored dot_general ×1", "scale": "whole mul ×1", "norm": "whole mul ×1"}


def test_a_product_of_another_dtype_is_refused() -> None:
    half = jnp.bfloat16(2)
    case = matrix(lambda w, x: x @ lax.mul(w.astype(jnp.bfloat16), half, out_dtype=jnp.float32))
    with pytest.raises(lj.UnsupportedError, match="passes it to `mul`: a product that changes the dtype"):
        lj.lora(case.apply)(case.params, case.adapter, *case.arrays)
