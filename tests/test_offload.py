"""Optimizer state and parameters in host memory: the same values, one layer on the device at a time."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import sweep, sweep_except
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from law import normal, total
from test_base import Split, dense, model, random_adapter

import lora_jax as lj
from lora_jax import testing
from lora_jax.checkpoint import StateRestore, StateSave
from lora_jax.optim import freeze_base, lora_fa, lora_plus, offload, select
from lora_jax.sharding import like_base, to_host

LORA = lj.LoRA(rank=2, alpha=3)


def kinds(tree: Any) -> list[str]:
    return [leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)]


def expected_kinds(state: Any) -> list[str]:
    return ["pinned_host" if leaf.ndim else "device" for leaf in jax.tree.leaves(state)]


# Optimizer state

BASE = {"up": {"kernel": normal(6, 4)}, "down": {"kernel": normal(4, 5, seed=1), "bias": normal(5, seed=2)}}
SPEC = {"**/kernel": LORA, "**/bias": lj.Full()}

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adamw": lambda: optax.adamw(1e-2),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "without state": lambda: optax.sgd(0.1),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(optax.linear_schedule(1e-2, 0.0, 5))),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2, weight_decay=0.1),
    "masked": lambda: optax.chain(optax.masked(optax.trace(0.9), select("a")), optax.scale(-0.1)),
    "accumulated": lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, 3), optax.sgd(0.1)),
    "factored": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "LoRA+": lambda: optax.chain(optax.adamw(1e-2), lora_plus(4.0)),
    "LoRA-FA": lambda: lora_fa(optax.adamw(1e-2)),
}


def adapter_of(base: Any) -> Any:
    return random_adapter(base, SPEC)


def placed(adapter: Any, state: Any, base: Any = BASE) -> Any:
    """Commits everything to devices, as the results of a step are; otherwise the second step would compile again."""
    return jax.device_put((adapter, state), like_base((adapter, state), base))


def train(tx: Any, adapter: Any) -> list[Any]:
    """The adapter and the state after each of four steps, which compile once."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(adapter: Any, state: Any, number: Any) -> tuple[Any, Any]:
        gradient = jax.tree.map(lambda leaf: jnp.sin(leaf + number), adapter)
        updates, state = tx.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state

    results = []
    adapter = jax.tree.map(jnp.copy, adapter)
    adapter, state = placed(adapter, tx.init(adapter))
    for number in range(4):
        adapter, state = step(adapter, state, jnp.float32(number))
        results.append((values(adapter), values(state), kinds(state), expected_kinds(state)))
    assert step._cache_size() == 1
    return results


def values(tree: Any) -> list[Any]:
    leaves = jax.tree.leaves(tree)
    return [np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in leaves]


@pytest.mark.parametrize("name", sweep_except(["chain", "accumulated", "LoRA+"], OPTIMIZERS))
def test_the_values_are_those_of_the_optimizer_and_the_state_stays_on_the_host(name: str) -> None:
    expected, got = (train(tx, adapter_of(BASE)) for tx in (OPTIMIZERS[name](), offload(OPTIMIZERS[name]())))
    for (*plain, _, _), (*offloaded, kinds_got, kinds_expected) in zip(expected, got, strict=True):
        jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), offloaded, plain)
        assert kinds_got == kinds_expected


def test_the_state_is_moved_outside_jit_too() -> None:
    adapter = adapter_of(BASE)
    tx = offload(optax.adam(1e-2))
    updates, state = tx.update(adapter, tx.init(adapter), adapter)
    assert set(kinds(updates)) == {"device"}
    assert kinds(state) == expected_kinds(state)


def test_the_host_memory_of_donated_state_is_reused() -> None:
    adapter = adapter_of(BASE)
    tx = offload(optax.adam(1e-2))
    state = tx.init(adapter)
    jax.jit(lambda adapter, state: tx.update(adapter, state), donate_argnums=(0, 1))(adapter, state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_only_the_state_can_be_donated_if_all_shardings_are_given() -> None:
    adapter = adapter_of(BASE)
    tx = offload(optax.adam(1e-2))
    state = tx.init(adapter)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (adapter, state))
    step = jax.jit(tx.update, donate_argnums=1, in_shardings=shardings, out_shardings=shardings)
    _, after = step(adapter, state)
    assert kinds(after) == expected_kinds(after)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_the_learning_rate_can_be_changed_without_compiling_again() -> None:
    adapter = adapter_of(BASE)
    tx = offload(optax.inject_hyperparams(optax.adam)(learning_rate=1e-2))
    step, (adapter, state) = jax.jit(tx.update), placed(adapter, tx.init(adapter))
    once, state = step(adapter, state)
    state.hyperparams["learning_rate"] = jnp.zeros_like(state.hyperparams["learning_rate"])
    again, _ = step(adapter, state)
    assert step._cache_size() == 1
    assert float(abs(once["up/kernel"].a).max()) > 0 == float(abs(again["up/kernel"].a).max())


def test_shapes_of_the_state_are_those_of_the_optimizer() -> None:
    adapter = adapter_of(BASE)
    expected, got = (jax.eval_shape(tx.init, adapter) for tx in (optax.adamw(1e-2), offload(optax.adamw(1e-2))))
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)


def test_extra_arguments_reach_the_optimizer() -> None:
    adapter = adapter_of(BASE)
    tx = offload(optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)))
    _, state = jax.jit(tx.update)(adapter, tx.init(adapter), adapter, value=jnp.float32(1))
    assert float(state[1].best_value) == 1


@pytest.mark.parametrize("order", ["around", "inside"])
def test_it_combines_with_freeze_base(order: str) -> None:
    tree = {"base": BASE, "adapter": adapter_of(BASE)}
    adam = optax.adam(1e-2)
    tx = offload(freeze_base(adam)) if order == "around" else freeze_base(offload(adam))
    updates, state = jax.jit(tx.update)(tree, tx.init(tree), tree)
    expected, _ = jax.jit(freeze_base(adam).update)(tree, freeze_base(adam).init(tree), tree)
    assert helpers.bits(updates) == helpers.bits(expected)
    assert kinds(state) == expected_kinds(state)


# On a mesh


def mesh_of(axis_type: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


SHARDED = {"up": {"kernel": ("data", "model")}, "down": {"kernel": ("model", "data"), "bias": ()}}


def sharded_base(mesh: Mesh) -> Any:
    base = {"up": {"kernel": normal(8, 16)}, "down": {"kernel": normal(16, 4, seed=1), "bias": normal(4, seed=2)}}
    return jax.tree.map(lambda leaf, names: jax.device_put(leaf, NamedSharding(mesh, P(*names))), base, SHARDED)


def mlp(params: Any, x: Any) -> Any:
    place = jax.typeof(x).sharding if jax.typeof(x).sharding.spec[0] else None  # with explicit axes
    hidden = jnp.tanh(jnp.dot(x, params["up"]["kernel"], out_sharding=place))
    return jnp.dot(hidden, params["down"]["kernel"], out_sharding=place) + params["down"]["bias"]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_state_and_parameters_on_a_mesh_keep_their_shardings(axis_type: AxisType) -> None:
    mesh = mesh_of(axis_type)
    base = sharded_base(mesh)
    adapter = adapter_of(base)
    x = jax.device_put(normal(8, 8, seed=5), NamedSharding(mesh, P("data")))

    def trained(tx: Any, params: Any) -> Any:
        results = placed(jax.tree.map(jnp.copy, adapter), tx.init(adapter), base)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, results)

        @functools.partial(jax.jit, donate_argnums=(1, 2), out_shardings=shardings)
        def step(params: Any, adapter: Any, state: Any) -> tuple[Any, Any]:
            gradient = jax.grad(lambda adapter: total(lj.lora(mlp, form="factored")(params, adapter, x)))(adapter)
            updates, state = tx.update(gradient, state, adapter)
            return optax.apply_updates(adapter, updates), state

        for _ in range(3):
            results = step(params, *results)
        assert step._cache_size() == 1
        return results

    with jax.set_mesh(mesh):
        (expected, state), (got, state_got) = (
            trained(optax.adam(1e-2), base),
            trained(offload(optax.adam(1e-2)), to_host(base)),
        )
    helpers.assert_close(got, expected)
    assert kinds(state_got) == expected_kinds(state_got)
    for one, other in zip(jax.tree.leaves((got, state_got)), jax.tree.leaves((expected, state)), strict=True):
        assert one.sharding.with_memory_kind("device").is_equivalent_to(other.sharding, one.ndim)


def test_like_base_keeps_the_memory_kind_of_arrays() -> None:
    base = sharded_base(mesh_of())
    adapter = adapter_of(base)
    state = offload(optax.adam(1e-2)).init(adapter)
    for params in (base, to_host(base), to_host(BASE)):
        found = like_base((adapter, state), params)
        assert [sharding.memory_kind for sharding in jax.tree.leaves(found)] == kinds((adapter, state))


# Parameters


def host_model(*, scanned: bool) -> tuple[Any, Any, Any, Any]:
    apply, params, tokens = model(scanned=scanned)
    return apply, params, to_host(params), tokens


@pytest.mark.parametrize("variant", [lj.LoRA, sweep(lj.DoRA)])
@pytest.mark.parametrize("adapted", ["**/{kernel,embedding}", sweep("**/query/kernel")])
@pytest.mark.parametrize("scanned", [False, True])
def test_a_model_in_host_memory_matches_merged_kernels(scanned: bool, adapted: str, variant: Any) -> None:
    apply, params, on_host, tokens = host_model(scanned=scanned)
    adapter = random_adapter(on_host, {adapted: variant(rank=2, alpha=3)}, lj.kernels(apply, on_host, tokens))
    assert set(kinds(adapter)) == {"device"}
    got = jax.jit(jax.value_and_grad(lambda adapter, params: total(lj.lora(apply)(params, adapter, tokens))))(
        adapter, on_host
    )
    expected = jax.jit(jax.value_and_grad(lambda adapter: total(apply(lj.merge(params, adapter), tokens))))(adapter)
    helpers.assert_close(got, expected, helpers.GRADIENT)
    assert set(kinds(got)) == {"device"}


def layer(x: Any, w: Any) -> tuple[Any, None]:
    return jnp.tanh(x @ w), None


def unrolled(params: Any, x: Any) -> Any:
    for number in range(3):
        x = jnp.tanh(x @ params["w"][number])
    return x


STACKS: dict[str, Callable[..., Any]] = {
    "scan": lambda params, x: jax.lax.scan(layer, x, params["w"])[0],
    "scan with remat": lambda params, x: jax.lax.scan(jax.checkpoint(layer), x, params["w"])[0],
    "unrolled": unrolled,
    "selected in a loop": lambda params, x: jax.lax.scan(lambda x, i: layer(x, params["w"][i]), x, jnp.arange(3))[0],
    "flipped": lambda params, x: jax.lax.scan(layer, x, params["w"], reverse=True)[0],
}


@pytest.mark.parametrize("variant", [lj.LoRA, sweep(lj.DoRA)])
@pytest.mark.parametrize("name", STACKS)
def test_one_layer_is_on_the_device_at_a_time(name: str, variant: Any) -> None:
    apply, x = STACKS[name], normal(5, 4, seed=3)
    params = {"w": normal(3, 4, 4)}
    adapter = random_adapter(params, {"w": variant(rank=2, alpha=3, axes="bio")})

    def gradient(adapter: Any, params: Any, x: Any) -> Any:
        return jax.value_and_grad(lambda adapter: total(lj.lora(apply, form="factored")(params, adapter, x)))(adapter)

    on_host = to_host(params)
    assert (3, 4, 4) not in testing.shapes_made(gradient, adapter, on_host, x)
    helpers.assert_close(
        jax.jit(gradient)(adapter, on_host, x), jax.jit(gradient)(adapter, params, x), helpers.GRADIENT
    )


@pytest.mark.parametrize("scanned", [False, True])
def test_no_kernel_is_kept_on_the_device_for_the_backward_pass(scanned: bool) -> None:
    apply, params, on_host, tokens = host_model(scanned=scanned)
    adapter = random_adapter(params, {"**/kernel": LORA}, lj.kernels(apply, params, tokens))
    _, backward = jax.vjp(lambda adapter: total(lj.lora(apply)(on_host, adapter, tokens)), adapter)
    shapes = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    found = [leaf for leaf in jax.tree.leaves(backward) if leaf.shape in shapes]
    assert found
    assert set(kinds(found)) == {"pinned_host"}


def test_a_slice_with_steps_is_taken_on_the_device() -> None:
    params, x = {"w": normal(6, 8)}, normal(3, 6, seed=1)
    adapter = random_adapter(params, {"w": lj.LoRA(rank=2, alpha=3, axes="io")})
    run = jax.jit(lj.lora(lambda params, x: x @ params["w"][:, ::2]))
    helpers.assert_close(run(to_host(params), adapter, x), run(params, adapter, x))


def test_a_packed_leaf_may_be_in_host_memory() -> None:
    params, x = {"w": Split.of(normal(3, 4, 4)), "bias": normal(4, seed=2)}, normal(5, 4, seed=3)
    on_host = to_host(params, paths="w")
    assert isinstance(on_host["w"], Split)
    assert kinds([on_host["w"].high, on_host["bias"]]) == ["pinned_host", "device"]
    adapter = random_adapter(params, {"w": lj.LoRA(rank=2, alpha=3, axes="bio")})
    run = lj.lora(lambda params, x: jax.lax.scan(layer, x, params["w"])[0] + params["bias"])
    helpers.assert_close(jax.jit(run)(on_host, adapter, x), jax.jit(run)(dense(params), adapter, x))


def test_a_model_runs_outside_jit() -> None:
    apply, params, on_host, tokens = host_model(scanned=True)
    adapter = random_adapter(params, {"**/kernel": LORA}, lj.kernels(apply, params, tokens))
    helpers.assert_close(lj.lora(apply)(on_host, adapter, tokens), lj.lora(apply)(params, adapter, tokens))


@pytest.mark.parametrize("transform", [jax.jit, lambda function: function], ids=["jit", "eager"])
def test_merge_keeps_parameters_in_host_memory(transform: Any) -> None:
    adapter = random_adapter(BASE, {"**/kernel": LORA})
    merged = transform(lj.merge)(to_host(BASE), adapter)
    helpers.assert_close(merged, lj.merge(BASE, adapter))
    assert set(kinds(merged)) == {"pinned_host"}


def test_initializations_from_weights_accept_parameters_in_host_memory() -> None:
    spec = {"**/kernel": lj.DoRA(rank=2, alpha=3), "**/bias": lj.Full()}
    got, expected = (lj.init(jax.random.key(0), base, spec) for base in (to_host(BASE), BASE))
    helpers.assert_close(got, expected)
    assert set(kinds(got)) == {"device"}


def test_selected_paths_are_moved() -> None:
    moved = to_host(BASE, paths=["up/*", "down/*"], exclude="**/bias")
    assert kinds([moved["up"]["kernel"], moved["down"]["kernel"], moved["down"]["bias"]]) == [
        *2 * ["pinned_host"],
        "device",
    ]
    assert helpers.bits(moved) == helpers.bits(BASE)


def test_numpy_arrays_boxes_and_other_leaves_are_accepted() -> None:
    tree = {"box": nn.Partitioned(jnp.ones((2, 2)), ("x", None)), "array": np.ones(3, np.float32), "name": "gelu"}
    moved = to_host(tree)
    assert isinstance(moved["box"], nn.Partitioned)
    assert kinds([moved["box"].value, moved["array"]]) == ["pinned_host"] * 2
    assert moved["name"] == "gelu"


def test_shapes_with_shardings_are_accepted() -> None:
    place = NamedSharding(mesh_of(), P("data"))
    leaf = jax.ShapeDtypeStruct((4, 3), jnp.bfloat16, sharding=place)
    found = to_host({"w": leaf, "b": jax.ShapeDtypeStruct((3,), jnp.float32)})
    assert (found["w"].shape, found["w"].dtype) == (leaf.shape, leaf.dtype)
    assert found["w"].sharding == place.with_memory_kind("pinned_host")
    assert found["b"].sharding.memory_kind == "pinned_host"


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(lj.SpecError, match=r"Expected every pattern to match a leaf; 'missing/\*' matches none of 3"):
        to_host(BASE, exclude="missing/*")


class Memory:
    kind = "device"


class Device:
    platform = "some_backend"

    def addressable_memories(self) -> list[Memory]:
        return [Memory()]


@pytest.mark.parametrize("function", [offload(optax.adam(1e-3)).init, to_host], ids=["offload", "to_host"])
def test_a_backend_without_pinned_host_memory_is_an_error(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    match = r"Expected a backend with 'pinned_host' memory; 'some_backend' has the memory kinds \['device'\]"
    with pytest.raises(lj.UnsupportedError, match=match) as caught:
        function({"w": np.ones((2, 2), np.float32)})
    assert isinstance(caught.value, NotImplementedError)
    assert "Keep the arrays in device memory" in str(caught.value)


# Checkpoints


def test_a_restored_state_is_in_the_memory_of_the_initial_state(tmp_path: Path) -> None:
    adapter = adapter_of(BASE)
    tx = offload(optax.adam(1e-2))
    _, state = jax.jit(tx.update)(adapter, tx.init(adapter))
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(0, args=ocp.args.Composite(state=StateSave(state)))
        manager.wait_until_finished()
        like = {"device": optax.adam(1e-2).init(adapter), "pinned_host": tx.init(adapter)}
        found = {
            kind: manager.restore(0, args=ocp.args.Composite(state=StateRestore(tree)))["state"]
            for kind, tree in like.items()
        }
    for kind, restored in found.items():
        assert helpers.bits(restored) == helpers.bits(state)
        assert kinds(restored) == kinds(like[kind])


# Planning


def shapes_of(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P())), tree)


def test_a_plan_shows_what_is_on_the_host() -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    params, x = shapes_of({"w": normal(6, 64, 64)}, mesh), jax.ShapeDtypeStruct((8, 64), jnp.float32)
    spec = {"w": lj.LoRA(rank=4, alpha=8)}

    def planned(tx: Any, params: Any, **options: Any) -> Any:
        return lj.plan(STACKS["scan with remat"], params, spec, tx, mesh, x, **options)

    plain, found = planned(optax.adam(1e-3), params), planned(offload(optax.adam(1e-3)), to_host(params))
    base = 4 * 6 * 64 * 64
    assert (found.lora.parameters, found.lora.adapter, found.lora.optimizer) == (
        plain.lora.parameters,
        plain.lora.adapter,
        plain.lora.optimizer,
    )
    assert found.lora.host == base + found.lora.optimizer - 4  # the count stays on the device
    assert found.full.host == found.full.optimizer - 4
    saved = (plain.lora.peak - plain.lora.temporary) - (found.lora.peak - found.lora.temporary)
    assert saved == found.lora.host
    assert plain.lora.host == 0
    assert "on the host" in str(found)
    assert "on the host" not in str(plain)
    assert found.lora.flops == planned(optax.adam(1e-3), params, form="factored").lora.flops
