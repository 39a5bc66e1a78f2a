"""Holds the LoRA paper's findings against a real model: all-MiniLM-L6-v2 on TREC, on the CPU, within half an hour.

    python examples/reproduce_paper.py                # every run that --out does not have yet; then tables and plots
    python examples/reproduce_paper.py --write-docs   # the same, and writes docs/findings.md's tables and figures
    python examples/reproduce_paper.py --short        # every configuration for two steps, a minute or two
    python examples/reproduce_paper.py --tune         # the learning rates, on held-out training questions

Which matrices at a fixed budget; which rank; LoRA against full fine-tuning, biases alone and a linear probe; LoRA
against LoRA+, rsLoRA, DoRA and PiSSA; then what the trained adapters look like. Each configuration of
`paper_configurations.py` is trained on 2,000 questions with three seeds, which draw the head, the factors and which
questions come when. A finished run is one file: what is killed loses one run at most, and goes on when started again.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from tqdm import tqdm

import lora_jax as lj
import minilm
import paper_report
import trec
from finetune_trec import MODEL, SMOOTHING, WARM_UP, compile_quickly, console, evaluate, init_head
from paper_configurations import CONFIGURATIONS, GRID, Configuration

BATCH = 16
HELD_OUT = 882  # of the training questions, for --tune
TUNING_SEED = 100  # not one of the runs'
ANALYSED = {("lora-all-r8", 0), ("lora-all-r8", 1), ("lora-all-r64", 0)}  # runs whose adapters are kept


class Scale(NamedTuple):
    """How much of everything a run takes."""

    steps: int
    seeds: tuple[int, ...]
    tokens: int  # longer questions are truncated; one of `trec.LENGTHS`, so that few steps are compiled
    test_questions: int
    layers: int  # of the encoder, the first ones


WHOLE = Scale(steps=125, seeds=(0, 1, 2), tokens=18, test_questions=500, layers=6)
SHORT = Scale(steps=2, seeds=(0, 1), tokens=12, test_questions=32, layers=1)


class Data(NamedTuple):
    """What is trained on and what is asked afterwards."""

    train: trec.Tokens
    test: trec.Tokens


def settings(configuration: Configuration, seed: int, scale: Scale, data: Data) -> dict[str, Any]:
    """All that decides how a run ends: what is kept with its result, and compared before that is taken."""
    amount = {"steps": scale.steps, "tokens": scale.tokens, "batch": BATCH, "smoothing": SMOOTHING, "warm_up": WARM_UP}
    sizes = {"train_questions": len(data.train.ids), "test_questions": len(data.test.ids)}
    return configuration.settings() | amount | sizes | {"seed": seed}


def finished(path: Path, expected: dict[str, Any]) -> dict[str, Any] | None:
    """Reads the result of a run, None if it is not there yet.

    Raises:
      ValueError: if it is of other settings.
    """
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    found = result["settings"]
    differ = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    other = [f"{key}: {found.get(key)} there, {expected.get(key)} now" for key in differ]
    if other:
        raise ValueError(
            f"{path} is of a run with other settings than this one.\n  {'; '.join(other)}\n"
            "  Give another --out, or remove the file to have it run again."
        )
    return result


def write(path: Path, value: Any) -> None:
    """Writes JSON so that the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value) + "\n")
    os.replace(partial, path)


@functools.cache
def model(layers: int) -> minilm.Classifier:
    """The demo's model with fewer layers, all of them but for --short."""
    return minilm.Classifier(MODEL.classes, dataclasses.replace(MODEL.encoder, layers=layers))


@functools.cache
def encoder(layers: int) -> dict[str, Any]:
    """The published weights, read once."""
    kept = {"embeddings", *(f"layer_{i}" for i in range(layers))}
    return {name: weights for name, weights in minilm.load_encoder().items() if name in kept}


def base(seed: int, layers: int) -> dict[str, Any]:
    """The frozen base: the published encoder, and a head that the seed draws."""
    return {"params": {"encoder": encoder(layers), "classifier": init_head(jax.random.key(seed))}}


def is_head(path: str) -> bool:
    """Whether a leaf is the new head's, which has a learning rate of its own and is in no count of parameters."""
    return "/classifier/" in path


def scaled(updates: Mapping[str, Any], rest: Any, head: Any) -> dict[str, Any]:
    """What the optimizer says, times the learning rates: one for the head, one for the rest."""
    return {path: optax.tree.scale(-(head if is_head(path) else rest), part) for path, part in updates.items()}


@functools.cache
def make_step(
    ratio: float | None, layers: int
) -> tuple[optax.GradientTransformation, Callable[..., tuple[Any, Any, Array]]]:
    """Adam, with LoRA+'s ratio, and one update by it: `(params, adapter, state, rates, ids, mask, labels)`.

    The two learning rates are arguments, as is all that a seed draws: one compiled step serves every seed and rate, and
    PiSSA that of LoRA, whose factors are of the same shapes.
    """
    plus = [] if ratio is None else [lj.optim.lora_plus(ratio)]
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), *plus)
    apply = lj.lora(model(layers).apply)

    def loss_of(adapter: Any, params: Any, ids: Array, mask: Array, labels: Array) -> Array:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, trec.LABELS), SMOOTHING)
        return optax.softmax_cross_entropy(apply(params, adapter, ids, mask), targets).mean()

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(
        params: Any, adapter: Any, state: Any, rates: tuple[Array, Array], ids: Array, mask: Array, labels: Array
    ) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(adapter, params, ids, mask, labels)
        updates, state = tx.update(gradients, state, adapter)
        return optax.apply_updates(adapter, scaled(updates, *rates)), state, loss

    return tx, step


@functools.cache
def kernels(layers: int) -> Any:
    """The roles of the kernels' axes, which are the same for every seed and batch."""
    ids = jax.ShapeDtypeStruct((BATCH, trec.LENGTHS[0]), jnp.int32)
    mask = jax.ShapeDtypeStruct(ids.shape, jnp.bool_)
    return lj.kernels(model(layers).apply, base(0, layers), ids, mask)


def start(configuration: Configuration, seed: int, layers: int) -> tuple[Any, Any]:
    """The adapter that is trained, and the base that it is trained on."""
    params = base(seed, layers)
    key = jax.random.key(seed)
    adapter = lj.init(key, params, configuration.spec, kernels=kernels(layers))
    if configuration.principal:
        params, adapter = lj.starts.pissa(params, adapter, niter=4, key=key)  # an exact one takes a minute
    return adapter, params


def epochs(tokens: trec.Tokens, seed: int) -> Iterator[trec.Batch]:
    """Batches of one epoch after another, without end, in an order that the seed draws."""
    rng = np.random.default_rng(seed)
    while True:
        yield from trec.training_batches(tokens, BATCH, rng)


@functools.cache
def predict(layers: int) -> Callable[..., Array]:
    """The plain model, as what is tested is the adapter merged into its base."""
    return jax.jit(model(layers).apply)


def train(
    configuration: Configuration, seed: int, scale: Scale, data: Data, bar: Any, keep: Path | None
) -> dict[str, Any]:
    """Trains and tests once.

    Returns:
      Everything that is reported of the run, but its settings.
    """
    began = time.perf_counter()
    batches = list(itertools.islice(epochs(data.train, seed), scale.steps))
    adapter, params = start(configuration, seed, scale.layers)
    head_size, rest_size = (
        sum(leaf.size for path, its in adapter.items() if is_head(path) is whether for leaf in jax.tree.leaves(its))
        for whether in (True, False)
    )
    tx, step = make_step(configuration.ratio, scale.layers)
    state = jax.jit(tx.init)(adapter)
    peak = (configuration.rate, configuration.head_rate)
    warm_up = max(1, int(WARM_UP * scale.steps))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, warm_up, scale.steps)
    losses: list[float] = []
    seconds: dict[int, list[tuple[float, float]]] = {}
    for number, batch in enumerate(batches):
        tick = time.perf_counter(), time.process_time()
        rates = tuple(rate * schedule(number) for rate in peak)
        adapter, state, loss = step(params, adapter, state, rates, batch.ids, batch.mask, batch.labels)
        losses.append(float(loss))
        taken = time.perf_counter() - tick[0], time.process_time() - tick[1]
        seconds.setdefault(batch.ids.shape[1], []).append(taken)
        bar.update()
    merged = lj.merge(params, adapter)
    logits = evaluate(lambda ids, mask: predict(scale.layers)(merged, ids, mask), data.test)
    if keep:
        lj.save(keep, adapter, base=params)
    typical = sum(np.median(its, axis=0) * len(its) for its in seconds.values()) / len(losses)
    wrong = np.flatnonzero(logits.argmax(-1) != data.test.labels).tolist()
    chosen = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(logits)), data.test.labels]
    return {
        "accuracy": 1 - len(wrong) / len(logits),
        "wrong": wrong,
        "test_loss": -float(chosen.mean()),
        "training_loss": statistics.fmean(losses[-20:]),
        "trained": rest_size,
        "head": head_size,
        # Of every length the median, as the first may have been compiled; then the mean over the batches.
        "step_ms": 1e3 * typical[0],
        "step_cpu_ms": 1e3 * typical[1],  # of both cores together: other work on the machine hardly changes it
        "seconds": time.perf_counter() - began,
    }


def run_all(
    wanted: list[tuple[Path, Configuration, int]], scale: Scale, data: Data, keep: Callable[[str, int], Path | None]
) -> list[dict[str, Any]]:
    """Runs what has no result yet, and returns the results of all."""
    plan = [(path, its, seed, settings(its, seed, scale, data)) for path, its, seed in wanted]
    results = {path: finished(path, expected) for path, _, _, expected in plan}
    missing = [entry for entry in plan if results[entry[0]] is None]
    console.print(f"{len(plan)} runs of {scale.steps} steps; {len(plan) - len(missing)} of them are there already.")
    bar = tqdm(
        total=len(missing) * scale.steps,
        unit=" steps",
        disable=not missing,
        mininterval=0.5 if sys.stderr.isatty() else 15,  # a log file wants few lines
        bar_format="{percentage:3.0f} % {bar:20} {n}/{total} steps, {elapsed} gone, {remaining} left; {desc}",
    )
    with bar:
        for number, (path, its, seed, expected) in enumerate(missing, start=1):
            bar.set_description_str(f"run {number} of {len(missing)}: {its.name}, seed {seed}", refresh=False)
            results[path] = {"settings": expected} | train(its, seed, scale, data, bar, keep(its.name, seed))
            write(path, results[path])
    return [found for found in results.values() if found is not None]


def analyse(out: Path, layers: int) -> dict[str, Any]:
    """Measures the kept adapters as the paper's section 7 does: of each kind of kernel the mean over the layers."""
    bases = [base(seed, layers) for seed in (0, 1)]
    adapters = {(name, seed): lj.restore(adapter_path(out, name, seed), base=bases[seed]) for name, seed in ANALYSED}
    small, wide = adapters["lora-all-r8", 0], adapters["lora-all-r64", 0]
    pairs = {"ranks 8 and 64": wide, "two seeds of rank 8": adapters["lora-all-r8", 1]}
    similarity = {
        factor: {
            title: over_layers(lj.analysis.subspace_similarity(small, other, of=factor))
            for title, other in pairs.items()
        }
        for factor in ("a", "b")
    }
    measured = {"8": lj.analysis.amplification(bases[0], small), "64": lj.analysis.amplification(bases[0], wide)}
    amplification = {
        rank: over_layers({path: its._asdict() for path, its in found.items()}) for rank, found in measured.items()
    }
    return {"similarity": similarity, "amplification": amplification}


def over_layers(found: Mapping[str, Any]) -> dict[str, Any]:
    """The mean over the layers of what was found of `…/query/kernel`, and so on, rounded, as JSON has it."""
    kinds: dict[str, list[Any]] = {}
    for path, value in found.items():
        kinds.setdefault(path.split("/")[-2], []).append(value)

    def mean(*values: Array) -> Any:
        # Each as NumPy's first: NumPy would read a list of JAX arrays element by element.
        return np.round(np.mean([np.asarray(value, np.float64) for value in values], axis=0), 4).tolist()

    return {kind: jax.tree.map(mean, *values) for kind, values in kinds.items()}


def adapter_path(out: Path, name: str, seed: int) -> Path:
    """Where the adapter of a run is kept that is analysed."""
    return out / "adapters" / f"{name}-{seed}"


def tune(out: Path, scale: Scale) -> None:
    """Tries the rates of `GRID` on held-out training questions, and prints what each comes to."""
    data = Data(*(trec.tokenise(questions, scale.tokens) for questions in trec.split(trec.read().train, HELD_OUT)))
    wanted = []
    likeliest_first = itertools.zip_longest(*([(name, rate) for rate in rates] for name, rates in GRID.items()))
    for name, rate in filter(None, itertools.chain(*likeliest_first)):
        its = dataclasses.replace(CONFIGURATIONS[name], rate=rate)
        its = dataclasses.replace(its, head_rate=rate) if name == "probe" else its
        wanted.append((out / "tuning" / f"{name}-{rate:g}.json", its, TUNING_SEED))
    results = run_all(wanted, scale, data, lambda name, seed: None)
    for (_, its, _), found in zip(wanted, results, strict=True):
        console.print(f"{its.name:16}{its.rate:<8g}{found['accuracy']:7.1%}   loss {found['test_loss']:.3f}")


def reproduce(out: Path, scale: Scale) -> dict[str, Any]:
    """Runs every configuration with every seed, then analyses; all that the report needs."""
    data, few = trec.read(), scale.test_questions
    test = trec.Questions(data.test.texts[:few], data.test.labels[:few])
    tokens = Data(trec.tokenise(data.train, scale.tokens), trec.tokenise(test, scale.tokens))
    wanted = [
        (out / "runs" / f"{its.name}-{seed}.json", its, seed) for seed in scale.seeds for its in CONFIGURATIONS.values()
    ]
    runs = run_all(
        wanted, scale, tokens, lambda name, seed: adapter_path(out, name, seed) if (name, seed) in ANALYSED else None
    )
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    results = {"versions": versions, "runs": runs, "analysis": analyse(out, scale.layers)}
    write(out / "results.json", results)
    return results


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("paper_output"), help="folder of the results (paper_output)")
    parser.add_argument("--short", action="store_true", help="every configuration, for two steps")
    parser.add_argument("--tune", action="store_true", help="try learning rates on held-out training questions")
    parser.add_argument("--write-docs", action="store_true", help="write tables and figures into docs/")
    given = parser.parse_args()
    if given.short and given.write_docs:
        parser.error("--short trains next to nothing: it is not for the docs")
    scale = SHORT if given.short else WHOLE
    if given.short:
        compile_quickly()
    if given.tune:
        tune(given.out, scale)
        return
    results = reproduce(given.out, scale)
    print(paper_report.text(results))
    paper_report.draw(results, given.out)
    if given.write_docs:
        paper_report.write_docs(results)


if __name__ == "__main__":
    main()
