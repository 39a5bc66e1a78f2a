"""Ragged products, and mixtures of experts."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from law import Case, adapted, assert_case, assert_close, assert_law, normal

import lora_jax as lj
from lora_jax import testing


def by_group(w: jax.Array, x: jax.Array, sizes: jax.Array, **options: Any) -> jax.Array:
    return lax.ragged_dot(x, w, sizes, **options)


def general(dot: Any, ragged: int, group: int) -> Any:
    numbers = lax.RaggedDotDimensionNumbers(dot, [ragged], [group])
    return lambda w, x, sizes: lax.ragged_dot_general(x, w, sizes, numbers)


SIZES = [2, 0, 4]
PLAIN = {
    "ragged_dot": Case(by_group, (3, 4, 5), [(6, 4), SIZES], "bio"),
    "rows of no group": Case(by_group, (3, 4, 5), [(9, 4), SIZES], "bio"),
    "in jit in remat": Case(
        lambda w, x, sizes: jax.checkpoint(jax.jit(by_group))(w, x, sizes), (3, 4, 5), [(6, 4), SIZES], "bio"
    ),
    "of a transposed kernel": Case(
        lambda w, x, sizes: by_group(w.transpose(2, 1, 0), x, sizes), (5, 4, 3), [(6, 4), SIZES], "oib"
    ),
    "with the gradient of x": Case(
        lambda w, x, sizes: jax.grad(lambda x: jnp.sum(jnp.sin(by_group(w, x, sizes))))(x),
        (3, 4, 5),
        [(6, 4), SIZES],
        "bio",
    ),
    "by vmap": Case(
        lambda w, x, sizes: jax.vmap(by_group)(w, x, sizes), (2, 3, 4, 5), [(2, 6, 4), [SIZES, [1, 1, 1]]], "bbio"
    ),
    "over layers": Case(
        lambda w, x, sizes: lax.scan(lambda x, w: (jnp.tanh(by_group(w, x, sizes)), None), x, w)[0],
        (2, 3, 4, 4),
        [(6, 4), SIZES],
        "bbio",
    ),
    "groups behind": Case(general((([1], [0]), ([], [])), 0, 2), (4, 5, 3), [(6, 4), SIZES], "iob"),
    "two summed axes": Case(general((([0, 2], [3, 1]), ([], [])), 1, 0), (3, 2, 5, 4), [(4, 6, 2), SIZES], "bioi"),
    "a batch": Case(general((([2], [2]), ([0], [1])), 1, 0), (3, 2, 4, 5), [(2, 6, 4), SIZES], "bbio"),
    "a batch behind": Case(general((([0], [2]), ([2], [1])), 1, 0), (3, 2, 4, 5), [(4, 6, 2), SIZES], "bbio"),
    "a batch with groups per example": Case(
        general((([2], [2]), ([0], [1])), 1, 0), (3, 2, 4, 5), [(2, 6, 4), [SIZES, [1, 1, 1]]], "bbio"
    ),
    "leading rows with groups per row": Case(
        general((([2], [1]), ([], [])), 1, 0), (3, 4, 5), [(2, 6, 4), [SIZES, [1, 1, 1]]], "bio"
    ),
}
OTHERWISE = {
    roles: Case(by_group, (3, 4, 5), [(6, 4), SIZES], "bio", roles) for roles in ("iio", "oio", "boi", "ioi", "ibo")
} | {
    f"{roles}, a batch": Case(general((([2], [2]), ([0], [1])), 1, 0), (3, 2, 4, 5), [(2, 6, 4), SIZES], "bbio", roles)
    for roles in ("biio", "boio", "oboi", "ibbo")
}
CASES = PLAIN | OTHERWISE


@pytest.mark.parametrize("name", CASES)
def test_a_ragged_product_matches_the_merged_kernel(name: str) -> None:
    assert_case(CASES[name])


@pytest.mark.parametrize("name", PLAIN)
def test_kernels_finds_the_role_of_each_axis(name: str) -> None:
    case = PLAIN[name]
    assert lj.kernels(case.apply, case.params, *case.arrays)["w"].axes == case.roles


# JAX also traces the value, which `lora` omits because the gradient does not use it.
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"with the gradient of x"}))
def test_explain_counts_the_flops_of_the_factors(name: str) -> None:
    case = CASES[name]
    total_flops = testing.flops(lj.lora(case.apply, form="factored"), case.params, case.adapter, *case.arrays)
    base = testing.flops(case.apply, case.params, *case.arrays)
    (row,) = lj.explain(case.apply, case.params, case.adapter, *case.arrays).rows
    assert row.flops == total_flops - base


@pytest.mark.parametrize("name", CASES)
def test_no_array_of_the_kernel_s_shape_is_materialized(name: str) -> None:
    case = CASES[name]
    assert case.kernel not in testing.shapes_made(
        lj.lora(case.apply, form="factored"), case.params, case.adapter, *case.arrays
    )


# JAX does not round a float64 product down.
@pytest.mark.parametrize(("preferred", "dtype"), [(None, "bfloat16"), ("float32", "bfloat16"), (None, "float64")])
def test_a_ragged_product_keeps_its_dtype(preferred: Any, dtype: str) -> None:
    case = Case(functools.partial(by_group, preferred_element_type=preferred), (3, 4, 5), [(6, 4), SIZES], "bio")
    with jax.enable_x64(True):
        params, (x, sizes) = {"w": normal(*case.kernel, dtype=dtype)}, case.arrays
        assert_law(case.apply, params, adapted(params, {"w": "bio"}, dtype=dtype), x.astype(dtype), sizes, dtype=dtype)


def test_groups_along_a_contracted_axis_are_refused() -> None:
    # JAX has no derivative for them.
    case = Case(
        lambda w, x, sizes: lax.ragged_dot_general(
            x, w, sizes, lax.RaggedDotDimensionNumbers((([1], [0]), ([], [])), [1], [])
        ),
        (4, 5),
        [(3, 4), [1, 3]],
        "io",
    )
    reason = "passes it to `ragged_dot_general`: a contracted axis or a batch axis is divided into groups"
    with pytest.raises(lj.UnsupportedError, match=reason):
        lj.lora(case.apply)(case.params, case.adapter, *case.arrays)
    got = lj.lora(case.apply, materialize=["w"])(case.params, case.adapter, *case.arrays)
    assert_close(got, case.apply(lj.merge(case.params, case.adapter), *case.arrays))


def test_kernels_follows_group_sizes_that_are_a_leaf() -> None:
    params = {"w": normal(3, 4, 5), "sizes": jnp.array(SIZES)}
    found = lj.kernels(lambda params, x: by_group(params["w"], x, params["sizes"]), params, normal(6, 4))
    assert found["w"].axes == "bio"
    assert [(use.kind, use.primitive) for use in found["sizes"].uses] == [("opaque", "ragged_dot_general")]


# Mixtures of experts

Params = dict[str, jax.Array]
SPEC = {"router": "io", "up": "bio", "down": "bio"}


def router(params: Params, x: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """The two best experts of each token, and their weights."""
    weights, chosen = lax.top_k(jax.nn.softmax(x @ params["router"]), experts)
    return weights / weights.sum(-1, keepdims=True), chosen


def sorted_tokens(params: Params, x: jax.Array) -> jax.Array:
    """Top-two routing without a capacity: tokens sorted by expert, and one ragged product per kernel."""
    weights, chosen = router(params, x, 2)
    order = jnp.argsort(chosen.ravel())
    sizes = jnp.bincount(chosen.ravel(), length=params["up"].shape[0])
    rows = jnp.take(x, order // 2, axis=0)
    rows = lax.ragged_dot(jax.nn.gelu(lax.ragged_dot(rows, params["up"], sizes)), params["down"], sizes)
    back = jnp.zeros_like(rows).at[order].set(rows).reshape(len(x), 2, -1)
    return x + jnp.einsum("tkd,tk->td", back, weights)


def dispatched(params: Params, x: jax.Array) -> jax.Array:
    """Top-two routing with a capacity: einsums with a dispatch table."""
    weights, chosen = router(params, x, 2)
    hot = jax.nn.one_hot(chosen, params["up"].shape[0])
    place = jnp.cumsum(hot.reshape(-1, hot.shape[-1]), 0).reshape(hot.shape) * hot - 1
    table = jax.nn.one_hot(place.astype(int), 5) * hot[..., None]
    dispatch, combine = table.sum(1), jnp.einsum("tkec,tk->tec", table, weights)
    hidden = jax.nn.gelu(jnp.einsum("ecd,edf->ecf", jnp.einsum("tec,td->ecd", dispatch, x), params["up"]))
    return x + jnp.einsum("tec,ecd->td", combine, jnp.einsum("ecf,efd->ecd", hidden, params["down"]))


def expert(up: jax.Array, down: jax.Array, x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x @ up) @ down


def by_vmap(params: Params, x: jax.Array) -> jax.Array:
    """Every expert on every token."""
    gates = jax.nn.softmax(x @ params["router"])
    return jnp.einsum("etd,te->td", jax.vmap(expert, (0, 0, None))(params["up"], params["down"], x), gates)


def by_scan(params: Params, x: jax.Array) -> jax.Array:
    """A scan over experts."""
    gates = jax.nn.softmax(x @ params["router"])

    def add(y: jax.Array, one: Any) -> tuple[jax.Array, None]:
        up, down, gate = one
        return y + gate[:, None] * expert(up, down, x), None

    return lax.scan(add, jnp.zeros_like(x), (params["up"], params["down"], gates.T))[0]


def by_loop(params: Params, x: jax.Array) -> jax.Array:
    """A loop over experts, by index."""
    gates = jax.nn.softmax(x @ params["router"])

    def add(number: jax.Array, y: jax.Array) -> jax.Array:
        return y + gates[:, number, None] * expert(params["up"][number], params["down"][number], x)

    return lax.fori_loop(0, 3, add, jnp.zeros_like(x))


MIXTURES = {make.__name__: make for make in (sorted_tokens, dispatched, by_vmap, by_scan, by_loop)}
# An axis of experts that all read the same tokens is traced as an output.
TRACED = {"by_vmap": SPEC | {"up": "oio"}}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_experts_matches_merged_kernels(name: str) -> None:
    mixture = MIXTURES[name]
    params = {"router": normal(4, 3), "up": normal(3, 4, 7, seed=1), "down": normal(3, 7, 4, seed=2)}
    x = normal(6, 4, seed=3)
    found = lj.kernels(mixture, params, x)
    assert {path: found[path].axes for path in SPEC} == TRACED.get(name, SPEC)
    assert_law(mixture, params, adapted(params, SPEC), x)
    assert not {(3, 4, 7), (3, 7, 4)} & testing.shapes_made(
        lj.lora(mixture, form="factored"), params, adapted(params, SPEC), x
    )


def test_a_linen_mixture_of_experts_matches_merged_kernels() -> None:
    class Mixture(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            experts = nn.vmap(
                nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3
            )
            gates = nn.softmax(nn.Dense(3, name="router")(x))
            return jnp.einsum("etd,te->td", experts(5, name="experts")(x), gates)

    x = normal(6, 4, seed=3)
    shapes = jax.eval_shape(Mixture().init, jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape, seed=2), shapes)
    axes = {"params/router/kernel": "io", "params/experts/kernel": "bio"}
    assert_law(Mixture().apply, params, adapted(params, axes), x)


@pytest.mark.parametrize("axes", ["bio", "oio", "iio"])
@pytest.mark.parametrize("sizes", [[2, 0, 2], [[2, 0, 2], [1, 1, 0]]], ids=["one", "per example"])
def test_rows_of_no_group_may_be_anything(sizes: Any, axes: str) -> None:
    sizes = jnp.array(sizes)
    params, x = {"w": normal(3, 4, 5)}, normal(*sizes.shape[:-1], 6, 4, seed=1)
    inside = (jnp.arange(6) < sizes.sum(-1, keepdims=True))[..., None]
    adapter = adapted(params, {"w": axes})
    numbers = lax.RaggedDotDimensionNumbers((([x.ndim - 1], [1]), ([], [])), [x.ndim - 2], [0])

    def gradient(x: jax.Array) -> Any:
        model = lj.lora(lambda params, x: lax.ragged_dot_general(x, params["w"], sizes, numbers))
        return jax.grad(lambda adapter, x: jnp.sum(jnp.sin(model(params, adapter, x))), (0, 1))(adapter, x)

    assert_close(gradient(jnp.where(inside, x, jnp.nan)), gradient(jnp.where(inside, x, 0)))
