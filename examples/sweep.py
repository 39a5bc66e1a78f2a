"""A sweep of learning rates and ranks on TREC's question types, in which one compiled step trains all adapters.

    python examples/sweep.py            # less than five minutes on two cores; outputs in sweep_output/
    python examples/sweep.py --short    # a small part of the data, about a minute

Twelve adapters of all-MiniLM-L6-v2, three ranks by four learning rates, are stacked and trained on the same batches.
The base is in memory once, and one matmul multiplies the activations of all adapters with it. Then their accuracies on
held-out training questions are computed together, and the best adapter is saved.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array
from numpy.typing import NDArray

import lora_jax as lj
import trec
from finetune_trec import MODEL, SEED, WARM_UP, base_params, compile_quickly, console, progress_bar

BATCH = 16
TOKENS = 18  # of each question; longer ones are truncated
ALONE = 3  # steps of one adapter that are timed, after one that is not


class Scale(NamedTuple):
    """The size of a run."""

    ranks: tuple[int, ...]
    learning_rates: tuple[float, ...]
    train_questions: int
    held_out: int
    steps: int
    expected: float  # minimum accuracy of the best adapter

    @property
    def cells(self) -> list[tuple[int, float]]:
        """The rank and the learning rate of each adapter."""
        return list(itertools.product(self.ranks, self.learning_rates))


FULL = Scale((1, 4, 16), (5e-4, 2e-3, 8e-3, 3e-2), 4_382, held_out=500, steps=120, expected=0.5)
SHORT = Scale((1, 4), (5e-4, 2e-3), 128, held_out=32, steps=3, expected=0.0)


class Result(NamedTuple):
    """What a sweep has found and cost.

    Attributes:
      accuracy: on the held-out questions, by adapter.
      loss: the loss of each step, `(steps, adapters)`.
      seconds: of the steps, without compilation.
      compile: seconds to trace and compile.
    """

    accuracy: NDArray[np.float32]
    loss: NDArray[np.float32]
    seconds: float
    compile: float


def name_of(rank: int, learning_rate: float) -> str:
    """Returns the name of a cell."""
    return f"rank {rank}, learning rate {learning_rate:g}"


def make_adapters(params: Any, kernels: Any, cells: list[tuple[int, float]]) -> dict[str, Any]:
    """Returns an adapter for each cell: LoRA of its rank on the layers, and the head in full."""

    def make(rank: int) -> Any:
        spec = {
            "**/{attention,mlp}/*/kernel": lj.LoRA(rank=rank, alpha=2 * rank),
            "**/classifier/*": lj.Full(),
        }
        return lj.init(jax.random.key(SEED + 1), params, spec, kernels=kernels)

    return {name_of(*cell): make(cell[0]) for cell in cells}


def optimizer(steps: int) -> optax.GradientTransformation:
    """Returns Adam with a schedule whose peak is 1; the learning rate of each adapter multiplies its updates."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, int(WARM_UP * steps)), steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def make_loss(apply: Callable[..., Array]) -> Callable[..., Array]:
    """Returns the loss of one adapter: `(params, adapter, ids, mask, labels) -> loss`."""

    def loss(params: Any, adapter: Any, ids: Array, mask: Array, labels: Array) -> Array:
        logits = apply(params, adapter, ids, mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


def sweep(params: Any, stacked: lj.many.Stack, scale: Scale, train: trec.Tokens, held_out: trec.Tokens) -> Any:
    """Trains and evaluates all adapters.

    Returns:
      The trained stack, and the result.
    """
    adapted, tx = lj.lora(MODEL.apply, form="factored"), optimizer(scale.steps)
    step = jax.jit(lj.many.train_step(make_loss(adapted), tx, in_axes=None), donate_argnums=(1, 2))
    states = jax.jit(jax.vmap(tx.init))(stacked.members.trainable)
    rates, count = jnp.array([rate for _, rate in scale.cells]), len(scale.cells)
    batches = itertools.islice(epochs(train), scale.steps)
    losses, start, compiled = [], time.perf_counter(), 0.0
    with progress_bar(f"{count} adapters", scale.steps * BATCH * count) as bar:
        for batch in batches:
            stacked, states, loss = step(params, stacked, states, batch.ids, batch.mask, batch.labels, rates=rates)
            losses.append(np.asarray(loss))
            compiled = compiled or time.perf_counter() - start
            bar.set_postfix_str(f"lowest loss {np.mean(losses[-10:], 0).min():.3f}", refresh=False)
            bar.update(BATCH * count)
    seconds = (time.perf_counter() - start - compiled) * scale.steps / max(scale.steps - 1, 1)

    @jax.jit
    def predict(params: Any, members: Any, ids: Array, mask: Array) -> Array:
        return jax.vmap(lambda member: adapted(params, member, ids, mask).argmax(-1))(members)

    correct = np.zeros(count)
    for batch in trec.ordered_batches(held_out, 2 * BATCH, (TOKENS,)):
        predicted = np.asarray(predict(params, stacked.members, batch.ids, batch.mask))
        correct += (predicted[:, : len(batch.rows)] == batch.labels).sum(1)
    accuracy = (correct / len(held_out.ids)).astype(np.float32)
    return stacked, Result(accuracy, np.stack(losses), seconds, compiled)


def alone(params: Any, adapters: dict[str, Any], scale: Scale, train: trec.Tokens) -> tuple[float, float]:
    """Measures a few steps of one adapter of each rank; returns the seconds of a step, and of a compilation."""
    tx, loss_fn = optimizer(scale.steps), make_loss(lj.lora(MODEL.apply))

    @jax.jit
    def step(params: Any, adapter: Any, state: Any, rate: Any, *batch: Array) -> Any:
        loss, gradient = jax.value_and_grad(lambda adapter: loss_fn(params, adapter, *batch))(adapter)
        updates, state = tx.update(gradient, state, adapter)
        return optax.apply_updates(adapter, jax.tree.map(lambda update: rate * update, updates)), state, loss

    seconds, first = [], []
    for rank in scale.ranks:
        adapter = adapters[name_of(rank, scale.learning_rates[0])]
        state, start = tx.init(adapter), time.perf_counter()
        for number, batch in enumerate(itertools.islice(epochs(train), ALONE + 1)):
            adapter, state, loss = step(params, adapter, state, 1e-3, batch.ids, batch.mask, batch.labels)
            loss.block_until_ready()
            took, start = time.perf_counter() - start, time.perf_counter()
            (seconds if number else first).append(took)
    return float(np.median(seconds)), float(np.mean(first))


def epochs(tokens: trec.Tokens) -> Any:
    """Yields batches of one epoch after another, indefinitely."""
    rng = np.random.default_rng(SEED)
    while True:
        yield from trec.training_batches(tokens, BATCH, rng, (TOKENS,))


def draw(scale: Scale, accuracy: NDArray[np.float32], path: Path) -> None:
    """Plots the accuracies as a heat map, as a PNG."""
    grid = 100 * accuracy.reshape(len(scale.ranks), len(scale.learning_rates))
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    image = axes.imshow(grid, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        best = value == grid.max()
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", weight="bold" if best else "normal",
                  color="white" if value > 60 else "black")  # fmt: skip
    axes.set_xticks(range(len(scale.learning_rates)), [f"{rate:g}" for rate in scale.learning_rates])
    axes.set_yticks(range(len(scale.ranks)), list(map(str, scale.ranks)))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("rank")
    axes.set_title(
        f"Accuracy on held-out questions (%), {accuracy.size} adapters in one program", loc="left", fontsize=10
    )
    figure.colorbar(image)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(out: Path, scale: Scale) -> None:
    """Runs the sweep; see the module's docstring."""
    out.mkdir(parents=True, exist_ok=True)
    questions = trec.read().train  # the test questions are not used
    rest, held_out = trec.split(questions, 500)
    train = trec.tokenize(
        trec.Questions(rest.texts[: scale.train_questions], rest.labels[: scale.train_questions]), TOKENS
    )
    held_out = trec.tokenize(
        trec.Questions(held_out.texts[: scale.held_out], held_out.labels[: scale.held_out]), TOKENS
    )
    params = base_params()
    example = next(trec.ordered_batches(held_out, BATCH, (TOKENS,)))
    kernels = lj.kernels(MODEL.apply, params, example.ids, example.mask)
    adapters = make_adapters(params, kernels, scale.cells)
    stacked = lj.many.stack(adapters)
    step_alone, compile_alone = alone(params, adapters, scale, train)
    del adapters  # they are in the stack
    count = len(scale.cells)
    console.print(f"{count} adapters, {scale.steps} steps of {BATCH} questions each")
    stacked, result = sweep(params, stacked, scale, train, held_out)
    for cell, accuracy in zip(scale.cells, result.accuracy, strict=True):
        console.print(f"{name_of(*cell):32}{accuracy:6.1%}")
    draw(scale, result.accuracy, out / "accuracy.png")
    best = int(result.accuracy.argmax())
    name, accuracy = name_of(*scale.cells[best]), float(result.accuracy[best])
    lj.save(out / "best", lj.many.unstack(stacked)[name], base=params)
    together = result.seconds + result.compile
    one_by_one = count * scale.steps * step_alone + len(scale.ranks) * compile_alone
    found = {
        "accuracy": {name_of(*cell): float(value) for cell, value in zip(scale.cells, result.accuracy, strict=True)},
        "seconds": together,
        "seconds_one_by_one": one_by_one,
    }
    (out / "sweep.json").write_text(json.dumps(found, indent=2) + "\n")
    console.print(f"\nBest: {name}, {accuracy:.1%} of the held-out questions; saved in {out / 'best'}.", soft_wrap=True)
    console.print(
        f"The sweep took {together:.0f} s, {result.compile:.0f} s of it for compilation. By the time "
        f"of {ALONE * len(scale.ranks)} steps of one, {count} runs one by one would have taken {one_by_one:.0f} s, "
        f"{one_by_one / together:.2f} times as long: {1e3 * step_alone:.0f} ms for a step of an adapter, in the sweep "
        f"{1e3 * result.seconds / scale.steps / count:.0f} ms.",
        soft_wrap=True,
    )
    if accuracy < scale.expected:
        raise RuntimeError(f"Expected an accuracy of at least {scale.expected:.1%}; got {accuracy:.1%}.")


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description="Sweeps learning rates and ranks in one compiled step.")
    parser.add_argument("--out", type=Path, default=Path("sweep_output"), help="output folder (sweep_output)")
    parser.add_argument("--short", action="store_true", help="every stage, on a small part of the data")
    arguments = parser.parse_args()
    if arguments.short:
        compile_quickly()
    run(arguments.out, SHORT if arguments.short else FULL)


if __name__ == "__main__":
    main()
