"""Fine-tunes the demo's model on a mesh of devices, by default 2 (data) × 4 (model), simulated on the CPU.

    python examples/finetune_sharded.py                       # 8 simulated devices
    python examples/finetune_sharded.py --short --rehearse    # a few steps, killed in the middle and resumed
    python examples/finetune_sharded.py --plan                # reports what a step takes on each device; does not train
    python examples/finetune_sharded.py --simulate 0 --data 2 --model 4 --dtype bfloat16      # 8 TPU or GPU devices
    python examples/finetune_sharded.py --simulate 0 --distributed --data 16 --model 4        # on every host of a pod

The base is sharded and frozen, and the adapter is sharded like the base. With the same --out, a run resumes from the
latest complete checkpoint, on this mesh or another, with the same result as an uninterrupted run.
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
    progress_bar,
)
from lora_jax.checkpoint import AdapterRestore, AdapterSave, StateRestore, StateSave

# Tensor parallelism: heads and hidden units are sharded along `model`. The rest of the base is replicated; with --fsdp,
# matrices are also sharded along `data` and gathered where they are used.
PARTITION_SPECS: list[tuple[str, P]] = [
    (r"attention/(query|key|value)/kernel$", P(None, "model")),
    (r"attention/(query|key|value)/bias$", P("model")),
    (r"attention/out/kernel$", P("model")),
    (r"mlp/up/kernel$", P(None, "model")),
    (r"mlp/up/bias$", P("model")),
    (r"mlp/down/kernel$", P("model")),
    (r"embeddings/.*$", P(None, "model")),
]


def shardings_of(params: Any, mesh: Mesh, *, fsdp: bool) -> Any:
    """Returns shardings by `PARTITION_SPECS`; `fsdp` also shards matrices along `data` where that divides them."""

    def sharding_of(keys: Any, leaf: Any) -> NamedSharding:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        spec = next((spec for pattern, spec in PARTITION_SPECS if re.search(pattern, path)), P())
        axes = [*spec, *[None] * (leaf.ndim - len(spec))][: leaf.ndim]
        free = [axis for axis in range(leaf.ndim) if axes[axis] is None and leaf.shape[axis] % mesh.shape["data"] == 0]
        if fsdp and leaf.ndim > 1 and free:
            axes[free[0]] = "data"
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(sharding_of, params)


def load(dtype: Any) -> Any:
    """Returns the frozen base; the encoder has and computes in `dtype`, adapter and head in float32."""
    params = jax.tree.map(np.asarray, base_params()["params"])
    encoder = jax.tree.map(lambda leaf: leaf.astype(dtype), params["encoder"])
    return {"params": params | {"encoder": encoder}}


def loss_of(adapter: Any, params: Any, ids: Array, mask: Array, labels: Array) -> Array:
    """Returns the mean cross-entropy of a batch in float32: `ids` and `mask` are (batch, tokens), `labels` (batch,)."""
    logits = lj.lora(MODEL.apply)(params, adapter, ids, mask).astype(jnp.float32)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, trec.LABELS), SMOOTHING)
    return optax.softmax_cross_entropy(logits, targets).mean()


def make_step(tx: optax.GradientTransformation, targets: Any) -> Callable[..., tuple[Any, Any, Array]]:
    """Returns an update with gradient accumulation: ids (micro, batch, tokens), labels (micro, batch).

    `targets` are the shardings of adapter and optimizer state. Without them the compiler chooses those of the results,
    and compiles the second step again if they differ.
    """

    @functools.partial(jax.jit, donate_argnums=(1, 2), out_shardings=(*targets, None))
    def step(params: Any, adapter: Any, opt_state: Any, ids: Array, mask: Array, labels: Array) -> Any:
        def add(total: Any, batch: tuple[Array, Array, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of)(adapter, params, *batch)), None

        zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), adapter))
        total, _ = lax.scan(add, zeros, (ids, mask, labels))
        loss, gradients = jax.tree.map(lambda x: x / len(ids), total)
        updates, opt_state = tx.update(gradients, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, loss

    return step


def batches_from(tokens: trec.Tokens, size: int, step: int) -> Iterator[trec.Batch]:
    """Yields training batches from a step on. The step determines the position in the data."""
    per_epoch = trec.batches_per_epoch(tokens, size)
    for epoch in itertools.count(step // per_epoch):
        batches = trec.training_batches(tokens, size, np.random.default_rng((SEED, epoch)))
        yield from itertools.islice(batches, step % per_epoch if epoch == step // per_epoch else 0, None)


def train(given: argparse.Namespace, mesh: Mesh, data: trec.Trec) -> tuple[Any, Any]:
    """Trains from the latest checkpoint, if there is one, and returns the base and the adapter."""
    tokens = trec.tokenize(data.train, given.max_tokens)
    size = BATCH * given.accumulate
    steps = given.steps or given.epochs * trec.batches_per_epoch(tokens, size)
    schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK_LEARNING_RATE, max(1, int(WARM_UP * steps)), steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    base = load(given.dtype)
    shardings = shardings_of(base, mesh, fsdp=given.fsdp)
    params = jax.device_put(base, shardings)
    example = trec.Batch(*(np.asarray(x[:BATCH]) for x in next(batches_from(tokens, size, 0))))
    kernels = lj.kernels(MODEL.apply, base, example.ids, example.mask)

    def initialize(key: Array) -> tuple[Any, Any]:
        adapter = lj.init(key, base, SPEC, kernels=kernels)
        return adapter, tx.init(adapter)

    key = jax.random.key(SEED + 1)
    targets = lj.sharding.like_base(jax.eval_shape(initialize, key), shardings)  # Adam's moments like their factors
    adapter, opt_state = jax.jit(initialize, out_shardings=targets)(key)  # each shard is made on its device
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
            items = ocp.args.Composite(
                adapter=AdapterRestore(base=params, shardings=targets[0]), state=StateRestore({"optimizer": opt_state})
            )
            restored = manager.restore(done, args=items)
            adapter, opt_state = restored["adapter"], restored["state"]["optimizer"]
            console.print(f"Resumes after step {done} of {steps}.")
        step, batch_sharding = make_step(tx, targets), NamedSharding(mesh, P(None, "data"))
        batches = itertools.islice(batches_from(tokens, size, done), steps - done)
        bar = progress_bar("LoRA", steps, " steps", iterable=batches, initial=done)
        for number, batch in enumerate(bar, start=done + 1):
            if number == given.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            parts = [x.reshape(given.accumulate, BATCH, *x.shape[1:]) for x in (batch.ids, batch.mask, batch.labels)]
            adapter, opt_state, loss = step(params, adapter, opt_state, *jax.device_put(parts, batch_sharding))
            if number % given.save_every == 0 or number == steps:
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                items = ocp.args.Composite(
                    adapter=AdapterSave(adapter, base=params), state=StateSave({"optimizer": opt_state})
                )
                manager.save(number, args=items)  # asynchronous
    return params, adapter


def run(given: argparse.Namespace) -> None:
    """Trains, and prints the test accuracy."""
    began = time.perf_counter()
    # With Auto axes, the compiler derives all other shardings from those of the base.
    mesh = jax.make_mesh((given.data, given.model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    data = trec.read()
    if given.short:
        train_few, test_few = (
            trec.Questions(questions.texts[:n], questions.labels[:n])
            for questions, n in ((data.train, SHORT.train_questions), (data.test, SHORT.test_questions))
        )
        data = trec.Trec(train_few, test_few, data.names)
    params, adapter = train(given, mesh, data)
    console.print(f"{mesh.size} devices, {given.data} data × {given.model} model; {jax.default_backend()}")
    for name, tree in (("base", params), ("adapter", adapter)):
        total, local = _bytes(tree), _bytes(jax.tree.map(lambda x: x.addressable_shards[0].data, tree))
        console.print(f"{name + ':':9}{total / 1e6:8.2f} MB, {local / 1e6:.2f} MB on each device")
    predict = jax.jit(lj.lora(MODEL.apply), out_shardings=NamedSharding(mesh, P()))
    test = trec.tokenize(data.test, given.max_tokens)
    logits = evaluate(lambda ids, mask: predict(params, adapter, ids, mask).astype(jnp.float32), test)
    console.print(f"test accuracy: {accuracy(logits, test.labels):.1%}; {time.perf_counter() - began:.0f} s in total")


def rehearse(given: argparse.Namespace) -> None:
    """Trains in another process that is killed in the middle, before this one resumes."""
    kill_at = str(given.kill_at or 2 * given.save_every + 2)
    rest = [argument for argument in sys.argv[1:] if argument != "--rehearse"]
    code = subprocess.run([sys.executable, __file__, *rest, "--kill-at", kill_at], check=False).returncode
    console.print(f"The process that was to be killed at step {kill_at} exited with {code}.")
    if code != -signal.SIGKILL:
        raise RuntimeError(f"Expected the process to be killed, with exit code {-signal.SIGKILL}; got {code}.")


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("sharded_output"), help="folder of the checkpoints")
    parser.add_argument("--data", type=int, default=2, help="devices along which batches are sharded")
    parser.add_argument("--model", type=int, default=4, help="devices along which hidden units are sharded")
    parser.add_argument("--fsdp", action="store_true", help="shard the base along `data`, too")
    parser.add_argument("--simulate", type=int, default=8, help="simulated CPU devices; 0 to use real ones")
    parser.add_argument("--distributed", action="store_true", help="one of several processes: jax.distributed")
    parser.add_argument("--dtype", type=jnp.dtype, default=jnp.dtype("float32"), help="dtype of the encoder")
    parser.add_argument("--accumulate", type=int, default=1, help=f"number of batches of {BATCH} questions per update")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, help="number of steps, instead of --epochs")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--short", action="store_true", help="a few steps on a small part of the data")
    parser.add_argument("--plan", action="store_true", help="only report what a step takes on each device")
    parser.add_argument("--kill-at", type=int, help="step at which the process kills itself")
    parser.add_argument("--rehearse", action="store_true", help="train with a kill in the middle, then resume")
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
