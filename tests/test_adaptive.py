"""Adaptive rank: each function against its formula, and training with them."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import assert_few_ulp, bits, sweep_except, trained
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from law import assert_close, normal

import lora_jax as lj
from lora_jax import adaptive, optim
from lora_jax.checkpoint import StateRestore, StateSave

KERNELS = {"io": (6, 5), "iiio": (2, 2, 3, 8), "ioo": (6, 2, 4), "bio": (3, 6, 5), "ibo": (6, 3, 5)}
PARAMS = {"dense": normal(6, 5), "conv": normal(2, 2, 3, 8), "stack": normal(6, 3, 5), "bias": normal(5)}
SPEC = {
    "dense": lj.AdaLoRA(rank=4, alpha=6),
    "conv": lj.AdaLoRA(rank=3, alpha=6, axes="iiio"),
    "stack": lj.AdaLoRA(rank=2, alpha=4, axes="ibo"),
    "bias": lj.Full(),
}
START = 4 + 3 + 3 * 2


def mixed_adapter(seed: int = 1) -> Any:
    """An adapter of a dense kernel, a convolution, three layers along axis 1, and a bias under `Full`."""
    return trained(jax.random.key(seed), lj.init(jax.random.key(0), PARAMS, SPEC))


def random_case(axes: str, rank: int = 4) -> tuple[Any, Any]:
    params = {"w": normal(*KERNELS[axes])}
    variant = lj.AdaLoRA(rank=rank, alpha=6, dropout=0.25, axes=axes)
    return params, trained(jax.random.key(1), lj.init(jax.random.key(0), params, {"w": variant}))


def with_e(part: Any, e: Any) -> Any:
    return lj.Adapter(part.variant, part.axes, **part.arrays | {"e": jnp.asarray(e, part.e.dtype)})


def active(adapter: Any) -> dict[str, np.ndarray]:
    """The directions of an adapter that are not zero."""
    return {path: np.asarray(part.e) != 0 for path, part in adapter.items() if "e" in part.arrays}


def count(adapter: Any) -> int:
    return sum(int(mask.sum()) for mask in active(adapter).values())


# The budget


def budget_by_hand(step: int, start: int, end: int, warmup: int, settle: int, total: int) -> int:
    if step <= warmup:
        return start
    if step > total - settle:
        return end
    remains = 1 - Fraction(step - warmup, total - settle - warmup)
    return math.floor(end + (start - end) * remains**3)


@hypothesis.given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 30), st.integers(0, 30), st.integers(1, 300))
def test_the_budget_is_exactly_the_cubic(first: int, second: int, warmup: int, settle: int, between: int) -> None:
    arguments = {"start": max(first, second), "end": min(first, second), "warmup": warmup, "settle": settle}
    arguments["total"] = warmup + between + settle
    steps = range(arguments["total"] + 3)
    got = adaptive.budget(np.arange(len(steps)), **arguments)
    assert got.dtype == jnp.int32
    assert got.tolist() == [budget_by_hand(step, **arguments) for step in steps]


def test_the_budget_of_a_long_training_is_exact() -> None:
    arguments = {"start": 1728, "end": 576, "warmup": 1000, "settle": 3000, "total": 100_000}
    steps = [*range(990, 1200), 34_000, 50_123, *range(96_900, 97_010)]
    run = jax.jit(lambda step: adaptive.budget(step, **arguments))
    assert [int(run(step)) for step in steps] == [budget_by_hand(step, **arguments) for step in steps]
    assert run(5).shape == ()


WRONG_BUDGETS = {
    "more at the end": (
        {"end": 9},
        "Expected `end` in [1, 8]; got end=9.\n"
        "  `end` counts the directions of all kernels and layers together; initially there are 8.",
    ),
    "nothing at the end": ({"end": 0}, "got end=0."),
    "no step between": (
        {"warmup": 6, "settle": 4},
        "Expected warmup and settle of at least 0 and warmup + settle < total; got warmup=6, settle=4, total=10.",
    ),
    "a negative warmup": ({"warmup": -1}, "got warmup=-1"),
    "a negative settling": ({"settle": -1}, "settle=-1"),
}


@pytest.mark.parametrize("name", WRONG_BUDGETS)
def test_an_invalid_budget_is_an_error(name: str) -> None:
    wrong, text = WRONG_BUDGETS[name]
    with pytest.raises(lj.SpecError) as caught:
        adaptive.budget(3, **{"start": 8, "end": 2, "warmup": 1, "settle": 1, "total": 10} | wrong)
    assert text in str(caught.value)


# Importance and scores


def importance_by_hand(pairs: list[tuple[Any, Any]], beta1: float, beta2: float) -> list[tuple[Any, Any]]:
    """Ī and Ū of each array after steps with the given gradients and arrays."""
    sensitivity = [0.0] * len(jax.tree.leaves(pairs[0][0]))
    uncertainty = list(sensitivity)
    for gradient, adapter in pairs:
        for at, (g, w) in enumerate(zip(jax.tree.leaves(gradient), jax.tree.leaves(adapter), strict=True)):
            here = np.abs(np.asarray(g, np.float64) * np.asarray(w, np.float64))
            sensitivity[at] = beta1 * sensitivity[at] + (1 - beta1) * here
            uncertainty[at] = beta2 * uncertainty[at] + (1 - beta2) * np.abs(here - sensitivity[at])
    return list(zip(sensitivity, uncertainty, strict=True))


def test_importance_matches_the_paper() -> None:
    pairs = [(mixed_adapter(2 * seed), mixed_adapter(2 * seed + 1)) for seed in range(1, 5)]
    measure = jax.jit(lambda *args: adaptive.measure(*args, beta1=0.7, beta2=0.6))
    importance = adaptive.unmeasured(mixed_adapter())
    for gradient, adapter in pairs:
        importance = measure(importance, gradient, adapter)
    chosen = [({p: x[p] for p in sorted(SPEC) if p != "bias"} for x in pair) for pair in pairs]
    expected = importance_by_hand([tuple(pair) for pair in chosen], 0.7, 0.6)
    got = zip(jax.tree.leaves(importance.sensitivity), jax.tree.leaves(importance.uncertainty), strict=True)
    for first, second in zip(got, expected, strict=True):
        np.testing.assert_allclose(first[0], second[0], rtol=2e-6)
        np.testing.assert_allclose(first[1], second[1], rtol=2e-5, atol=1e-8)
    assert list(importance.sensitivity) == ["conv", "dense", "stack"]


def test_importance_of_a_half_precision_adapter_is_stored_in_float32() -> None:
    adapter = jax.tree.map(lambda x: x.astype(jnp.bfloat16), mixed_adapter())
    importance = adaptive.measure(adaptive.unmeasured(adapter), adapter, adapter)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(importance)} == {"float32"}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), adapter)
    assert bits(importance) == bits(adaptive.measure(adaptive.unmeasured(wide), wide, wide))


@pytest.mark.parametrize("axes", KERNELS)
def test_a_score_is_the_importance_of_e_plus_the_means_of_a_column_and_a_row(axes: str) -> None:
    _, adapter = random_case(axes)
    importance = adaptive.Importance(adapter, jax.tree.map(lambda x: 2 * x, adapter))
    part, rank, batch = adapter["w"], 4, adapter["w"].e.shape[:-1]
    a = 2 * np.asarray(part.a).reshape(*batch, -1, rank) ** 2
    b = 2 * np.asarray(part.b).reshape(*batch, rank, -1) ** 2
    expected = 2 * np.asarray(part.e) ** 2 + a.mean(-2) + b.mean(-1)
    np.testing.assert_allclose(adaptive.scores(importance)["w"], expected, rtol=1e-5)


# Selection of directions


@hypothesis.given(st.lists(st.integers(0, 3), min_size=12, max_size=12), st.integers(0, 13))
def test_the_directions_with_the_highest_scores_are_kept(values: list[int], most: int) -> None:
    flat = np.array(values, np.float32)
    scores = {"z": flat[:6].reshape(3, 2), "a": flat[6:10], "m": flat[10:]}
    kept = adaptive.keep(scores, most)
    assert {path: mask.shape for path, mask in kept.items()} == {path: mask.shape for path, mask in scores.items()}
    there = np.concatenate([np.ravel(kept[path]) for path in scores])
    assert there.sum() == min(most, 12)
    if 0 < there.sum() < 12:
        assert flat[there].min() >= flat[~there].max()


def test_ties_do_not_depend_on_the_order_or_on_jit() -> None:
    scores = {"b": jnp.ones((2, 3)), "a": jnp.ones(4)}
    reversed_scores = dict(reversed(scores.items()))
    expected = {"a": [True] * 4, "b": [[True, True, False], [False] * 3]}
    run = jax.jit(chex.assert_max_traces(adaptive.keep, n=1))
    chex.clear_trace_counter()
    for kept in (adaptive.keep(scores, 6), adaptive.keep(reversed_scores, 6), run(scores, jnp.int32(6))):
        assert {path: mask.tolist() for path, mask in sorted(kept.items())} == expected
    assert sum(int(mask.sum()) for mask in run(scores, jnp.int32(2)).values()) == 2


def test_pruning_zeroes_only_the_entries_of_e_that_are_not_kept() -> None:
    adapter = mixed_adapter()
    kept = adaptive.keep({path: jnp.abs(adapter[path].e) for path in ("conv", "dense", "stack")}, 5)
    pruned = adaptive.prune(adapter, kept)
    assert list(pruned) == list(adapter) and count(pruned) == 5
    for path, mask in kept.items():
        assert bits(pruned[path].e) == bits(jnp.where(mask, adapter[path].e, 0.0))
        assert pruned[path].a is adapter[path].a and pruned[path].b is adapter[path].b
    assert pruned["bias"] is adapter["bias"]


# Orthogonality


def test_orthogonality_sums_squared_distances_over_factors_and_layers() -> None:
    adapter = mixed_adapter()
    expected = 0.0
    for path, part in adapter.items():
        if path != "bias":
            rank, batch = part.e.shape[-1], part.e.shape[:-1]
            a = np.asarray(part.a, np.float64).reshape(*batch, -1, rank)
            b = np.asarray(part.b, np.float64).reshape(*batch, rank, -1)
            grams = np.swapaxes(a, -1, -2) @ a, b @ np.swapaxes(b, -1, -2)
            expected += sum(((gram - np.eye(rank)) ** 2).sum() for gram in grams)
    assert float(jax.jit(adaptive.orthogonality)(adapter)) == pytest.approx(expected, rel=1e-5)


def test_orthogonality_of_zero_has_a_gradient_of_zero() -> None:
    part = lj.Adapter(lj.AdaLoRA(rank=2, alpha=1), "io", a=jnp.eye(4, 2), e=jnp.ones(2), b=jnp.eye(2, 3))
    value, gradient = jax.value_and_grad(adaptive.orthogonality)({"w": part})
    assert float(value) == 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))  # the gradient of the norm is NaN there


# Compaction


@pytest.mark.parametrize("axes", ["io", "iiio", "ioo"])
def test_compact_keeps_the_function_at_a_smaller_rank(axes: str) -> None:
    params, adapter = random_case(axes)
    adapter = {"w": with_e(adapter["w"], [0.0, -2.0, 0.0, 0.5])}
    small = adaptive.compact(adapter)
    part = small["w"]
    assert part.variant == lj.LoRA(rank=2, alpha=3.0, dropout=0.25) and part.axes == axes
    assert part.variant.scale == adapter["w"].variant.scale
    x = normal(7, *KERNELS[axes], seed=5)
    run = lambda params, x: jnp.einsum("n...,...->n", x, params["w"])  # noqa: E731
    apply = lj.lora(run, materialize=["w"])
    assert_close(apply(params, small, x), apply(params, adapter, x), {"float32": 1e-6})
    assert_close(lj.merge(params, small), lj.merge(params, adapter), {"float32": 1e-6})
    assert bits(part.a[..., 0]) == bits(adapter["w"].a[..., 1] * jnp.float32(-2.0))  # no direction is removed


@pytest.mark.parametrize("axes", ["bio", "ibo"])
def test_compact_gives_a_stack_the_largest_rank_of_its_layers(axes: str) -> None:
    params, adapter = random_case(axes)
    e = [[0.0, 3.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 4.0, 0.0]]
    adapter = {"w": with_e(adapter["w"], e)}
    part = adaptive.compact(adapter)["w"]
    assert part.variant.rank == 2 and part.variant.scale == 1.5
    assert_close(lj.merge(params, {"w": part}), lj.merge(params, adapter), {"float32": 1e-6})
    there = [[True, True], [False, False], [True, False]]
    assert (np.abs(part.a).max(1) > 0).tolist() == there
    assert (np.abs(part.b).max(2) > 0).tolist() == there


def test_compact_drops_kernels_without_directions_only() -> None:
    adapter = mixed_adapter()
    adapter |= {"dense": with_e(adapter["dense"], jnp.zeros(4))}
    small = adaptive.compact(adapter)
    assert set(small) == {"conv", "stack", "bias"}
    assert small["bias"] is adapter["bias"]
    merged, expected = lj.merge(PARAMS, small), lj.merge(PARAMS, adapter)
    assert_close(merged, expected, {"float32": 1e-6})


def test_compact_in_half_precision_keeps_the_function_up_to_rounding() -> None:
    params, adapter = random_case("io")
    adapter = jax.tree.map(lambda x: x.astype(jnp.bfloat16), {"w": with_e(adapter["w"], [0.0, -2.3, 0.0, 0.7])})
    small = adaptive.compact(adapter)
    assert small["w"].a.dtype == jnp.bfloat16
    assert_close(lj.merge(params, small), lj.merge(params, adapter), {"float32": 4e-3})


def test_compact_raises_for_invalid_adapters() -> None:
    params, adapter = random_case("io")
    with pytest.raises(lj.AdapterError) as caught:
        jax.jit(adaptive.compact)(adapter)
    assert str(caught.value) == (
        "Expected arrays with values, which determine the remaining ranks; got traced arrays or shapes.\n"
        "  Call compact outside `jit`; inside, use `prune`, which keeps the shapes."
    )
    with pytest.raises(lj.AdapterError, match="Expected arrays with values"):
        adaptive.compact(jax.eval_shape(lambda: adapter))
    with pytest.raises(lj.AdapterError) as caught:
        adaptive.compact({"w": with_e(adapter["w"], jnp.zeros(4))})
    assert str(caught.value) == (
        "Expected at least one direction with a nonzero `e`; `e` is zero in all 1 leaves.\n"
        "  Train the adapter first: `e` is initialized to zero, and the model is then the base."
    )
    with pytest.raises(lj.AdapterError) as caught:
        adaptive.compact(lj.init(jax.random.key(0), params, {"w": lj.LoRA(rank=2, alpha=4)}))
    assert str(caught.value) == (
        "Expected an adapter with leaves of AdaLoRA; got leaves of LoRA.\n"
        "  Use AdaLoRA in the spec: init(key, params, {'**/kernel': AdaLoRA(rank=12, alpha=24)})."
    )


def test_compact_works_on_sharded_arrays() -> None:
    _, adapter = random_case("bio")
    adapter = {"w": with_e(adapter["w"], [[0.0, 3.0, 0.0, 0.5], [0.0] * 4, [0.0, 0.0, 4.0, 0.0]])}
    expected = adaptive.compact(adapter)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = Mesh(np.array(jax.devices()[:6]).reshape(3, 2), ("layers", "x"), axis_types=(kind, kind))
        where = lj.sharding.like_base(adapter, NamedSharding(mesh, P("layers", "x")))
        with jax.set_mesh(mesh):
            sharded = adaptive.compact(jax.device_put(adapter, where))
        assert bits(jax.device_get(sharded)) == bits(jax.device_get(expected))


# Training

SCHEDULE = {"end": 5, "warmup": 2, "settle": 3, "total": 12}


def slopes(steps: int) -> list[Any]:
    return [mixed_adapter(100 + step) for step in range(steps)]


def run(tx: Any, adapter: Any, gradients: list[Any], state: Any = None) -> Any:
    """The adapter and state after each update; one program runs all of them."""
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(lambda *args: tx.update(*args), n=1))
    state = tx.init(adapter) if state is None else state
    seen = []
    for gradient in gradients:
        updates, state = update(gradient, state, adapter)
        adapter = optax.apply_updates(adapter, updates)
        seen.append((adapter, state))
    return seen


def by_hand(adapter: Any, gradients: list[Any], interval: int, rate: float) -> list[Any]:
    """Gradient descent with the paper's allocation, from the functions that are tested above."""
    importance, mask, seen = adaptive.unmeasured(adapter), None, []
    last = SCHEDULE["total"] - SCHEDULE["settle"]
    for step, gradient in enumerate(gradients, start=1):
        importance = adaptive.measure(importance, gradient, adapter)
        adapter = jax.tree.map(lambda w, g: w - rate * g, adapter, gradient)
        if SCHEDULE["warmup"] < step <= last and (step % interval == 0 or step == last):
            mask = adaptive.keep(adaptive.scores(importance), budget_by_hand(step, START, **SCHEDULE))
            adapter = adaptive.prune(adapter, mask)
        elif step > last:
            adapter = adaptive.prune(adapter, mask)
        seen.append(adapter)
    return seen


@pytest.mark.parametrize("interval", [1, 4])
def test_training_matches_gradient_descent_with_the_allocation_of_the_paper(interval: int) -> None:
    adapter, gradients = mixed_adapter(), slopes(14)
    tx = adaptive.ada_lora(optax.sgd(0.1), **SCHEDULE, interval=interval)
    got = [trained for trained, _ in run(tx, adapter, gradients)]
    for first, second in zip(got, by_hand(adapter, gradients, interval, 0.1), strict=True):
        assert_close(first, second, {"float32": 1e-6})
        assert all((a == b).all() for a, b in zip(active(first).values(), active(second).values(), strict=True))


def test_pruned_directions_are_zero_and_return_only_until_the_last_allocation() -> None:
    tx = adaptive.ada_lora(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), **SCHEDULE, interval=4)
    seen = run(tx, mixed_adapter(), slopes(14))
    counts = [count(adapter) for adapter, _ in seen]
    budgets = [budget_by_hand(step, START, **SCHEDULE) for step in range(1, 15)]
    assert counts == [START, START, START, budgets[3], START, START, START, budgets[7], *[5] * 6]
    masks = [np.concatenate([mask.ravel() for mask in active(adapter).values()]) for adapter, _ in seen]
    assert all((mask == masks[8]).all() for mask in masks[9:])
    for adapter, state in seen[8:]:
        kept = {path: np.asarray(mask) for path, mask in state.kept.items()}
        assert all((kept[path] == mask).all() for path, mask in active(adapter).items())


def test_gradients_after_the_last_allocation_change_no_rank() -> None:
    late = [jax.tree.map(lambda x, by=by: by * x, mixed_adapter(200 + by)) for by in (10, 100, 1000)]
    seen = run(adaptive.ada_lora(optax.adam(0.1), **SCHEDULE), mixed_adapter(), [*slopes(9), *late])
    (before, _), (after, state) = seen[8], seen[-1]
    assert all((active(after)[path] == mask).all() for path, mask in active(before).items())
    now = adaptive.keep(adaptive.scores(state.importance), 5)
    assert any((np.asarray(mask) != active(before)[path]).any() for path, mask in now.items())  # a different selection


def test_other_leaves_are_trained_by_the_optimizer() -> None:
    adapter, gradients = mixed_adapter(), slopes(4)
    got = run(adaptive.ada_lora(optax.adamw(0.1), **SCHEDULE), adapter, gradients)[-1][0]
    expected = run(optax.adamw(0.1), adapter, gradients)[-1][0]
    assert_few_ulp(got["bias"], expected["bias"])
    for path in got.keys() - {"bias"}:
        assert_few_ulp((got[path].a, got[path].b), (expected[path].a, expected[path].b))


def test_steps_may_be_iterations_of_a_scan() -> None:
    adapter, gradients = mixed_adapter(), slopes(12)
    tx = adaptive.ada_lora(optax.adam(0.1), **SCHEDULE)
    expected, _ = run(tx, adapter, gradients)[-1]

    def step(carry: Any, gradient: Any) -> Any:
        adapter, state = carry
        updates, state = tx.update(gradient, state, adapter)
        return (optax.apply_updates(adapter, updates), state), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    (got, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, stacked))((adapter, tx.init(adapter)))
    assert_close(got, expected)
    assert all((active(got)[path] == mask).all() for path, mask in active(expected).items())
    assert int(state.step) == 12


WRAPPED = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, every_k_schedule=1).gradient_transformation(),
    "freeze_base": optim.freeze_base,
    "lora_plus inside": lambda tx: tx,
}


@pytest.mark.parametrize("name", sweep_except(["MultiSteps"], WRAPPED))
def test_pruning_composes_with_other_optax_transformations(name: str) -> None:
    inner = optax.chain(optax.sgd(0.1), optim.lora_plus(4)) if name == "lora_plus inside" else optax.sgd(0.1)
    plain = adaptive.ada_lora(inner, **SCHEDULE)
    adapter, gradients = mixed_adapter(), slopes(10)
    expected = run(plain, adapter, gradients)[-1][0]
    tx = WRAPPED[name](plain)
    if name == "freeze_base":
        trees = [{"base": PARAMS, "adapter": gradient} for gradient in gradients]
        got = run(tx, {"base": PARAMS, "adapter": adapter}, trees)[-1][0]["adapter"]
    else:
        got = run(tx, adapter, gradients)[-1][0]
    assert count(got) == 5
    assert_close(got, expected)


def test_lora_fa_inside_adalora_trains_b_and_e() -> None:
    adapter = mixed_adapter()
    got = run(adaptive.ada_lora(optim.lora_fa(optax.adam(0.1)), **SCHEDULE), adapter, slopes(10))[-1][0]
    assert count(got) == 5
    assert bits(got["dense"].a) == bits(adapter["dense"].a) and bits(got["dense"].b) != bits(adapter["dense"].b)


def test_training_resumes_from_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    adapter, gradients = mixed_adapter(), slopes(12)
    tx = adaptive.ada_lora(optax.adamw(0.1), **SCHEDULE, interval=2)
    straight = run(tx, adapter, gradients)[-1]
    half, state = run(tx, adapter, gradients[:7])[-1]
    with ocp.CheckpointManager(tmp_path) as manager:
        items = {"adapter": lj.checkpoint.AdapterSave(half, base=PARAMS), "state": StateSave({"opt_state": state})}
        manager.save(7, args=ocp.args.Composite(**items))
    with ocp.CheckpointManager(tmp_path) as manager:
        like = {"opt_state": tx.init(mixed_adapter(9))}
        items = {"adapter": lj.checkpoint.AdapterRestore(base=PARAMS), "state": StateRestore(like)}
        restored = manager.restore(7, args=ocp.args.Composite(**items))
    resumed = run(tx, restored.adapter, gradients[7:], restored.state["opt_state"])[-1]
    assert bits(resumed) == bits(straight)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_steps_on_sharded_arrays_are_the_same(kind: AxisType) -> None:
    _, adapter = random_case("bio")
    gradients = [jax.tree.map(lambda x, by=by: jnp.cos(by * x), adapter) for by in (1.0, 2.0, 3.0)]
    tx = adaptive.ada_lora(optax.adam(0.1), end=4, warmup=0, settle=1, total=3)
    expected = run(tx, adapter, gradients)[-1]
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(3, 2), ("layers", "x"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        base = NamedSharding(mesh, P("layers", "x"))
        where = lj.sharding.like_base(adapter, base)
        sharded, *slopes = (jax.device_put(tree, where) for tree in (adapter, *gradients))
        state = jax.device_put(tx.init(sharded), lj.sharding.like_base(tx.init(sharded), base))
        got = run(tx, sharded, slopes, state)[-1]
    assert_close(jax.device_get(got), jax.device_get(expected))
    assert got[1].importance.sensitivity["w"].a.sharding.spec == P("layers", "x", None)
    assert count(got[0]) == 4


WRONG_OPTIONS = {
    "an interval": (
        {"interval": 0},
        "Expected an interval of at least 1, and betas in [0, 1); got interval=0, beta1=0.85, beta2=0.85.",
    ),
    "a beta": ({"beta2": 1.0}, "beta2=1.0."),
    "an end": ({"end": START + 1}, f"Expected `end` in [1, {START}]"),
    "a schedule": ({"warmup": 9}, "warmup + settle < total; got warmup=9, settle=3, total=12."),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_invalid_options_are_errors_before_the_first_step(name: str) -> None:
    wrong, text = WRONG_OPTIONS[name]
    with pytest.raises(lj.SpecError) as caught:
        adaptive.ada_lora(optax.sgd(0.1), **SCHEDULE | wrong).init(mixed_adapter())
    assert text in str(caught.value)


def test_update_raises_without_an_adapter_with_adaptive_ranks() -> None:
    tx, adapter = adaptive.ada_lora(optax.sgd(0.1), **SCHEDULE), mixed_adapter()
    with pytest.raises(lj.AdapterError) as caught:
        tx.update(adapter, tx.init(adapter))
    assert str(caught.value) == "Expected `params`, the adapter; got None.\n  Call tx.update(gradient, state, adapter)."
    with pytest.raises(lj.AdapterError, match="with leaves of AdaLoRA; got leaves of Full"):
        tx.init({"bias": adapter["bias"]})
    with pytest.raises(lj.AdapterError, match="Expected an adapter: a dict from paths"):
        tx.init(PARAMS)


# Purpose


@pytest.mark.sweep
def test_ranks_are_allocated_where_the_data_need_them() -> None:
    """The data need updates of rank 4, 1 and 0 in three kernels; 5 of 18 directions are kept."""
    needs = {"much": 4, "little": 1, "none": 0}
    random = np.random.default_rng(0)
    params, wanted = {}, {}
    for path, rank in needs.items():
        u, v = (np.linalg.qr(random.standard_normal((size, 6)))[0] for size in (16, 12))
        params[path] = random.standard_normal((16, 12)).astype(np.float32)
        wanted[path] = (params[path] + 2 * u[:, :rank] @ v[:, :rank].T).astype(np.float32)

    def model(params: Any, x: jax.Array) -> Any:
        return {path: x @ w for path, w in params.items()}

    adapter = lj.init(jax.random.key(0), params, {"*": lj.AdaLoRA(rank=6, alpha=6)})
    tx = adaptive.ada_lora(optax.adam(0.02), end=5, warmup=50, settle=150, total=400, interval=10)

    def loss(adapter: Any, x: jax.Array) -> jax.Array:
        errors = jax.tree.map(lambda y, z: jnp.mean((y - z) ** 2), lj.lora(model)(params, adapter, x), model(wanted, x))
        return sum(errors.values()) + 0.01 * adaptive.orthogonality(adapter)

    def step(carry: Any, key: jax.Array) -> Any:
        adapter, state = carry
        gradient = jax.grad(loss)(adapter, jax.random.normal(key, (32, 16)))
        updates, state = tx.update(gradient, state, adapter)
        return (optax.apply_updates(adapter, updates), state), None

    keys = jax.random.split(jax.random.key(1), 400)
    (adapter, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((adapter, tx.init(adapter)))
    small = adaptive.compact(adapter)
    assert {path: part.variant.rank for path, part in small.items()} == {"much": 4, "little": 1}
    merged = lj.merge(params, small)
    for path in needs:
        assert np.linalg.norm(merged[path] - wanted[path]) < 0.1 * max(1, np.linalg.norm(wanted[path] - params[path]))
    x = normal(8, 16, seed=7)
    assert_close(lj.lora(model)(params, small, x), lj.lora(model)(params, adapter, x), {"float32": 1e-6})
