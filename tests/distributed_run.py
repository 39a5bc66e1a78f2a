"""Trains in one of several processes, from a checkpoint if there is one, and saves. test_distributed.py runs it."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from helpers import bits
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.checkpoint import AdapterRestore, AdapterSave, StateRestore, StateSave

TX = optax.adam(3e-2)
SPEC = {"up/kernel": lj.LoRA(rank=4, alpha=8, dropout=0.1), "down/*": lj.RSLoRA(rank=2, alpha=4), "bias": lj.Full()}
# Shardings of the base on a mesh of data × model. The factors follow the base; the rank is replicated.
LAYOUTS = {
    "fsdp": {"up/kernel": P("data", "model"), "down/kernel": P(("data", "model")), "bias": P("data")},
    "data parallel": {"up/kernel": P(), "down/kernel": P(), "bias": P()},
    "mixed": {"up/kernel": P("data", "model"), "down/kernel": P(), "bias": P("data")},
}


def model(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]["kernel"] + params["bias"]) @ params["down"]["kernel"]


def make_base(layout: dict[str, P], mesh: Mesh) -> Any:
    draw = np.random.default_rng(0).normal
    base = {
        "up": {"kernel": draw(size=(16, 32)).astype(np.float32)},
        "down": {"kernel": draw(size=(32, 8)).astype(np.float32)},
        "bias": np.zeros(32, np.float32),
    }
    specs = {"up": {"kernel": layout["up/kernel"]}, "down": {"kernel": layout["down/kernel"]}, "bias": layout["bias"]}
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), base, specs)


def shardings_of(adapter: Any, layout: dict[str, P], mesh: Mesh) -> Any:
    def shard(path: str, part: lj.Adapter) -> lj.Adapter:
        rows, columns = (*layout[path], None, None)[:2]
        specs = {"a": P(rows), "b": P(None, columns), "value": layout[path]}
        return lj.Adapter(part.variant, part.axes, **{name: NamedSharding(mesh, specs[name]) for name in part.arrays})

    return {path: shard(path, part) for path, part in adapter.items()}


def initial(base: Any, layout: dict[str, P], mesh: Mesh) -> tuple[Any, Any]:
    """The adapter and state before the first step; each shard is made on its device."""
    everywhere = NamedSharding(mesh, P())

    def make(base: Any) -> tuple[Any, Any]:
        key = jax.random.key(0)  # traced, so that it is the same on all processes
        adapter = lj.init(key, base, SPEC)
        return adapter, {"opt_state": TX.init(adapter), "key": jax.random.fold_in(key, 1)}

    adapter, state = jax.eval_shape(make, base)
    places = shardings_of(adapter, layout, mesh)
    opt_state = optax.tree_map_params(
        TX, lambda _, place: place, state["opt_state"], places, transform_non_params=lambda _: everywhere
    )
    initialize = jax.jit(make, out_shardings=(places, {"opt_state": opt_state, "key": everywhere}))
    adapter, state = initialize(base)
    return adapter, {**state, "position": 0}


@jax.jit
def step(base: Any, adapter: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
    key, dropout_key = jax.random.split(state["key"])

    def loss(adapter: Any) -> jax.Array:
        return jnp.mean((lj.lora(model)(base, adapter, x, dropout_key=dropout_key) - y) ** 2)

    value, gradient = jax.value_and_grad(loss)(adapter)
    updates, opt_state = TX.update(gradient, state["opt_state"], adapter)
    return value, optax.apply_updates(adapter, updates), {"opt_state": opt_state, "key": key}


def batch(position: int, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """The rows from a position in the data on, sharded over all devices."""
    draw = np.random.default_rng(position).normal
    x, y = draw(size=(16, 16)).astype(np.float32), draw(size=(16, 8)).astype(np.float32)
    return jax.device_put((x, y), NamedSharding(mesh, P(("data", "model"))))


def digest(tree: Any, mesh: Mesh) -> str:
    """A digest of all arrays and values of a tree, whatever their shardings."""
    arrays, rest = [], []
    leaves, structure = jax.tree.flatten(tree)
    for leaf in leaves:
        (arrays if isinstance(leaf, jax.Array) else rest).append(leaf)
    replicated = jax.jit(lambda arrays: arrays, out_shardings=NamedSharding(mesh, P()))(arrays)
    return hashlib.sha256(repr((bits(replicated), rest, structure)).encode()).hexdigest()


def run(root: Path, name: str, mesh: Mesh, until: int) -> dict[str, Any]:
    """Trains until a step, with checkpoints in `root`; returns losses and digests of what was restored and saved."""
    layout, single = LAYOUTS[name], root / f"{name}, adapter"
    base = make_base(layout, mesh)
    adapter, state = initial(base, layout, mesh)
    report: dict[str, Any] = {"losses": []}
    with ocp.CheckpointManager(root / name, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        if (newest := manager.latest_step()) is not None:
            places = shardings_of(adapter, layout, mesh)
            items = {"adapter": AdapterRestore(base=base, shardings=places), "state": StateRestore(state)}
            restored = manager.restore(newest, args=ocp.args.Composite(**items))
            adapter, state = restored.adapter, restored.state
            report |= {"restored": digest((adapter, state), mesh), "adapter": digest(adapter, mesh)}
            if single.exists():
                report["single"] = digest(lj.restore(single, base=base, shardings=places), mesh)
        for number in range(newest or 0, until):
            x, y = batch(state["position"], mesh)
            position = state.pop("position")
            loss, adapter, state = step(base, adapter, state, x, y)
            state["position"] = position + len(x)
            report["losses"].append(float(loss))
            items = {"adapter": AdapterSave(adapter, base=base), "state": StateSave(state)}
            manager.save(number + 1, args=ocp.args.Composite(**items))
        lj.save(single, adapter, base=base)
    return report | {"saved": digest((adapter, state), mesh), "steps": list(manager.all_steps())}
