"""Combining adapters, and interpolating to the base, against NumPy on materialized updates, in float64."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluate import without_compiling
from helpers import bits
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from law import normal

import lora_jax as lj
from lora_jax import many, testing

SHAPES = {"io": (6, 5), "ioo": (6, 2, 3), "iio": (2, 3, 7), "iiio": (2, 2, 3, 8), "bio": (3, 6, 5), "ibo": (6, 3, 5)}
VARIANTS: dict[str, Callable[[int, float], Any]] = {
    "LoRA": lambda rank, alpha: lj.LoRA(rank=rank, alpha=alpha),
    "rsLoRA": lambda rank, alpha: lj.RSLoRA(rank=rank, alpha=alpha),
    "AdaLoRA": lambda rank, alpha: lj.AdaLoRA(rank=rank, alpha=alpha),
}
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def drawn(variant: Any, shape: tuple[int, ...], axes: str, seed: int, dtype: Any = np.float64) -> Any:
    """A leaf with random arrays."""
    arrays = {
        name: np.asarray(normal(*size, seed=31 * seed + at, size=0.5), dtype)
        for at, (name, size) in enumerate(sorted(variant.shapes(shape, axes).items()))
    }
    return lj.Adapter(variant, axes, **arrays)


def low_rank(axes: str, *, ranks: tuple[int, ...] = (2, 3, 1), dtype: Any = np.float64) -> list[Any]:
    """An adapter of each variant with factors, of a kernel `w`."""
    made = [make(rank, 3 + at) for at, (make, rank) in enumerate(zip(VARIANTS.values(), ranks, strict=True))]
    return [{"w": drawn(variant, SHAPES[axes], axes, at, dtype)} for at, variant in enumerate(made)]


def update(adapter: Any, axes: str) -> np.ndarray:
    """The change of the kernel, materialized in float64."""
    zeros = {"w": np.zeros(SHAPES[axes])}
    return np.asarray(without_compiling(lj.merge)(zeros, adapter)["w"])


def layers(kernel: np.ndarray, axes: str) -> np.ndarray:
    """The kernel as (batch, in, out)."""
    order = [axis for role in "bio" for axis, letter in enumerate(axes) if letter == role]
    inputs, outputs = (
        int(np.prod([kernel.shape[axis] for axis, letter in enumerate(axes) if letter == role])) for role in "io"
    )
    return kernel.transpose(order).reshape(-1, inputs, outputs)


def weighted(adapters: list[Any], weights: Any) -> dict[str, tuple[Any, Any]]:
    return {f"ad{at}": (adapter, weight) for at, (adapter, weight) in enumerate(zip(adapters, weights, strict=True))}


# The exact sum


@pytest.mark.parametrize("axes", SHAPES)
def test_concatenation_is_the_weighted_sum_of_the_updates(axes: str) -> None:
    adapters, weights = low_rank(axes), (1, -0.5, 0.3)
    both = many.combine(weighted([*adapters, {}], (*weights, 7)), "concat")
    expected = sum(weight * update(adapter, axes) for adapter, weight in zip(adapters, weights, strict=True))
    np.testing.assert_allclose(update(both, axes), expected, **TOLERANCE)
    assert both["w"].variant == lj.LoRA(rank=6, alpha=6) and both["w"].axes == axes


def test_the_scale_of_rslora_is_not_applied_twice() -> None:
    # With ones, s·A·B = (α/√r)·r = 2·4; PEFT 0.21 returns an adapter whose scale is √r times that of the sum.
    part = lj.Adapter(lj.RSLoRA(rank=4, alpha=4), "io", a=jnp.ones((6, 4)), b=jnp.ones((4, 5)))
    for how in ("concat", "linear", many.Truncate(rank=4), many.Ties(density=1)):
        both = many.combine({"one": ({"w": part}, 1)}, how)
        np.testing.assert_allclose(update(both, "io"), np.full((6, 5), 8.0), rtol=1e-12)


def random_case(seed: int) -> tuple[dict[str, Any], str, np.ndarray]:
    """Up to four adapters of random variants, ranks, scales and weights, and the sum of their updates."""
    choose = random.Random(seed)
    axes = choose.choice(list(SHAPES))
    adapters, total = {}, np.zeros(SHAPES[axes])
    for at in range(choose.randint(1, 4)):
        variant = choose.choice(list(VARIANTS.values()))(choose.randint(1, 3), choose.choice([4, 0.7, -2, 0]))
        adapter = {"w": drawn(variant, SHAPES[axes], axes, choose.randint(0, 99))}
        weight = choose.choice([1, -1, 0.25, -3.5, 0])
        adapters[f"ad{at}"] = adapter, weight
        total += weight * update(adapter, axes)
    return adapters, axes, total


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.sweep) for seed in range(6, 80))])
def test_any_sum_is_exact_and_its_truncation_the_best(seed: int) -> None:
    adapters, axes, total = random_case(seed)
    np.testing.assert_allclose(update(many.combine(adapters, "concat"), axes), total, **TOLERANCE)
    for rank in (1, 9):
        found = layers(update(many.combine(adapters, many.Truncate(rank=rank)), axes), axes)
        u, s, vt = np.linalg.svd(layers(total, axes), full_matrices=False)
        np.testing.assert_allclose(found, (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :], atol=1e-9)


@pytest.mark.parametrize("how", ["concat", "linear", many.Truncate(rank=5)], ids=str)
def test_combining_is_associative(how: Any) -> None:
    ranks = (2, 2, 2) if how == "linear" else (2, 3, 1)
    one, two, three = low_rank("io", ranks=ranks)
    first = many.combine({"one": (one, 2), "two": (two, -1)}, how)
    in_steps = many.combine({"first": (first, 1), "three": (three, 0.5)}, how)
    second = many.combine({"two": (two, -1), "three": (three, 0.5)}, how)
    other_steps = many.combine({"one": (one, 2), "second": (second, 1)}, how)
    at_once = many.combine(weighted([one, two, three], (2, -1, 0.5)), how)
    for found in (in_steps, other_steps):
        np.testing.assert_allclose(update(found, "io"), update(at_once, "io"), **TOLERANCE)


def test_a_difference_removes_what_a_sum_added() -> None:
    one, two, _ = low_rank("bio")
    both = many.combine({"one": (one, 1), "two": (two, 1)}, "concat")
    left = many.combine({"both": (both, 1), "two": (two, -1)}, many.Truncate(rank=2))
    np.testing.assert_allclose(update(left, "bio"), update(one, "bio"), **TOLERANCE)


def test_the_energy_decides_the_rank() -> None:
    values = np.diag([4.0, 3.0, 2.0, 1.0])
    part = lj.Adapter(lj.LoRA(rank=4, alpha=4), "io", a=np.eye(6, 4), b=values @ np.eye(4, 5))
    squares = np.array([16, 9, 4, 1]) / 30
    for rank in (1, 2, 3):
        energies = squares[: rank - 1].sum() + 0.01, squares[:rank].sum() - 0.01
        for energy in energies:
            found = many.combine({"one": ({"w": part}, 1)}, many.Truncate(energy=energy))["w"]
            assert found.variant == lj.LoRA(rank=rank, alpha=rank), energy


def test_truncation_materializes_nothing_of_the_shape_of_the_kernel() -> None:
    adapters = [{"w": drawn(lj.LoRA(rank=2, alpha=3), (40, 30), "io", seed)} for seed in range(3)]
    for how in ("concat", "linear", many.Truncate(rank=2), many.Ties(density=0.5, on="factors")):
        made = testing.shapes_made(lambda ads, how=how: many.combine(weighted(ads, (1, 2, 3)), how), adapters)
        assert (40, 30) not in made and (30, 40) not in made
    dense = many.Ties(density=0.5, rank=2)
    assert (40, 30) in testing.shapes_made(lambda ads: many.combine(weighted(ads, (1, 2, 3)), dense), adapters)


# Methods that are not sums


def test_linear_is_the_sum_with_its_cross_terms() -> None:
    one, two = (drawn(lj.LoRA(rank=2, alpha=alpha), (6, 5), "io", alpha) for alpha in (3, 5))
    found = many.combine({"one": ({"w": one}, 1), "two": ({"w": two}, -0.5)}, "linear")
    c_one, c_two = 1.5, -0.5 * 2.5
    cross = np.sqrt(-c_one * c_two) * (one.a @ two.b - two.a @ one.b)
    expected = c_one * one.a @ one.b + c_two * two.a @ two.b + cross
    np.testing.assert_allclose(update(found, "io"), expected, **TOLERANCE)
    assert found["w"].variant == lj.LoRA(rank=2, alpha=2)


def pruned(x: np.ndarray, density: float) -> np.ndarray:
    """The largest magnitudes of each layer, (batch, …)."""
    found = np.zeros_like(x)
    for layer, out in zip(x, found, strict=True):
        kept = np.argsort(-np.abs(layer), axis=None)[: max(1, int(density * layer.size))]
        out.flat[kept] = layer.flat[kept]
    return found


def ties(arrays: list[np.ndarray], weights: Any, sign: str) -> np.ndarray:
    """TIES, element by element."""
    out = np.zeros_like(arrays[0])
    for at in np.ndindex(*out.shape):
        values = [np.sign(weight) * x[at] for x, weight in zip(arrays, weights, strict=True)]
        votes = sum(np.sign(values)) if sign == "frequency" else sum(values)
        agree = [
            abs(weight) * value
            for value, weight in zip(values, weights, strict=True)
            if value and (value > 0) == (votes >= 0)
        ]
        out[at] = sum(agree) / max(len(agree), 1)
    return out


METHODS: dict[str, Any] = {
    "prune": (many.Prune(density=0.4), lambda xs, ws: sum(w * pruned(x, 0.4) for x, w in zip(xs, ws, strict=True))),
    "ties": (many.Ties(density=0.4), lambda xs, ws: ties([pruned(x, 0.4) for x in xs], ws, "total")),
    "ties by count": (
        many.Ties(density=0.7, sign="frequency"),
        lambda xs, ws: ties([pruned(x, 0.7) for x in xs], ws, "frequency"),
    ),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("axes", ["io", "bio"])
def test_methods_on_the_updates_match_numpy(name: str, axes: str) -> None:
    how, oracle = METHODS[name]
    adapters, weights = low_rank(axes), (1, -0.5, 0.3)
    found = many.combine(weighted(adapters, weights), dataclasses.replace(how, rank=5))  # of full rank
    expected = oracle([layers(update(adapter, axes), axes) for adapter in adapters], weights)
    np.testing.assert_allclose(layers(update(found, axes), axes), expected, **TOLERANCE)
    smaller = many.combine(weighted(adapters, weights), how)
    assert smaller["w"].variant.rank == 3  # the largest of the adapters
    u, s, vt = np.linalg.svd(expected, full_matrices=False)
    truncated = (u[..., :3] * s[..., None, :3]) @ vt[..., :3, :]
    np.testing.assert_allclose(layers(update(smaller, axes), axes), truncated, **TOLERANCE)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("axes", ["ioo", "bio"])
def test_methods_on_the_factors_match_numpy(name: str, axes: str) -> None:
    how, oracle = METHODS[name]
    variants = [lj.LoRA(rank=2, alpha=3), lj.RSLoRA(rank=2, alpha=-1)]
    parts = [drawn(variant, SHAPES[axes], axes, at) for at, variant in enumerate(variants)]
    found = many.combine(weighted([{"w": part} for part in parts], (2, 0.5)), dataclasses.replace(how, on="factors"))[
        "w"
    ]
    scales = np.array([2 * variants[0].scale, 0.5 * variants[1].scale])
    batch = axes.count("b")
    for factor, signs in (("a", np.sign(scales)), ("b", np.ones(2))):
        arrays = [part.arrays[factor] for part in parts]
        stacks = [x.reshape(-1 if batch else 1, *x.shape[batch:]) for x in arrays]
        expected = oracle(stacks, signs * np.sqrt(np.abs(scales)))
        np.testing.assert_allclose(found.arrays[factor], expected.reshape(arrays[0].shape), **TOLERANCE)
    assert found.variant == lj.LoRA(rank=2, alpha=2)


@pytest.mark.parametrize("how", [METHODS[name][0] for name in METHODS], ids=str)
def test_a_negative_weight_is_the_negative_adapter_and_zero_is_none(how: Any) -> None:
    one, two, three = (part["w"] for part in low_rank("io"))
    minus = lj.Adapter(two.variant, "io", a=-two.a, b=two.b)
    given, expected = (
        many.combine(weighted([{"w": one}, {"w": part}, *rest], weights), how)
        for part, rest, weights in ((two, [{"w": three}], (1, -2, 0)), (minus, [], (1, 2)))
    )
    np.testing.assert_allclose(update(given, "io"), update(expected, "io"), **TOLERANCE)


def test_dare_keeps_a_share_rescales_it_and_is_unbiased() -> None:
    adapters = [{"w": drawn(lj.LoRA(rank=8, alpha=8), (8, 9), "io", seed)} for seed in range(2)]
    deltas = [part["w"].a @ part["w"].b for part in adapters]
    how = many.Dare(density=0.25, rank=8)
    combine = jax.jit(lambda key: many.combine(weighted(adapters, (1, -0.5)), how, key=key)["w"])

    def dropped(key: Any) -> np.ndarray:
        part = combine(key)
        return np.asarray(part.a @ part.b)

    kept = np.array([dropped(jax.random.key(seed)) for seed in range(200)])
    values = np.stack([0 * deltas[0], deltas[0] / 0.25, -0.5 * deltas[1] / 0.25, deltas[0] / 0.25 - deltas[1] / 0.5])
    np.testing.assert_allclose(np.abs(kept[0] - values).min(0), 0, atol=1e-9)
    share = (np.abs(kept[:, None] - values).argmin(1) == 3).mean()
    assert 0.25**2 - 0.01 < share < 0.25**2 + 0.01
    spread = np.sqrt(3 * (deltas[0] ** 2 + deltas[1] ** 2 / 4) / 200)  # the standard error of the mean
    assert (np.abs(kept.mean(0) - deltas[0] + deltas[1] / 2) < 5 * spread).all()


def test_dare_draws_for_each_path_and_name_whatever_their_order() -> None:
    part = drawn(lj.LoRA(rank=2, alpha=2), (6, 5), "io", 0)
    adapter, how, key = {"v": part, "w": part}, many.Dare(density=0.5, on="factors"), jax.random.key(1)
    one, two = (many.combine({name: (adapter, 1)}, how, key=key) for name in ("one", "two"))
    drops = [tuple(np.asarray(leaf.a != 0).ravel()) for leaf in (*one.values(), *two.values())]
    assert len(set(drops)) == 4
    given = {"one": (adapter, 1), "two": (adapter, 2)}
    there, back = (many.combine(dict(order), how, key=key) for order in (given.items(), reversed(given.items())))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), there, back)
    whole = many.combine({"one": (adapter, 1)}, many.Dare(density=1, rank=2), key=key)
    np.testing.assert_allclose(update({"w": whole["w"]}, "io"), part.a @ part.b, **TOLERANCE)


def test_dare_can_elect_signs() -> None:
    adapters, key = low_rank("io"), jax.random.key(0)
    found = many.combine(weighted(adapters, (1, -0.5, 2)), many.Dare(density=1, sign="total", rank=5), key=key)
    expected = many.combine(weighted(adapters, (1, -0.5, 2)), many.Ties(density=1, rank=5))
    np.testing.assert_allclose(update(found, "io"), update(expected, "io"), **TOLERANCE)


# Leaves without factors

BIAS, TABLE = (5,), (7, 4)
BASE = {"bias": normal(*BIAS, seed=3), "full": normal(3, 2, seed=4), "table": normal(*TABLE, seed=5)}


def dense_adapters() -> list[Any]:
    rows = [drawn(lj.Rows(ids=ids), TABLE, "io", at) for at, ids in enumerate([(1, 5), (5, 0, 2)])]
    biases = [drawn(lj.LoRABias(scale=scale), BIAS, "", at) for at, scale in enumerate((2, -0.5))]
    full = [drawn(lj.Full(), (3, 2), "", at) for at in range(2)]
    return [
        {"bias": bias, "full": value, "table": row} for bias, value, row in zip(biases, full, rows, strict=True)
    ] + [{"full": drawn(lj.Full(), (3, 2), "", 9)}]


@pytest.mark.parametrize("how", ["concat", "linear", many.Truncate(rank=1)], ids=str)
def test_other_leaves_are_sums_of_changes(how: Any) -> None:
    adapters, weights = dense_adapters(), (1, -0.5, 0.25)
    base = jax.tree.map(np.asarray, BASE)
    found = lj.merge(base, many.combine(weighted(adapters, weights), how, base=base))
    merged = [lj.merge(base, adapter) for adapter in adapters]
    for path, leaf in base.items():
        changes = [weight * (tree[path] - leaf) for tree, weight in zip(merged, weights, strict=True)]
        np.testing.assert_allclose(found[path], leaf + sum(changes), rtol=1e-5, atol=1e-6, err_msg=path)


def test_rows_are_united() -> None:
    table = many.combine(weighted(dense_adapters(), (1, 1, 1)), "concat", base=BASE)["table"]
    assert table.variant == lj.Rows(ids=(1, 5, 0, 2)) and table.rows.shape == (4, 4)


def test_ties_of_other_leaves_elects_signs_of_changes() -> None:
    adapters = [
        {"bias": lj.Adapter(lj.LoRABias(scale=2), "", bias=np.array(x))} for x in ([4.0, 1, -3], [2.0, -2, 0.1])
    ]
    found = many.combine(weighted(adapters, (1, 1)), many.Ties(density=2 / 3))["bias"]
    np.testing.assert_allclose(found.variant.scale * found.bias, [6, -4, -6])


# Weights, dtypes, shardings


@pytest.mark.parametrize("how", ["concat", "linear", many.Truncate(rank=3)])
def test_a_scale_is_not_rounded_to_the_dtype_of_a_weight(how: Any) -> None:
    adapter = {"w": drawn(lj.RSLoRA(rank=3, alpha=1), SHAPES["io"], "io", 0)}
    combined = many.combine({"one": (adapter, jnp.bfloat16(0.5))}, how)  # 1/√3 is 0.07 % less in bfloat16
    np.testing.assert_allclose(update(combined, "io"), 0.5 * update(adapter, "io"), rtol=1e-7, atol=1e-9)


def test_weights_may_be_traced_and_differentiated() -> None:
    adapters = low_rank("io")
    traced = []

    @jax.jit
    def total(weights: Any) -> Any:
        traced.append(None)
        return lj.merge({"w": jnp.zeros((6, 5))}, many.combine(weighted(adapters, weights), "concat"))["w"].sum()

    for weights in ((1.0, 2.0, -1.0), (0.0, 0.5, 0.0)):
        given = tuple(map(jnp.asarray, weights))
        expected = [update(adapter, "io").sum() for adapter in adapters]
        np.testing.assert_allclose(total(given), np.dot(weights, expected), **TOLERANCE)
    np.testing.assert_allclose(jax.grad(lambda w: total((w, w, w)))(1.0), sum(expected), **TOLERANCE)
    assert len(traced) == 1


def test_the_result_has_the_widest_dtype_and_no_dropout() -> None:
    parts = [
        drawn(lj.LoRA(rank=2, alpha=1, dropout=rate), (6, 5), "io", at, dtype)
        for at, (rate, dtype) in enumerate([(0.1, jnp.bfloat16), (0.1, jnp.bfloat16), (0, np.float32)])
    ]
    for count, dtype in ((2, "bfloat16"), (3, "float32")):
        for how in ("concat", many.Truncate(rank=2)):
            found = many.combine(weighted([{"w": part} for part in parts[:count]], [1] * count), how)["w"]
            assert {array.dtype.name for array in found.arrays.values()} == {dtype}
            assert found.variant.dropout == 0


@pytest.mark.parametrize("how", ["concat", many.Truncate(rank=2), many.Prune(density=0.5)], ids=str)
def test_sharded_factors_are_combined(how: Any) -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    adapters = low_rank("io", ranks=(2, 2, 2))
    expected = update(many.combine(weighted(adapters, (1, 2, 3)), how), "io")
    sharding = NamedSharding(mesh, PartitionSpec("x", None))
    with jax.set_mesh(mesh):
        sharded = [
            {"w": lj.Adapter(ad["w"].variant, "io", **(ad["w"].arrays | {"a": jax.device_put(ad["w"].a, sharding)}))}
            for ad in adapters
        ]
        found = many.combine(weighted(sharded, (1, 2, 3)), how)
        assert jax.typeof(found["w"].a).sharding.spec == PartitionSpec("x", None)
    np.testing.assert_allclose(update(jax.tree.map(np.asarray, found), "io"), expected, **TOLERANCE)


# Refusals

_IO = lj.LoRA(rank=2, alpha=2)
REFUSED: dict[str, tuple[list[Any], Any, str]] = {
    "DoRA": ([lj.DoRA(rank=2, alpha=2)], "concat", "'w': 'ad0' has DoRA(rank=2, alpha=2), whose update has no sum"),
    "VeRA": ([_IO, lj.VeRA(rank=2, seed=0)], "concat", "'w': 'ad1' has VeRA(rank=2, seed=0), whose update has no sum"),
    "aLoRA": ([lj.ALoRA(rank=2, alpha=2, invocation=(1,))], "linear", "whose update has no sum with others"),
    "kinds": ([_IO, lj.Rows(ids=(1,))], "concat", "'w': 'ad1' has Rows(ids=(1,)), and 'ad0' has LoRA(rank=2, alpha=2)"),
    "ranks": (
        [_IO, lj.LoRA(rank=1, alpha=2)],
        many.Ties(density=0.5, on="factors"),
        "sign='total') needs equal ranks; they are {'ad0': 2, 'ad1': 1}",
    ),
    "linear": ([_IO, lj.LoRA(rank=1, alpha=2)], "linear", "Linear() needs equal ranks; they are {'ad0': 2, 'ad1': 1}"),
    "Full": ([lj.Full()], "concat", "'w': a change of Full is relative to the base; pass base=params"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_leaves_that_cannot_be_combined_are_refused(name: str) -> None:
    variants, how, text = REFUSED[name]
    axes = ["" if isinstance(variant, lj.Full) else "io" for variant in variants]
    adapters = [{"w": drawn(variant, (6, 5), role, 0)} for variant, role in zip(variants, axes, strict=True)]
    with pytest.raises(lj.AdapterError) as caught:
        many.combine(weighted(adapters, [1] * len(adapters)), how)
    assert text in str(caught.value)
    assert str(caught.value).startswith("Expected leaves that can be combined: at each path LoRA, rsLoRA and AdaLoRA")


def test_one_error_lists_all_leaves() -> None:
    part, other = drawn(_IO, (6, 5), "io", 0), drawn(_IO, (6, 4), "io", 0)
    flipped = lj.Adapter(_IO, "oi", a=part.b.T, b=part.a.T)
    with pytest.raises(lj.AdapterError) as caught:
        many.combine({"x": ({"v": part, "w": part}, 1), "y": ({"v": other, "w": flipped}, 1)}, "concat")
    assert "got 2 that cannot" in str(caught.value)
    assert "'v': 'y' is for a kernel with [(6,), (4,)], and 'x' for [(6,), (5,)]" in str(caught.value)
    assert "'w': the axes are 'oi' in 'y', and 'io' in 'x'" in str(caught.value)


ARGUMENTS: list[tuple[Any, type[Exception], str]] = [
    (lambda ad: many.combine({}, "concat"), lj.AdapterError, "Expected adapters with weights, {name: (adapter, weig"),
    (lambda ad: many.combine([ad], "concat"), lj.AdapterError, "{name: (adapter, weight), …}; got list."),
    (
        lambda ad: many.combine({"x": ad}, "concat"),
        lj.AdapterError,
        "Expected an adapter and its weight at 'x'; got di",
    ),
    (lambda ad: many.combine({"x": (3, 1)}, "concat"), lj.AdapterError, "Expected an adapter: a dict from paths"),
    (lambda ad: many.combine({"x": (ad, "1")}, "concat"), lj.SpecError, "a finite number for `weight of 'x'`; got '1'"),
    (lambda ad: many.combine({"x": (ad, jnp.ones(2))}, "concat"), lj.SpecError, "the weight of 'x'; got float64[2]"),
    (lambda ad: many.combine({"x": (ad, 1)}, "cat"), lj.SpecError, "Expected 'concat', 'linear', or a value such as"),
    (
        lambda ad: many.combine({"x": (ad, 1)}, many.Dare(density=0.5)),
        lj.SpecError,
        "Expected a key for Dare(density=0.5, on='updates', rank=None, sign=None), which is random; got none.",
    ),
    (
        lambda ad: many.combine({"x": (ad, 1)}, "concat", key=jax.random.key(0)),
        lj.SpecError,
        "Expected no key for Concat(), which is not random; got one.\n  Leave `key` out.",
    ),
    (
        lambda ad: many.combine({"x": ({"w": drawn(lj.Full(), (6, 5), "", 0)}, 1)}, "concat", base={"w": np.ones(3)}),
        lj.AdapterError,
        "Expected an adapter of `base`",
    ),
    (lambda ad: many.Truncate(), lj.SpecError, "Expected either `rank` or `energy`; got Truncate(rank=None"),
    (lambda ad: many.Truncate(rank=0), lj.SpecError, "Expected an integer of at least 1 for `rank`; got rank=0."),
    (lambda ad: many.Truncate(energy=1), lj.SpecError, "Expected a number in (0, 1) for `energy`; got energy=1."),
    (
        lambda ad: jax.jit(lambda ad: many.combine({"x": (ad, 1)}, many.Truncate(energy=0.5)))(ad),
        lj.SpecError,
        "because `energy` determines the ranks from them; got traced arrays.\n  Call this outside `jit`, or",
    ),
    (lambda ad: many.Prune(density=0), lj.SpecError, "Expected a number in (0, 1] for `density`, the share to keep"),
    (lambda ad: many.Prune(density=1, on="b"), lj.SpecError, "Expected 'updates' or 'factors' for `on`; got 'b'."),
    (lambda ad: many.Prune(density=1, on="factors", rank=2), lj.SpecError, "Expected no `rank` with on='factors'"),
    (lambda ad: many.Ties(density=1, sign="most"), lj.SpecError, "Expected 'total' or 'frequency' for `sign`; got 'mo"),
    (lambda ad: many.Dare(density=1, sign="most"), lj.SpecError, "Expected 'total' or 'frequency' for `sign`; got 'mo"),
]


@pytest.mark.parametrize(("call", "error", "text"), ARGUMENTS, ids=itertools.count())
def test_an_invalid_argument_is_an_error(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        call({"w": drawn(_IO, (6, 5), "io", 0)})
    assert text in str(caught.value)


# Interpolation

INTERPOLATED = {
    "LoRA": lj.LoRA(rank=2, alpha=3),
    "rsLoRA": lj.RSLoRA(rank=2, alpha=3),
    "AdaLoRA": lj.AdaLoRA(rank=2, alpha=3),
    "VeRA": lj.VeRA(rank=2, seed=1),
    "Rows": lj.Rows(ids=(4, 1)),
    "LoRABias": lj.LoRABias(scale=2),
    "Full": lj.Full(),
}


@pytest.mark.parametrize("name", INTERPOLATED)
def test_interpolated_weights_are_between_the_base_and_the_merge(name: str) -> None:
    variant = INTERPOLATED[name]
    params = {"w": np.asarray(normal(6, 5, seed=7), np.float64)}
    adapter = {"w": drawn(variant, (6, 5), "io" if variant.needs_axes else "", 0)}
    merged, traced = lj.merge(params, adapter)["w"], []

    @jax.jit
    def run(weight: Any) -> Any:
        traced.append(None)
        return lj.merge(params, many.interpolate(adapter, weight, base=params))["w"]

    for weight in (0.0, 1.0, 0.3, -2.0):
        expected = (1 - weight) * params["w"] + weight * merged
        np.testing.assert_allclose(run(weight), expected, rtol=1e-6, atol=1e-6)
        assert jax.tree.structure(many.interpolate(adapter, weight, base=params)) == jax.tree.structure(adapter)
    assert len(traced) == 1
    assert bits(lj.merge(params, many.interpolate(adapter, 0, base=params))) == bits(params)
    assert bits(many.interpolate(adapter, 1, base=params)) == bits(jax.tree.map(jnp.asarray, adapter))


def test_a_leaf_of_a_stack_and_of_alora_can_be_scaled() -> None:
    adapters = {f"ad{at}": adapter for at, adapter in enumerate(low_rank("io")[:2])}
    half = many.interpolate(many.select(many.stack(adapters), "ad1"), 0.5)
    np.testing.assert_allclose(update(half, "io"), 0.5 * update(adapters["ad1"], "io"), rtol=1e-6)
    part = drawn(lj.ALoRA(rank=2, alpha=2, invocation=(1,)), (6, 5), "io", 0)
    np.testing.assert_allclose(many.interpolate({"w": part}, 0.5)["w"].b, 0.5 * part.b)


def test_between_two_adapters_is_a_combination() -> None:
    one, two, _ = low_rank("io")
    between = jax.jit(lambda t: many.combine({"one": (one, 1 - t), "two": (two, t)}, "concat"))(jnp.asarray(0.25))
    np.testing.assert_allclose(update(between, "io"), 0.75 * update(one, "io") + 0.25 * update(two, "io"), **TOLERANCE)


@pytest.mark.parametrize(
    ("variant", "weight", "error", "text"),
    [
        (
            lj.DoRA(rank=2, alpha=2),
            0.5,
            lj.AdapterError,
            "'w': DoRA(rank=2, alpha=2) replaces or normalizes the kernel",
        ),
        (lj.Full(), 0.5, lj.AdapterError, "'w': a change of Full is relative to the base; pass base=params"),
        (_IO, "half", lj.SpecError, "Expected a finite number for `weight`; got 'half'."),
        (_IO, np.ones(2), lj.SpecError, "Expected a finite number for `weight`"),
        (_IO, jnp.ones(2), lj.SpecError, "Expected a number for `weight`; got float32[2]."),
    ],
)
def test_what_cannot_be_interpolated_is_an_error(variant: Any, weight: Any, error: Any, text: str) -> None:
    adapter = {"w": drawn(variant, (6, 5), "io" if variant.needs_axes else "", 0)}
    with pytest.raises(error) as caught:
        many.interpolate(adapter, weight)
    assert text in str(caught.value)
