"""Training that resumes from a checkpoint equals uninterrupted training bit for bit, on any mesh."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import bits
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.checkpoint import AdapterRestore, AdapterSave, StateRestore, StateSave

DATA = np.random.default_rng(0).normal(size=(256, 16)).astype(np.float32)
TX = optax.adamw(1e-2)
SPEC = {"up/kernel": lj.LoRA(rank=4, alpha=8, dropout=0.2), "down/kernel": lj.RSLoRA(rank=2, alpha=4)}
AUTO = (AxisType.Auto,) * 2


def model(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


@dataclasses.dataclass(frozen=True)
class Place:
    """The placement of a run: a mesh of data × model, or JAX's default device."""

    sizes: tuple[int, int] | None

    def sharding(self, *axes: str | None) -> Any:
        return self.sizes and NamedSharding(jax.make_mesh(self.sizes, ("data", "model"), axis_types=AUTO), P(*axes))

    @property
    def base(self) -> Any:
        draw = np.random.default_rng(1).normal
        kernels = draw(size=(16, 32)).astype(np.float32), draw(size=(32, 8)).astype(np.float32)
        up, down = map(jax.device_put, kernels, (self.sharding("data", "model"), self.sharding("model", "data")))
        return {"up": {"kernel": up}, "down": {"kernel": down}}

    @property
    def shardings(self) -> dict[str, Any]:
        """The shardings of the adapter, which follow the base."""
        up, down = lj.LoRA(rank=4, alpha=8, dropout=0.2), lj.RSLoRA(rank=2, alpha=4)
        return {
            "up/kernel": lj.Adapter(up, "io", a=self.sharding("data"), b=self.sharding(None, "model")),
            "down/kernel": lj.Adapter(down, "io", a=self.sharding("model"), b=self.sharding(None, "data")),
        }


ONE, EIGHT, OTHER = Place(None), Place((2, 4)), Place((4, 2))


def start(place: Place, seed: int, impl: str = "threefry2x32") -> tuple[Any, Any, Any]:
    base = place.base
    adapter = lj.init(jax.random.key(seed), base, SPEC)
    adapter = jax.tree.map(jax.device_put, adapter, place.shardings) if place.sizes else adapter
    return base, adapter, {"opt_state": TX.init(adapter), "key": jax.random.key(seed, impl=impl), "position": 0}


@jax.jit
def training_step(base: Any, adapter: Any, opt_state: Any, key: jax.Array, x: jax.Array) -> tuple[Any, Any, jax.Array]:
    key, dropout_key = jax.random.split(key)
    gradient = jax.grad(lambda ad: jnp.mean(lj.lora(model)(base, ad, x, dropout_key=dropout_key) ** 2))(adapter)
    updates, opt_state = TX.update(gradient, opt_state, adapter)
    return optax.apply_updates(adapter, updates), opt_state, key


def train(base: Any, adapter: Any, state: Any, steps: int) -> tuple[Any, Any]:
    for _ in range(steps):
        end = state["position"] + 16
        x = DATA[state["position"] : end]
        adapter, opt_state, key = training_step(base, adapter, state["opt_state"], state["key"], x)
        state = {"opt_state": opt_state, "key": key, "position": end}
    return adapter, state


def items(adapter: Any, state: Any) -> ocp.args.Composite:
    return ocp.args.Composite(adapter=adapter, state=state)


# Each case in one of the placements; `make kills` runs all combinations.
CASES = [
    (ONE, "rbg", False),
    (EIGHT, "threefry2x32", True),
    pytest.param(ONE, "threefry2x32", True, marks=pytest.mark.slow),
    pytest.param(EIGHT, "rbg", False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("place", "impl", "asynchronous"), CASES, ids=str)
def test_five_steps_and_five_more_are_ten(place: Place, impl: str, asynchronous: bool, tmp_path: Path) -> None:
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=asynchronous)
    base, adapter, state = start(place, 3, impl)
    straight = train(base, adapter, state, 10)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for step in range(1, 6):
            adapter, state = train(base, adapter, state, 1)
            assert manager.save(step, args=items(AdapterSave(adapter, base=base), StateSave(state)))
    del adapter, state

    base, other, like = start(place, 8, impl)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        places = place.shardings if place.sizes else None
        args = items(AdapterRestore(base=base, shardings=places), StateRestore(like))
        restored = manager.restore(manager.latest_step(), args=args)
    assert restored.state["position"] == 80
    for got, expected in zip(jax.tree.leaves([*restored.values()]), jax.tree.leaves([other, like]), strict=True):
        if isinstance(got, jax.Array):
            assert (got.sharding, got.committed) == (expected.sharding, expected.committed)
    assert bits(train(base, restored.adapter, restored.state, 5)) == bits(straight)


@pytest.mark.parametrize(("before", "after"), [*itertools.permutations((ONE, EIGHT, OTHER), 2)], ids=str)
def test_a_run_is_restored_on_other_devices_bit_for_bit(before: Place, after: Place, tmp_path: Path) -> None:
    base, adapter, state = start(before, 3)
    strange = jax.tree.map(lambda leaf: leaf.at[..., :2].set(jnp.array([-0.0, jnp.nan])), adapter)
    adapter, state = strange, {**train(base, adapter, state, 1)[1], "keys": jax.random.split(jax.random.key(4), 8)}
    state["keys"] = jax.device_put(state["keys"], before.sharding("data"))
    base, _, like = start(after, 8)
    like["keys"] = jax.device_put(jax.random.split(jax.random.key(0), 8), after.sharding("model"))
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=items(AdapterSave(adapter, base=before.base), StateSave(state)))
        manager.wait_until_finished()
        places = after.shardings if after.sizes else None
        restored = manager.restore(0, args=items(AdapterRestore(base=base, shardings=places), StateRestore(like)))
    assert bits((restored.adapter, restored.state)) == bits((adapter, state))
    if places:
        assert [leaf.sharding for leaf in jax.tree.leaves(restored.adapter)] == jax.tree.leaves(places)
        assert restored.state["opt_state"][0].mu["up/kernel"].a.sharding == places["up/kernel"].a
        assert restored.state["keys"].sharding == after.sharding("model")


def test_each_device_writes_its_shard(tmp_path: Path) -> None:
    base, adapter, _ = start(EIGHT, 3)
    lj.save(tmp_path, adapter, base=base)
    written = json.loads((tmp_path / "0" / "adapter" / "array_metadatas" / "process_0").read_text())["array_metadatas"]
    parts = [(entry["array_metadata"]["param_name"], entry["array_metadata"]["write_shape"]) for entry in written]
    # The rows are sharded over some of the eight devices; devices with the same rows share the writing.
    assert {name: 8 * np.prod(shape) for name, shape in parts} == {
        f"{path}.{name}": leaf.size for path, part in adapter.items() for name, leaf in part.arrays.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Retention of steps

LATEST, EVERY = ocp.checkpoint_managers.LatestN(2), ocp.checkpoint_managers.EveryNSteps(4)
KEPT: dict[str, tuple[dict[str, Any], list[int]]] = {
    "newest": ({"max_to_keep": 2}, [8, 9]),
    "policies": (
        {"preservation_policy": ocp.checkpoint_managers.AnyPreservationPolicy([LATEST, EVERY])},
        [0, 4, 8, 9],
    ),
    "interval": ({"save_interval_steps": 3, "max_to_keep": 3}, [3, 6, 9]),
    "best": ({"max_to_keep": 2, "best_fn": lambda metrics: metrics["score"]}, [2, 3]),
}


@pytest.mark.parametrize("name", KEPT)
def test_the_retained_steps_can_be_restored(name: str, tmp_path: Path) -> None:
    options, kept = KEPT[name]
    adapters = [jax.tree.map(lambda leaf, step=step: leaf + step, start(ONE, 0)[1]) for step in range(10)]
    base = ONE.base
    with ocp.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(**options)) as manager:
        for step, adapter in enumerate(adapters):
            args = items(AdapterSave(adapter, base=base), StateSave({"step": step, "mu": adapter}))
            manager.save(step, args=args, metrics={"score": -abs(step - 2.6)})
    with ocp.CheckpointManager(tmp_path) as manager:
        assert list(manager.all_steps()) == kept
        for step in kept:
            like = StateRestore({"step": 0, "mu": adapters[0]})
            restored = manager.restore(step, args=items(AdapterRestore(base=base), like))
            assert bits(restored.adapter) == bits(restored.state["mu"]) == bits(adapters[step])
            assert restored.state["step"] == step
    assert bits(lj.restore(tmp_path, base=base)) == bits(adapters[9 if 9 in kept else 3])


# ---------------------------------------------------------------------------------------------------------------------
# States


def there_and_back(state: Any, path: Path, like: Any = None) -> Any:
    with ocp.CheckpointManager(path) as manager:
        manager.save(0, args=ocp.args.Composite(state=StateSave(state)))
        manager.wait_until_finished()
        args = ocp.args.Composite(state=StateRestore(state if like is None else like))
        return manager.restore(0, args=args).state


def test_a_state_may_have_arrays_keys_numbers_and_strings(tmp_path: Path) -> None:
    state = {
        "python": [True, 2**70, 0.1, float("inf"), "ü/λ", None],
        "numpy": (np.arange(3), np.float64(0.1), np.array(1, np.int8)),
        "jax": [jnp.ones(3, jnp.bfloat16), jnp.array(7, jnp.uint8), jnp.array(True)],
        "keys": [jax.random.key(3), jax.random.PRNGKey(3), jax.random.split(jax.random.key(3, impl="rbg"), (2, 3))],
        "a/b": {"a": jnp.zeros(2)},
        "a": {"b/a": jnp.ones(2)},
    }
    restored = there_and_back(state, tmp_path)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(jax.tree.map(lambda x: np.asarray(x) if isinstance(x, np.generic) else x, state))


def test_an_asynchronous_save_writes_the_state_at_the_time_of_the_call(tmp_path: Path) -> None:
    def make(step: int) -> dict[str, Any]:
        keys = jax.random.split(jax.random.key(step), 100_000)
        return {"keys": keys, "mu": jnp.full((1000, 1000), 1.0 + step), "order": np.full(100_000, step)}

    spoil = jax.jit(lambda mu: mu * 0 - 1, donate_argnums=0)
    use = jax.jit(jax.vmap(lambda key: jax.random.fold_in(key, 1)), donate_argnums=0)
    with ocp.CheckpointManager(tmp_path) as manager:
        for step in range(3):
            state = make(step)
            manager.save(step, args=ocp.args.Composite(state=StateSave(state)))
            state["order"][:] = -1
            jax.block_until_ready((spoil(state.pop("mu")), use(state.pop("keys"))))
            manager.wait_until_finished()
            restored = manager.restore(step, args=ocp.args.Composite(state=StateRestore(make(9))))
            assert bits(restored.state) == bits(make(step))


def test_like_may_be_a_tree_of_shapes(tmp_path: Path) -> None:
    adapter = start(ONE, 3)[1]
    state = {"opt_state": TX.init(adapter), "key": jax.random.key(3)}
    sharding = EIGHT.sharding("data")
    like = jax.eval_shape(lambda: state)
    like["key"] = jax.ShapeDtypeStruct((), like["key"].dtype, sharding=EIGHT.sharding())
    restored = there_and_back(state, tmp_path, like)
    assert bits(restored) == bits(state)
    assert restored["key"].sharding == EIGHT.sharding()
    assert not restored["opt_state"][0].count.committed
    abstract = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(sharding.mesh.abstract_mesh, P()))
    with pytest.raises(lj.CheckpointError, match="on devices that divides the array at \\['n'\\]; got"):
        there_and_back({"n": jnp.array(1)}, tmp_path / "abstract", {"n": abstract})


def test_values_that_jax_would_truncate_are_an_error(tmp_path: Path) -> None:
    state = {"n": np.arange(3.0)}
    with pytest.raises(lj.CheckpointError, match=r"Expected to restore float64 at \['n'\], in "):
        there_and_back(state, tmp_path, {"n": jax.ShapeDtypeStruct((3,), np.float64)})


UNLIKE: dict[str, tuple[Any, str]] = {
    "optimizer": (
        {"opt_state": optax.sgd(1.0).init({"w": jnp.ones(3)}), "step": 0},
        "['opt_state'][0].count is not in",
    ),
    "more": (
        {"opt_state": TX.init({"w": jnp.ones(3), "v": jnp.ones(3)}), "step": 0},
        ".mu['v'] is in `like` and was not",
    ),
    "shape": (
        {"opt_state": TX.init({"w": jnp.ones(4)}), "step": 0},
        "in `like` it is {'shape': [4], 'dtype': 'float32'}",
    ),
    "dtype": ({"opt_state": TX.init({"w": jnp.ones(3, jnp.bfloat16)}), "step": 0}, "[3], 'dtype': 'bfloat16'}"),
    "type": ({"opt_state": TX.init({"w": jnp.ones(3)}), "step": 0.5}, "['step'] was {'type': 'int'}; in `like` it is"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_a_state_of_another_structure_is_an_error(name: str, tmp_path: Path) -> None:
    like, text = UNLIKE[name]
    with pytest.raises(lj.CheckpointError) as caught:
        there_and_back({"opt_state": TX.init({"w": jnp.ones(3)}), "step": 7}, tmp_path, like)
    assert text in str(caught.value)
    assert f"shapes and dtypes of the state in {tmp_path}/0/state; got " in str(caught.value)
    assert "the same optimizer, for the same adapter" in str(caught.value)


UNSAVABLE: dict[str, tuple[Any, str]] = {
    "object": ({"n": jnp.ones(3), "f": print}, "Expected arrays to save; got builtin_function_or_method as ['f']."),
    "shapes": (jax.eval_shape(lambda: {"w": jnp.ones(3)}), "got ShapeDtypeStruct as ['w']."),
    "nothing": (
        {"step": 1},
        "Expected a state with nonempty arrays, because Orbax cannot save others; got no arrays.",
    ),
    "empty": ({"w": jnp.ones((0, 3))}, "got empty arrays, ['w']."),
}


@pytest.mark.parametrize("name", UNSAVABLE)
def test_a_state_that_cannot_be_saved_is_an_error(name: str) -> None:
    state, text = UNSAVABLE[name]
    with pytest.raises(lj.CheckpointError) as caught:
        StateSave(state)
    assert text in str(caught.value)


def test_the_description_of_a_state_can_be_read_without_the_state(tmp_path: Path) -> None:
    there_and_back({"key": jax.random.key(3), "step": 7}, tmp_path)
    with ocp.CheckpointManager(tmp_path, item_handlers={"state": lj.checkpoint.StateHandler()}) as manager:
        described = manager.item_metadata(0).state["state"]
    assert described == {
        "['key']": {"shape": [], "dtype": "key<fry>", "impl": "threefry2x32"},
        "['step']": {"type": "int", "value": 7},
    }
