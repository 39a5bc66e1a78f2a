"""All adapters of a stack in one training step: each takes the steps that it takes by itself, and costs no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from evaluate import without_compiling
from helpers import GRADIENT, assert_close, bits
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from law import normal
from test_many import TOGETHER, random, random_adapters

import lora_jax as lj
from benchmarks import many as benchmark
from lora_jax import many
from lora_jax.checkpoint import StateRestore, StateSave

TX = optax.chain(optax.clip_by_global_norm(0.5), optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale(-1))
RATES = [0.03, 0.01, 0.05, 0.02, 0.04]
STOPPED, STOPPED_AT = 1, 2  # an adapter, and the step from which it is not trained


def model(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"]) @ params["head"]


APPLY = lj.lora(model)


def loss_fn(params: Any, adapter: Any, x: jax.Array, y: jax.Array, key: Any = None) -> jax.Array:
    return jnp.mean((APPLY(params, adapter, x, dropout_key=key) - y) ** 2)


@without_compiling
def alone(params: Any, adapter: Any, state: Any, rate: Any, *batch: Any) -> Any:
    """A step of one adapter by itself."""
    value, gradient = jax.value_and_grad(lambda adapter: loss_fn(params, adapter, *batch))(adapter)
    updates, state = TX.update(gradient, state, adapter)
    return optax.apply_updates(adapter, jax.tree.map(lambda update: rate * update, updates)), state, value


def assert_training_is_separate(params: Any, adapters: dict[str, Any], batches: list[Any]) -> many.Stack:
    """Trains a stack and each adapter by itself; compares losses, adapters and states after each step."""
    rates, stacked = np.float32(RATES[: len(adapters)]), many.stack(adapters)
    step = jax.jit(
        lambda stacked, states, rates, active, *batch: many.train_step(loss_fn, TX)(
            params, stacked, states, *batch, rates=rates, active=active
        )
    )
    states = jax.vmap(TX.init)(stacked.members.trainable)
    own = {name: (adapter, TX.init(adapter)) for name, adapter in adapters.items()}
    for at, batch in enumerate(batches):
        active = np.array([number != STOPPED or at < STOPPED_AT for number in range(len(adapters))])
        stacked, states, losses = step(stacked, states, rates, active, *batch)
        found = many.unstack(stacked)
        for number, (name, (adapter, state)) in enumerate(own.items()):
            if not adapter:
                continue
            part = jax.tree.map(lambda x, number=number: x[number], batch)
            with np.errstate(invalid="ignore"):  # a gradient of zero, clipped, in the branch that is not selected
                new, new_state, value = alone(params, adapter, state, rates[number], *part)
            assert_close(losses[number], value, GRADIENT)
            if active[number]:
                own[name] = new, new_state
            assert_close(found[name], own[name][0], GRADIENT)
    taken = [state[1].count for adapter, state in own.values() if adapter]
    assert [*states[1].count[: len(taken)]] == taken
    return stacked


FIRST = "LoRA, rsLoRA and DoRA"


@pytest.mark.parametrize(
    "name", [FIRST, *(pytest.param(name, marks=pytest.mark.sweep) for name in TOGETHER if name != FIRST)]
)
def test_training_a_stack_is_training_each_adapter_by_itself(name: str) -> None:
    params, adapters = random_adapters(name)
    params["head"] = normal(4, 3, seed=1)
    first = next(iter(adapters))
    if "LoRA" in name:
        adapters[first] |= {"head": lj.Adapter(lj.Full(), "", value=normal(4, 3, seed=5))}
    count = len(adapters)
    batches = [(normal(count, 8, 5, seed=at), normal(count, 8, 3, seed=50 + at)) for at in range(4)]
    if name == "with dropout":
        batches = [(*batch, jax.random.split(jax.random.key(at), count)) for at, batch in enumerate(batches)]
    stacked = assert_training_is_separate(params, adapters, batches)
    for path, part in stacked.members.trainable.items():  # padding and leaves of the base have not been trained
        assert not np.any(part.arrays["a" if "a" in part.arrays else next(iter(part.arrays))][count - 1]), path
        if part.variant.variant.__class__ is lj.LoRA:
            assert not np.any(part.a[1, :, adapters["ad1"][path].a.shape[-1] :])


def test_training_activated_adapters_is_training_each_by_itself() -> None:
    params, ids = {"w": normal(9, 5), "head": normal(5, 3)}, np.array([[1, 7, 8, 2, 3], [7, 8, 4, 4, 7]])
    variants = [lj.ALoRA(rank=2, alpha=3, invocation=[7, 8]), lj.ALoRA(rank=3, alpha=1, invocation=[7, 8])]
    adapters = {str(at): {"head": random(x, {"w": params["head"]}, at)["w"]} for at, x in enumerate(variants)}
    apply = lj.lora(lambda params, ids: params["w"][ids] @ params["head"])
    active = lj.active_tokens(adapters["0"], ids)
    loss = lambda params, adapter, ids: jnp.mean(apply(params, adapter, ids, token_weights=active) ** 2)  # noqa: E731
    tx = optax.sgd(1.0)

    def compute(params: Any, adapters: Any, ids: Any) -> Any:
        stacked = many.stack(adapters)
        step = many.train_step(loss, tx, in_axes=None)
        stacked, _, losses = step(params, stacked, jax.vmap(tx.init)(stacked.members.trainable), ids)
        gradients = [jax.value_and_grad(lambda ad: loss(params, ad, ids))(adapter) for adapter in adapters.values()]
        return stacked, losses, gradients

    stacked, losses, gradients = without_compiling(compute)(params, adapters, ids)
    for (name, found), value, (expected, gradient) in zip(
        many.unstack(stacked).items(), losses, gradients, strict=True
    ):
        assert_close(value, expected, GRADIENT)
        assert_close(found, jax.tree.map(lambda x, g: x - g, adapters[name], gradient), GRADIENT)


def small(count: int) -> tuple[Any, dict[str, Any]]:
    params = {"w": normal(5, 4, size=0.5), "head": normal(4, 3, seed=1)}
    return params, {f"ad{at}": random(lj.LoRA(rank=1 + at % 2, alpha=at + 1), params, at) for at in range(count)}


def test_other_rates_and_stopped_adapters_compile_nothing() -> None:
    params, adapters = small(3)
    traces = []

    def traced(*args: Any) -> jax.Array:
        traces.append(1)
        return loss_fn(*args)

    step = jax.jit(many.train_step(traced, TX))
    stacked = many.stack(adapters, rank=3)
    states = jax.vmap(TX.init)(stacked.members.trainable)
    batch = normal(3, 8, 5), normal(3, 8, 3, seed=1)
    actives = [[True] * 3, [True, False, True], [False] * 3]
    for at, active in enumerate(actives):
        before = stacked, states
        stacked, states, _ = step(
            params, stacked, states, *batch, rates=jnp.array(RATES[at : at + 3]), active=jnp.array(active)
        )
        unchanged = [
            bits(jax.tree.map(lambda x, at=at: x[at], (stacked, states)))
            == bits(jax.tree.map(lambda x, at=at: x[at], before))
            for at in range(3)
        ]
        assert unchanged == [not x for x in active]
    stacked = many.swap(stacked, "ad1", random(lj.RSLoRA(rank=3, alpha=0.1), params, 7))
    step(params, stacked, states, *batch, rates=jnp.array(RATES[:3]), active=jnp.array(actives[0]))
    assert len(traces) == 1


def test_an_argument_can_be_shared_and_rates_left_out() -> None:
    params, adapters = small(2)
    stacked = many.stack(adapters)
    states, x, y = jax.vmap(TX.init)(stacked.members.trainable), normal(8, 5), normal(2, 8, 3, seed=1)
    run = lambda in_axes, x, **options: without_compiling(  # noqa: E731
        lambda x, y: many.train_step(loss_fn, TX, in_axes=in_axes)(params, stacked, states, x, y, **options)
    )(x, y)
    repeated = jnp.stack([x, x])
    assert_close(run([None, 0], x), run(0, repeated, rates=jnp.ones(2), active=jnp.ones(2, bool)))


def test_what_a_step_of_a_stack_cannot_take_is_refused() -> None:
    params, adapters = small(2)
    stacked, step = many.stack(adapters), many.train_step(loss_fn, TX)
    with pytest.raises(lj.AdapterError, match=r"a `Stack`, as `many.stack` returns; got Member"):
        step(params, stacked.members, ())
    with pytest.raises(lj.AdapterError, match=r"`rates` for each of the 2 adapters; got \(\)"):
        step(params, stacked, (), rates=1.0)
    with pytest.raises(lj.AdapterError, match=r"`active` for each of the 2 adapters; got \(3,\)"):
        step(params, stacked, (), active=jnp.ones(3, bool))


def test_each_adapter_adds_its_own_step_and_the_base_is_there_once() -> None:
    case = benchmark.case(benchmark.TINY)
    one, two, three = (benchmark.count(case, number, sequences=3, tokens=5) for number in (1, 2, 3))
    # FLOPs: each adapter adds as many, and no more than its step alone takes.
    assert three.flops - two.flops == two.flops - one.flops <= one.flops
    assert three.compiled - two.compiled == pytest.approx(two.compiled - one.compiled, rel=0.03)
    assert three.compiled <= 1.03 * 3 * one.compiled  # a fusion may compute an element twice
    # Arguments: the base once, and the arrays, state, settings, rate and batch of each adapter.
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    each = size(benchmark.shapes_of(case, 1, 3, 5)[1:])
    for number, counts in enumerate((one, two, three), start=1):
        assert counts.arguments == pytest.approx(size(case.params) + number * each, rel=0.01)
    # Temporary bytes are activations and gradients of each adapter: no kernel is materialized.
    assert three.temporary - two.temporary <= 1.1 * one.temporary
    assert three.temporary <= 1.1 * 3 * one.temporary


@pytest.mark.parametrize("shardings", [(P("x"), P("x")), (P(None, "y"), P(None, None, "y")), (P("x", "y"), P())])
def test_a_sharded_stack_keeps_its_shardings(shardings: tuple[P, P]) -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params = {"w": normal(8, 4)}
    adapters = {name: random(lj.LoRA(rank=2, alpha=at), params, at) for at, name in enumerate(("one", "two"))}
    stacked = many.stack(adapters)

    def place(path: Any, x: jax.Array) -> jax.Array:
        spec = shardings[0] if path[-1].name == "a" else shardings[1] if path[-1].name == "b" else P()
        return jax.device_put(x, NamedSharding(mesh, spec))

    placed = jax.tree_util.tree_map_with_path(place, stacked)
    other = random(lj.RSLoRA(rank=1, alpha=3), params, 5)
    found = many.swap(placed, "two", other)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(placed), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)
    assert bits(many.unstack(found)) == bits({"one": adapters["one"], "two": other})


def test_a_stack_in_training_is_saved_and_restored_as_state(tmp_path: Path) -> None:
    adapters = small(3)[1]
    stacked = many.stack(adapters)
    state = {"stacked": stacked, "states": jax.vmap(TX.init)(stacked.members.trainable), "names": stacked.names}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.Composite(state=StateSave(state)))
    like = jax.tree.map(lambda x: x if isinstance(x, str) else jnp.zeros_like(x), state)
    with ocp.CheckpointManager(tmp_path) as manager:
        restored = manager.restore(0, args=ocp.args.Composite(state=StateRestore(like)))["state"]
    assert bits(restored["stacked"]) == bits(stacked)
    assert bits(many.unstack(restored["stacked"])) == bits(adapters)
    assert restored["names"] == stacked.names


def test_adapters_are_saved_one_by_one(tmp_path: Path) -> None:
    params, adapters = small(2)
    stacked = many.stack(adapters)
    with pytest.raises(lj.CheckpointError, match=r"got Stack.\n  Save other trees separately, with StateSave"):
        lj.save(tmp_path / "stack", stacked, base=params)
    with pytest.raises(
        lj.CheckpointError, match=r"got Padded\(.*at 'w'.\n  Save an adapter of a stack as `many.unstack`"
    ):
        lj.save(tmp_path / "member", many.select(stacked, "ad1"), base=params)
    lj.save(tmp_path / "ad1", many.unstack(stacked)["ad1"], base=params)
    assert bits(lj.restore(tmp_path / "ad1", base=params)) == bits(adapters["ad1"])
