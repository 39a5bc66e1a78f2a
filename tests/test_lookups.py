"""Lookups, against merged kernels: rows of embeddings become arrays; selected experts and layers stay kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from law import Case, adapted, assert_case, assert_close, assert_law, normal

import lora_jax as lj
from lora_jax.testing import shapes_made


def take(mode: str | None, axis: int = 0, **options: Any) -> Callable[..., Any]:
    return lambda w, ids: jnp.take(w, ids, axis=axis, mode=mode, **options)


INSIDE, OUTSIDE = [[0, 3], [-1, 2]], [[0, 9], [-1, -8]]
LOOKUPS = {
    "a list of ids": Case(lambda w, ids: w[ids], (6, 5), [[0, 5, 2]], "io"),
    "a table of ids": Case(lambda w, ids: w[ids], (6, 5), [INSIDE], "io"),
    "one id": Case(lambda w, i: jnp.tanh(w[i]), (6, 5), [3], None, "io"),
    "one negative id": Case(lambda w, i: jnp.tanh(w[i]), (6, 5), [-2], None, "io"),
    "one id, out of range": Case(lambda w, i: jnp.tanh(w[i]), (6, 5), [-9], None, "io"),
    "a constant id": Case(lambda w, x: w[2] + x, (6, 5), [(5,)], None, "io"),
    "one id of an example, by vmap": Case(lambda w, ids: jax.vmap(lambda i: w[i])(ids), (6, 5), [[0, -2, 9]], "io"),
    "one id of an example, results in columns": Case(
        lambda w, ids: jax.vmap(lambda i: w[i], out_axes=1)(ids), (6, 5), [[0, -2, 9]], "io"
    ),
    "a column of an example, by vmap": Case(
        lambda w, ids: jax.vmap(lambda i: w[:, i])(ids), (6, 5), [[0, -2, 9]], "oi"
    ),
    "two ids of an example, by vmap": Case(
        lambda w, ids: jax.vmap(lambda ij: w[ij[0], ij[1]])(ids), (3, 6, 5), [[[0, 5], [2, 1]]], "iio"
    ),
    "take": Case(take(None), (6, 5), [INSIDE], "io"),
    "take of one id": Case(take(None), (6, 5), [3], "io"),
    "take, clipped": Case(take("clip"), (6, 5), [OUTSIDE], "io"),
    "take, wrapped": Case(take("wrap"), (6, 5), [OUTSIDE], "io"),
    "take, filled": Case(take("fill", fill_value=7.0), (6, 5), [OUTSIDE], "io"),
    "take, filled with NaN": Case(lambda w, ids: jnp.nan_to_num(jnp.take(w, ids, axis=0)), (6, 5), [OUTSIDE], "io"),
    "take, NaN masked after an operation": Case(
        lambda w, ids: jnp.where(jnp.isin(ids, jnp.arange(6))[..., None], jnp.tanh(jnp.take(w, ids, axis=0)), 0),
        (6, 5),
        [[[0, 9], [5, -8]]],
        "io",
    ),
    "take of sorted and different ids": Case(
        take("clip", indices_are_sorted=True, unique_indices=True), (6, 5), [[0, 2, 5]], "io"
    ),
    "take along the other axis": Case(take("clip", axis=1), (6, 5), [INSIDE], "oi", "io"),
    "columns": Case(lambda w, ids: w[:, ids], (6, 5), [INSIDE], "oi"),
    "along the middle axis": Case(lambda w, ids: w[:, ids], (3, 6, 5), [INSIDE], "oio"),
    "two input axes": Case(lambda w, i, j: w[i, j], (3, 6, 5), [[0, 2, 1], [5, 0, 0]], "iio"),
    "two input axes, not adjacent": Case(lambda w, i, j: w[i, :, j], (3, 5, 6), [[0, 2, 1], [5, 0, 0]], "ioi"),
    "rows of every layer": Case(lambda w, ids: w[:, ids], (2, 6, 5), [INSIDE], "oio", "bio"),
    "at, get": Case(lambda w, ids: w.at[ids].get(mode="fill", fill_value=0), (6, 5), [OUTSIDE], "io"),
    "at, get, promised": Case(lambda w, ids: w.at[ids].get(mode="promise_in_bounds"), (6, 5), [[0, 5]], "io"),
    "rows and columns": Case(lambda w, i, j: w[i, j], (4, 5), [[0, 3, 1], [4, 0, 0]], None, "io"),
    "every row with every column": Case(lambda w, i, j: w[jnp.ix_(i, j)], (4, 5), [[0, 3, 1], [4, 0]], None, "io"),
    "a row per column": Case(lambda w, ids: jnp.take_along_axis(w, ids, 0), (4, 3), [[[0, 3, 1], [2, -1, 2]]], "io"),
    "a column per row": Case(
        lambda w, ids: jnp.take_along_axis(w, ids, 1, mode="clip"), (3, 4), [[[0], [3], [9]]], "oi", "io"
    ),
    "parts of rows, by vmap": Case(
        lambda w, ids: jax.vmap(lambda i: lax.dynamic_slice(w, (i, 1), (1, 2))[0])(ids), (6, 5), [[0, 5, 9]], None, "io"
    ),
    "part of each row": Case(lambda w, ids: w[ids, 1:3], (6, 5), [INSIDE], None, "io"),
    "every second of each row": Case(lambda w, ids: w[ids, ::2], (6, 5), [INSIDE], None, "io"),
    "rows of every layer, by vmap": Case(
        lambda w, ids: jax.vmap(lambda w, ids: w[ids])(w, ids), (2, 6, 5), [[[0, 3], [1, -1]]], "bio"
    ),
    "a row of every layer, by vmap": Case(
        lambda w, ids: jax.vmap(lambda w, i: w[i])(w, ids), (2, 6, 5), [[0, 3]], "bio"
    ),
    "by a vmap along axes that the factor has in another order": Case(
        lambda w, ids: jax.vmap(jax.vmap(lambda w, ids: w[ids]))(w, ids),
        (3, 2, 4, 2),
        [[[[0, 3], [1, -1]], [[0, 0], [2, 1]], [[1, 1], [3, 0]]]],
        "bbio",
        "oboi",
    ),
    "the same row of every layer": Case(lambda w, i: jnp.tanh(w[:, i]), (2, 6, 5), [3], None, "bio"),
    "one row per layer index": Case(lambda w, i, j: w[i, j], (2, 6, 5), [[0, 1, 1], [5, 0, 0]], "iio", "bio"),
    "rows of heads": Case(lambda w, ids: jnp.tanh(w[ids]), (6, 2, 3), [INSIDE], "ioo"),
    "of rows of two leaves": Case(lambda w, ids: jnp.tanh(w[0][ids]) * w[1][ids], (2, 6, 5), [INSIDE], "bio"),
    "tied": Case(lambda w, ids: jnp.tanh(w[ids]) @ w.T, (6, 5), [INSIDE], "io"),
    "one hot": Case(lambda w, ids: jax.nn.one_hot(ids, 6) @ w, (6, 5), [OUTSIDE], "io"),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_lookup_matches_the_merged_kernel(name: str) -> None:
    assert_case(LOOKUPS[name])


def tokens(w: jax.Array, x: jax.Array) -> jax.Array:
    """A kernel for each token."""
    return jnp.einsum("td,tdf->tf", x, w)


X, EXPERT = (3, 4), [0, 2, 2]
PICKED = {
    "an expert per token": Case(lambda w, x, ids: tokens(w[ids], x), (6, 4, 5), [X, EXPERT], "bio"),
    "an expert per token, by take": Case(
        lambda w, x, ids: tokens(jnp.take(w, ids, axis=0), x), (6, 4, 5), [X, EXPERT], "bio"
    ),
    "clipped": Case(
        lambda w, x, ids: tokens(jnp.take(w, ids, axis=0, mode="clip"), x), (6, 4, 5), [X, [0, 9, -7]], "bio"
    ),
    "wrapped": Case(
        lambda w, x, ids: tokens(jnp.take(w, ids, axis=0, mode="wrap"), x), (6, 4, 5), [X, [0, 7, -7]], "bio"
    ),
    "filled": Case(
        lambda w, x, ids: tokens(jnp.take(w, ids, axis=0, fill_value=2.0), x), (6, 4, 5), [X, [0, 7, -7]], "bio"
    ),
    "two experts per token": Case(
        lambda w, x, ids: jnp.einsum("td,tkdf->tkf", x, w[ids]), (3, 4, 5), [X, [[0, 1], [2, 2], [1, 0]]], "bio"
    ),
    "an expert per token, by vmap": Case(
        lambda w, x, ids: jax.vmap(lambda x, i: x @ w[i])(x, ids), (6, 4, 5), [X, EXPERT], "bio"
    ),
    "an expert per token, by dynamic_index_in_dim": Case(
        lambda w, x, ids: jax.vmap(lambda x, i: x @ lax.dynamic_index_in_dim(w, i, 1, keepdims=False))(x, ids),
        (4, 3, 5),
        [X, EXPERT],
        "ibo",
    ),
    "by take_along_axis": Case(
        lambda w, x, ids: tokens(jnp.take_along_axis(w, ids[:, None, None], 0), x), (6, 4, 5), [X, EXPERT], "bio"
    ),
    "experts along the last axis": Case(
        lambda w, x, ids: jnp.einsum("td,dft->tf", x, w[..., ids]), (4, 5, 3), [X, EXPERT], "iob"
    ),
    "part of the output": Case(lambda w, x, ids: tokens(w[ids, :, 2:5], x), (6, 4, 5), [X, EXPERT], "bio"),
    "part of the input": Case(lambda w, x, ids: tokens(w[ids, 1:5], x), (3, 6, 5), [X, EXPERT], "bio"),
    "every second of the output": Case(
        lambda w, x, ids: tokens(w[ids, :, ::2], x), (6, 4, 5), [X, EXPERT], "ioi", "bio"
    ),
    "of every layer": Case(
        lambda w, x, ids: lax.scan(lambda x, w: (jnp.tanh(tokens(w[ids], x)), None), x, w)[0],
        (2, 3, 4, 4),
        [X, EXPERT],
        "bbio",
    ),
    "of every layer, by vmap": Case(
        lambda w, x, ids: jax.vmap(lambda w: tokens(w[ids], x))(w), (2, 3, 4, 5), [X, EXPERT], "obio", "bbio"
    ),
    "of every layer, by vmap of both": Case(
        lambda w, x, ids: jax.vmap(lambda w, ids: tokens(w[ids], x))(w, ids),
        (2, 3, 4, 5),
        [X, [EXPERT, [1, 1, 0]]],
        "obio",
        "bbio",
    ),
    "layers in another order": Case(
        lambda w, x, ids: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w[ids])[0], (3, 4, 4), [X, EXPERT], "bio"
    ),
    "heads": Case(lambda w, x, ids: jnp.einsum("td,dhk->thk", x, w[:, ids]), (4, 5, 2), [X, EXPERT], "ibo", "ioo"),
    "heads of the input": Case(
        lambda w, x, ids: jnp.einsum("thk,hkd->td", x, w[ids]), (5, 2, 4), [(3, 3, 2), EXPERT], "bio", "iio"
    ),
    "windows of the input, by vmap": Case(
        lambda w, x, ids: jax.vmap(lambda x, i: x[:2] @ lax.dynamic_slice_in_dim(w, i, 2))(x, ids),
        (6, 5),
        [X, [0, 5, 9]],
        "io",
    ),
    "windows of the output, by vmap": Case(
        lambda w, x, ids: jax.vmap(lambda x, i: x @ lax.dynamic_slice_in_dim(w, i, 2, 1))(x, ids),
        (4, 7),
        [X, [0, 5, 9]],
        "io",
    ),
    "a layer by a traced index": Case(lambda w, x, i: x @ w[i], (3, 4, 5), [X, 2], "bio"),
    "a layer by a traced index, in the middle": Case(lambda w, x, i: x @ w[:, i], (4, 3, 5), [X, 2], "ibo"),
    "a layer by a traced index, behind an ellipsis": Case(lambda w, x, i: x @ w[..., i, :], (4, 3, 5), [X, -1], "ibo"),
    "a layer by a traced index, and a part of it": Case(lambda w, x, i: x @ w[i, :, 2:5], (3, 4, 6), [X, 1], "bio"),
    "a layer by a constant, and a part of it": Case(lambda w, x: x @ w[1, :, 1:3], (3, 4, 6), [X], "bio"),
    "a layer of a layer": Case(lambda w, x, i: x @ w[i, 1], (3, 2, 4, 5), [X, 1], "bbio"),
    "a third of a fused kernel": Case(lambda w, x: [x @ w[:, at : at + 2] for at in (0, 2, 4)], (4, 6), [X], "io"),
    "a third by a traced index": Case(
        lambda w, x, i: x @ lax.dynamic_slice_in_dim(w, 2 * i, 2, axis=1), (4, 6), [X, 1], "io"
    ),
    "a third by a traced index, by reshape": Case(lambda w, x, i: x @ w.reshape(4, 3, 2)[:, i], (4, 6), [X, 1], "io"),
}
EVERY = LOOKUPS | PICKED


@pytest.mark.parametrize("name", PICKED)
def test_selected_kernels_match_the_merged_kernel(name: str) -> None:
    assert_case(PICKED[name])


@pytest.mark.parametrize("name", EVERY)
def test_kernels_finds_the_role_of_each_axis(name: str) -> None:
    case = EVERY[name]
    assert lj.kernels(case.apply, case.params, *case.arrays)["w"].axes == case.roles


@pytest.mark.parametrize("name", ["an expert per token", "clipped", "filled", "part of the output", "heads"])
def test_selected_kernels_are_not_materialized(name: str) -> None:
    case = PICKED[name]
    x, ids = case.arrays
    jaxpr = jax.make_jaxpr(lj.lora(case.apply))(case.params, case.adapter, x, ids)
    selected = jax.eval_shape(lambda w: w[ids, :, 2:5] if name.startswith("part") else w[ids], case.params["w"]).shape
    selected = (4, 3, 2) if name == "heads" else selected
    primitives = [eqn.primitive.name for eqn in jaxpr.eqns if selected in {var.aval.shape for var in eqn.outvars}]
    assert set(primitives) <= {"gather", "jit"}
    assert case.kernel not in shapes_made(
        jax.grad(lambda ad: lj.lora(case.apply)(case.params, ad, x, ids).sum()), case.adapter
    )


@pytest.mark.parametrize(
    "name", ["a table of ids", "take, filled", "columns", "rows and columns", "one id of an example, by vmap"]
)
def test_a_lookup_works_outside_jit(name: str) -> None:
    case = LOOKUPS[name]
    got = lj.lora(case.apply)(case.params, case.adapter, *case.arrays)
    assert_close(got, case.apply(lj.merge(case.params, case.adapter), *case.arrays))


@pytest.mark.parametrize("name", ["an expert per token", "filled", "a layer by a traced index", "heads"])
def test_selecting_kernels_works_outside_jit_and_under_vmap(name: str) -> None:
    case = PICKED[name]
    x, ids = case.arrays
    run = lambda x: lj.lora(case.apply)(case.params, case.adapter, x, ids)  # noqa: E731
    expected = case.apply(lj.merge(case.params, case.adapter), x, ids)
    assert_close(run(x), expected)
    assert_close(jax.vmap(run)(x[None])[0], expected)


def test_explain_shows_the_product_of_a_selected_kernel() -> None:
    case = PICKED["an expert per token"]
    row = lj.explain(case.apply, case.params, case.adapter, *case.arrays).rows[0]
    assert row.used == "factored dot_general ×1"
    (use,) = lj.kernels(case.apply, case.params, *case.arrays)["w"].uses
    assert (use.kind, use.primitive) == ("factored", "dot_general")


def test_explain_shows_the_lookup_in_a_table_of_three_axes() -> None:
    case = LOOKUPS["rows of heads"]
    row = lj.explain(case.apply, case.params, case.adapter, *case.arrays).rows[0]
    assert row.used == "factored gather ×1"
    (use,) = lj.kernels(case.apply, case.params, *case.arrays)["w"].uses
    assert (use.kind, use.primitive) == ("factored", "gather")


def test_concatenated_rows_of_two_tables_are_uses_of_both() -> None:
    params = {"one": normal(6, 2, 3), "two": normal(4, 2, 3), "frozen": normal(2, 2, 3)}
    ids = jnp.array([0, 2])

    def read(*parts: Callable[[Any], jax.Array]) -> dict[str, list[str]]:
        found = lj.kernels(lambda params: jnp.tanh(jnp.concatenate([part(params) for part in parts])), params)
        return {path: [use.primitive for use in kernel.uses] for path, kernel in found.items() if kernel.uses}

    one, two, frozen = lambda p: p["one"][ids], lambda p: p["two"][ids], lambda p: p["frozen"]
    assert read(one, two) == {"one": ["gather"], "two": ["gather"]}
    assert read(one, frozen) == {"one": ["tanh"], "frozen": ["tanh"]}


@pytest.mark.parametrize("vocabulary", [1, 7])
def test_an_embedding_of_linen_may_have_one_row(vocabulary: int) -> None:
    module = nn.Embed(vocabulary, 6)
    case = Case(
        lambda w, ids: jnp.tanh(module.apply({"params": {"embedding": w}}, ids)), (vocabulary, 6), [[[0, 0]]], "io"
    )
    if vocabulary > 1:
        assert_case(case)


def test_a_constant_or_integer_leaf_may_be_the_index() -> None:
    params: Any = {"w": Case(lambda w: w, (6, 5), [], "io").params["w"], "ids": jnp.array([0, 5, 2])}
    model = lambda params: jnp.tanh(params["w"][params["ids"]])  # noqa: E731
    found = lj.kernels(model, params)
    assert found["w"].axes == "io"
    assert {use.kind for use in found["ids"].uses} == {"opaque"}


class Lookup:
    """Any `gather` of a kernel, and a contraction of the result."""

    def __init__(self, draw: Any) -> None:
        rest = st.lists(st.sampled_from("bio"), max_size=2)
        self.roles = "".join(draw(rest.flatmap(lambda roles: st.permutations(["i", "o", *roles]))))
        self.kernel = [draw(st.integers(1, 4)) for _ in self.roles]
        axes = range(len(self.roles))
        kinds = [draw(st.sampled_from(["collapsed", "batching", "window", "full", "indexed full"])) for _ in axes]
        if "collapsed" not in kinds:
            kinds[draw(st.sampled_from(axes))] = "collapsed"
        batching = [axis for axis in axes if kinds[axis] == "batching"]
        free = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(0, 2)))]
        index_axes = draw(st.permutations([*batching, *(-1 - number for number in range(len(free)))]))
        index_shape = [self.kernel[axis] if axis >= 0 else free[-1 - axis] for axis in index_axes]
        selected = draw(
            st.permutations([axis for axis in axes if kinds[axis] in ("collapsed", "window", "indexed full")])
        )
        self.sizes = [
            size if "full" in kind else draw(st.integers(1, size)) if kind == "window" else 1
            for size, kind in zip(self.kernel, kinds, strict=True)
        ]
        kept = [axis for axis in axes if kinds[axis] in ("window", "full", "indexed full")]
        ndim = len(index_shape) + len(kept)
        offsets = sorted(draw(st.permutations(range(ndim)))[: len(kept)])
        self.numbers = lax.GatherDimensionNumbers(
            offset_dims=tuple(offsets),
            collapsed_slice_dims=tuple(axis for axis in axes if kinds[axis] == "collapsed"),
            start_index_map=tuple(selected),
            operand_batching_dims=tuple(batching),
            start_indices_batching_dims=tuple(index_axes.index(axis) for axis in batching),
        )
        count = math.prod(index_shape) * len(selected)
        self.mode = draw(st.sampled_from(["clip", "fill"]))
        self.ids = np.reshape([draw(st.integers(-2, 5)) for _ in range(count)], [*index_shape, len(selected)])
        kept_sizes, index_sizes = iter([self.sizes[axis] for axis in kept]), iter(index_shape)
        self.x = [next(kept_sizes) if axis in offsets else next(index_sizes) for axis in range(ndim)]
        self.summed = sorted(draw(st.sets(st.sampled_from(range(ndim))))) if ndim else []
        # A filled part of a sum, or of a kernel that is contracted, would make every gradient NaN.
        contracted = self.summed or {"i", "o"} <= {self.roles[axis] for axis in kept}
        self.masked = not contracted and draw(st.booleans())

    def __repr__(self) -> str:
        return f"LookUp({vars(self)})"

    def apply(self, params: Any, ids: jax.Array, x: jax.Array) -> jax.Array:
        fill = np.nan if self.masked else 2.0
        rows = lax.gather(params["w"], ids, self.numbers, self.sizes, mode=self.mode, fill_value=fill)
        y = lax.dot_general(x, rows, ((range(len(self.summed)), self.summed), ((), ())))
        # Where something is filled, the gradient is NaN before the lookup.
        return jnp.where(jnp.isnan(y), 0, jnp.tanh(y)) if self.masked else y


@settings(max_examples=40)
@given(st.composite(Lookup)())
def test_any_lookup_matches_the_merged_kernel(case: Lookup) -> None:
    with jax.enable_x64(True):
        params = {"w": normal(*case.kernel, dtype="float64")}
        adapter = adapted(params, {"w": case.roles}, rank=1, dtype="float64")
        x = normal(*(case.x[axis] for axis in case.summed), seed=1, dtype="float64")
        assert_law(case.apply, params, adapter, jnp.asarray(case.ids, jnp.int32), x, dtype="float64")
