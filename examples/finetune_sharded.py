"""Fine-tunes the demo's model on a mesh of devices, 2 (data) × 4 (model), which the CPU simulates unless told not to.

    python examples/finetune_sharded.py                       # 8 simulated devices
    python examples/finetune_sharded.py --short --rehearse    # a few steps, killed in the middle and begun again
    python examples/finetune_sharded.py --plan                # what a step takes of each device; trains nothing
    python examples/finetune_sharded.py --simulate 0 --data 2 --model 4 --dtype bfloat16      # 8 TPU or GPU devices
    python examples/finetune_sharded.py --simulate 0 --distributed --data 16 --model 4        # on every host of a pod

The base is cut along the mesh and frozen, the adapter is cut as its base is, and both stay where they are. Run again
with the same --out, it goes on from the newest whole checkpoint as if it had never stopped, on this mesh or another.
"""

import argparse
import functools
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import lora_jax as lj
import trec
from finetune_trec import (
    BATCH,
    MODEL,
    PEAK_LEARNING_RATE,
    SEED,
    SHORT,
    SMOOTHING,
    SPEC,
    WARM_UP,
    accuracy,
    base_params,
    compile_quickly,
    console,
    evaluate,
)
from lora_jax.checkpoint import AdapterRestore, AdapterSave, StateRestore, StateSave

# Heads and hidden units are cut along `model`: each device has its own, and what they make is summed. The rest of the
# base is on every device; with --fsdp it is cut along `data`, and gathered a layer at a time where it is used.
CUTS: list[tuple[str, P]] = [
    (r"attention/(query|key|value)/kernel$", P(None, "model")),
    (r"attention/(query|key|value)/bias$", P("model")),
    (r"attention/out/kernel$", P("model")),
    (r"mlp/up/kernel$", P(None, "model")),
    (r"mlp/up/bias$", P("model")),
    (r"mlp/down/kernel$", P("model")),
    (r"embeddings/.*$", P(None, "model")),
]


def shardings_of(params: Any, mesh: Mesh, *, fsdp: bool) -> Any:
    """Where each leaf goes: by `CUTS`, and with `fsdp` a matrix also along `data`, where that divides it."""

    def place(keys: Any, leaf: Any) -> NamedSharding:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        cut = next((cut for pattern, cut in CUTS if re.search(pattern, path)), P())
        axes = [*cut, *[None] * (leaf.ndim - len(cut))][: leaf.ndim]
        free = [axis for axis in range(leaf.ndim) if axes[axis] is None and leaf.shape[axis] % mesh.shape["data"] == 0]
        if fsdp and leaf.ndim > 1 and free:
            axes[free[0]] = "data"
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(place, params)


def load(dtype: Any) -> Any:
    """The frozen base, the encoder in `dtype`: what it computes is in it too. Adapter and head stay in float32."""
    params = jax.tree.map(np.asarray, base_params()["params"])
    encoder = jax.tree.map(lambda leaf: leaf.astype(dtype), params["encoder"])
    return {"params": params | {"encoder": encoder}}


def loss_of(adapter: Any, params: Any, ids: Array, mask: Array, labels: Array) -> Array:
    """The mean cross-entropy of a batch, in float32: `ids` and `mask` are (batch, tokens), `labels` (batch,)."""
    logits = lj.lora(MODEL.apply)(params, adapter, ids, mask).astype(jnp.float32)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, trec.LABELS), SMOOTHING)
    return optax.softmax_cross_entropy(logits, targets).mean()


def make_step(tx: optax.GradientTransformation) -> Callable[..., tuple[Any, Any, Array]]:
    """One update, its gradient summed over the micro-batches: ids (micro, batch, tokens), labels (micro, batch)."""

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(params: Any, adapter: Any, opt_state: Any, ids: Array, mask: Array, labels: Array) -> Any:
        def add(total: Any, batch: tuple[Array, Array, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of)(adapter, params, *batch)), None

        none = jax.tree.map(jnp.zeros_like, (jnp.float32(0), adapter))
        total, _ = lax.scan(add, none, (ids, mask, labels))
        loss, gradients = jax.tree.map(lambda x: x / len(ids), total)
        updates, opt_state = tx.update(gradients, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, loss

    return step


def batches_from(tokens: trec.Tokens, size: int, step: int) -> Iterator[trec.Batch]:
    """The batches of training from a step on: the step is all that says where in the data it is."""
    per_epoch = trec.batches_per_epoch(tokens, size)
    for epoch in itertools.count(step // per_epoch):
        batches = trec.training_batches(tokens, size, np.random.default_rng((SEED, epoch)))
        yield from itertools.islice(batches, step % per_epoch if epoch == step // per_epoch else 0, None)


def train(given: argparse.Namespace, mesh: Mesh, data: trec.Trec) -> tuple[Any, Any]:
    """Trains from the newest checkpoint, or from the start, and returns the base and the adapter."""
    tokens = trec.tokenise(data.train, given.max_tokens)
    size = BATCH * given.accumulate
    steps = given.steps or given.epochs * trec.batches_per_epoch(tokens, size)
    schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK_LEARNING_RATE, max(1, int(WARM_UP * steps)), steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    base = load(given.dtype)
    cuts = shardings_of(base, mesh, fsdp=given.fsdp)
    params = jax.device_put(base, cuts)
    example = trec.Batch(*(np.asarray(x[:BATCH]) for x in next(batches_from(tokens, size, 0))))
    kernels = lj.kernels(MODEL.apply, base, example.ids, example.mask)

    def start(key: Array) -> tuple[Any, Any]:
        adapter = lj.init(key, base, SPEC, kernels=kernels)
        return adapter, tx.init(adapter)

    key = jax.random.key(SEED + 1)
    where = lj.sharding.like_base(jax.eval_shape(start, key), cuts)  # the moments of Adam go where their factors do
    adapter, opt_state = jax.jit(start, out_shardings=where)(key)  # each shard is made where it lives
    if given.plan:
        batch = NamedSharding(mesh, P("data"))
        inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch) for x in (example.ids, example.mask)]
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
        print(lj.plan(MODEL.apply, shapes, SPEC, tx, mesh, *inputs))
        raise SystemExit

    options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
    with ocp.CheckpointManager(given.out.absolute() / "checkpoints", options=options) as manager:
        done = manager.latest_step() or 0
        if done:
            its = ocp.args.Composite(
                adapter=AdapterRestore(base=params, shardings=where[0]), state=StateRestore({"optimizer": opt_state})
            )
            restored = manager.restore(done, args=its)
            adapter, opt_state = restored["adapter"], restored["state"]["optimizer"]
            console.print(f"Goes on after step {done} of {steps}.")
        step, onto = make_step(tx), NamedSharding(mesh, P(None, "data"))
        batches = itertools.islice(batches_from(tokens, size, done), steps - done)
        bar = tqdm(batches, "steps", steps, initial=done, mininterval=1 if sys.stderr.isatty() else 15)
        for number, batch in enumerate(bar, start=done + 1):
            if number == given.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            parts = [x.reshape(given.accumulate, BATCH, *x.shape[1:]) for x in (batch.ids, batch.mask, batch.labels)]
            adapter, opt_state, loss = step(params, adapter, opt_state, *jax.device_put(parts, onto))
            if number % given.save_every == 0 or number == steps:
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                its = ocp.args.Composite(
                    adapter=AdapterSave(adapter, base=params), state=StateSave({"optimizer": opt_state})
                )
                manager.save(number, args=its)  # in the background
    return params, adapter


def run(given: argparse.Namespace) -> None:
    """Trains, and says how many of the test questions the model answers."""
    began = time.perf_counter()
    # `CUTS` says where the base goes, and the compiler the rest: AxisType.Explicit would have each type say it.
    mesh = jax.make_mesh((given.data, given.model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    data = trec.read()
    if given.short:
        train_few, test_few = (
            trec.Questions(its.texts[:n], its.labels[:n])
            for its, n in ((data.train, SHORT.train_questions), (data.test, SHORT.test_questions))
        )
        data = trec.Trec(train_few, test_few, data.names)
    params, adapter = train(given, mesh, data)
    console.print(f"{mesh.size} devices, {given.data} data × {given.model} model; {jax.default_backend()}")
    for name, tree in (("base", params), ("adapter", adapter)):
        whole, here = _bytes(tree), _bytes(jax.tree.map(lambda x: x.addressable_shards[0].data, tree))
        console.print(f"{name + ':':9}{whole / 1e6:8.2f} MB, {here / 1e6:.2f} MB on each device")
    predict = jax.jit(lj.lora(MODEL.apply), out_shardings=NamedSharding(mesh, P()))
    test = trec.tokenise(data.test, given.max_tokens)
    logits = evaluate(lambda ids, mask: predict(params, adapter, ids, mask).astype(jnp.float32), test)
    console.print(f"test accuracy: {accuracy(logits, test.labels):.1%}; {time.perf_counter() - began:.0f} s in all")


def rehearse(given: argparse.Namespace) -> None:
    """Has another process train and be killed in the middle, before this one goes on."""
    kill_at = str(given.kill_at or 2 * given.save_every + 2)
    rest = [argument for argument in sys.argv[1:] if argument != "--rehearse"]
    code = subprocess.run([sys.executable, __file__, *rest, "--kill-at", kill_at], check=False).returncode
    console.print(f"The process that was at step {kill_at} has ended with {code}.")
    if code != -signal.SIGKILL:
        raise RuntimeError(f"It should have been killed, {-signal.SIGKILL}.")


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("sharded_output"), help="folder of the checkpoints")
    parser.add_argument("--data", type=int, default=2, help="devices along which batches are cut")
    parser.add_argument("--model", type=int, default=4, help="devices along which heads and hidden units are cut")
    parser.add_argument("--fsdp", action="store_true", help="cut the base along `data` as well")
    parser.add_argument("--simulate", type=int, default=8, help="devices that the CPU simulates; 0 for those there are")
    parser.add_argument("--distributed", action="store_true", help="one of several processes: jax.distributed")
    parser.add_argument("--dtype", type=jnp.dtype, default=jnp.dtype("float32"), help="of the base, and of computing")
    parser.add_argument("--accumulate", type=int, default=1, help=f"batches of {BATCH} questions in one update")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, help="in place of --epochs")
    parser.add_argument("--save-every", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--short", action="store_true", help="a few steps on a small part of the data")
    parser.add_argument("--plan", action="store_true", help="only say what a step takes of each device")
    parser.add_argument("--kill-at", type=int, help="the step before which the process kills itself")
    parser.add_argument("--rehearse", action="store_true", help="be killed in the middle once, then go on")
    given = parser.parse_args()
    given.max_tokens = SHORT.max_tokens if given.short else trec.LENGTHS[-1]
    if given.short:
        given.steps, given.save_every = given.steps or 5, 1
        compile_quickly()
    if given.rehearse:
        rehearse(given)
    if given.simulate:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", given.simulate)
    if given.distributed:
        jax.distributed.initialize()  # on TPU pods and under Slurm it finds out by itself who the others are
    run(given)


if __name__ == "__main__":
    main()
