"""Repeats experiments of the LoRA paper with all-MiniLM-L6-v2 on TREC, on the CPU, within half an hour.

    python examples/reproduce_paper.py                # runs that --out does not have yet; then tables and plots
    python examples/reproduce_paper.py --write-docs   # the same, and writes docs/findings.md's tables and figures
    python examples/reproduce_paper.py --short        # every configuration for two steps, a minute or two
    python examples/reproduce_paper.py --tune         # the learning rates, on held-out training questions

Which matrices at a fixed budget; which rank; LoRA against full fine-tuning, biases only and a linear probe; LoRA
against LoRA+, rsLoRA, DoRA and PiSSA; then an analysis of the trained adapters. Each configuration of
`paper_configurations.py` is trained on 2,000 questions with three seeds, which determine the head, the factors and the
order of the questions. A finished run is one file, so an interrupted program loses at most one run, and can be resumed.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import lora_jax as lj
import minilm
import paper_report
import trec
from finetune_trec import MODEL, SMOOTHING, WARM_UP, compile_quickly, console, evaluate, init_head, progress_bar
from paper_configurations import CONFIGURATIONS, GRID, Configuration

BATCH = 16
HELD_OUT = 882  # of the training questions, for --tune
TUNING_SEED = 100  # not one of the runs'
ANALYZED = {("lora-all-r8", 0), ("lora-all-r8", 1), ("lora-all-r64", 0)}  # runs whose adapters are kept


class Scale(NamedTuple):
    """The size of the experiments."""

    steps: int
    seeds: tuple[int, ...]
    tokens: int  # longer questions are truncated; one of `trec.LENGTHS`
    test_questions: int
    layers: int  # the number of encoder layers, from the first


FULL = Scale(steps=125, seeds=(0, 1, 2), tokens=18, test_questions=500, layers=6)
SHORT = Scale(steps=2, seeds=(0, 1), tokens=12, test_questions=32, layers=1)


class Data(NamedTuple):
    """Training and test questions."""

    train: trec.Tokens
    test: trec.Tokens


def settings(configuration: Configuration, seed: int, scale: Scale, data: Data) -> dict[str, Any]:
    """Returns the settings that determine a result; they are stored with it and compared before it is reused."""
    amount = {"steps": scale.steps, "tokens": scale.tokens, "batch": BATCH, "smoothing": SMOOTHING, "warm_up": WARM_UP}
    sizes = {"train_questions": len(data.train.ids), "test_questions": len(data.test.ids)}
    return configuration.settings() | amount | sizes | {"seed": seed}


def finished(path: Path, expected: dict[str, Any]) -> dict[str, Any] | None:
    """Reads the result of a run; None if there is none yet.

    Raises:
      ValueError: if the result has other settings.
    """
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    found = result["settings"]
    differ = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    if differ:
        lines = [f"{key}: {found.get(key)} in the file, {expected.get(key)} expected" for key in differ]
        raise ValueError(
            f"{path} has the result of a run with other settings.\n  {'; '.join(lines)}\n"
            "  Pass another --out, or remove the file to repeat the run."
        )
    return result


def write(path: Path, value: Any) -> None:
    """Writes JSON atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value) + "\n")
    os.replace(partial, path)


@functools.cache
def model(layers: int) -> minilm.Classifier:
    """Returns the demo's model with the first `layers` layers."""
    return minilm.Classifier(MODEL.classes, dataclasses.replace(MODEL.encoder, layers=layers))


@functools.cache
def encoder(layers: int) -> dict[str, Any]:
    """Returns the published weights of the first `layers` layers."""
    names = {"embeddings", *(f"layer_{i}" for i in range(layers))}
    return {name: weights for name, weights in minilm.load_encoder().items() if name in names}


def base(seed: int, layers: int) -> dict[str, Any]:
    """Returns the frozen base: the published encoder, and a random head that depends on the seed."""
    return {"params": {"encoder": encoder(layers), "classifier": init_head(jax.random.key(seed))}}


def is_head(path: str) -> bool:
    """Returns whether a leaf belongs to the head, which has a separate learning rate and is not counted."""
    return "/classifier/" in path


def scaled(updates: Mapping[str, Any], rest: Any, head: Any) -> dict[str, Any]:
    """Multiplies the updates by the learning rates of the head and of the rest."""
    return {path: optax.tree.scale(-(head if is_head(path) else rest), part) for path, part in updates.items()}


@functools.cache
def make_step(
    ratio: float | None, layers: int
) -> tuple[optax.GradientTransformation, Callable[..., tuple[Any, Any, Array]]]:
    """Returns Adam with LoRA+'s ratio, and an update `(params, adapter, state, rates, ids, mask, labels)`.

    Learning rates and everything that depends on the seed are arguments, so that one compiled step serves all seeds and
    rates. PiSSA uses the step of LoRA, because its factors have the same shapes.
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
    """Returns the kernels of the model, which are the same for every seed and batch."""
    ids = jax.ShapeDtypeStruct((BATCH, trec.LENGTHS[0]), jnp.int32)
    mask = jax.ShapeDtypeStruct(ids.shape, jnp.bool_)
    return lj.kernels(model(layers).apply, base(0, layers), ids, mask)


def initialize(configuration: Configuration, seed: int, layers: int) -> tuple[Any, Any]:
    """Returns the initial adapter and its base."""
    params = base(seed, layers)
    key = jax.random.key(seed)
    adapter = lj.init(key, params, configuration.spec, kernels=kernels(layers))
    if configuration.principal:
        params, adapter = lj.starts.pissa(params, adapter, niter=4, key=key)  # the exact decomposition takes a minute
    return adapter, params


def epochs(tokens: trec.Tokens, seed: int) -> Iterator[trec.Batch]:
    """Yields batches of one epoch after another, indefinitely, in an order that depends on the seed."""
    rng = np.random.default_rng(seed)
    while True:
        yield from trec.training_batches(tokens, BATCH, rng)


@functools.cache
def predict(layers: int) -> Callable[..., Array]:
    """Returns the jitted plain model, to which the test passes the merged parameters."""
    return jax.jit(model(layers).apply)


def train(
    configuration: Configuration, seed: int, scale: Scale, data: Data, bar: Any, keep: Path | None
) -> dict[str, Any]:
    """Trains and tests one configuration with one seed; returns the result without the settings."""
    began = time.perf_counter()
    batches = list(itertools.islice(epochs(data.train, seed), scale.steps))
    adapter, params = initialize(configuration, seed, scale.layers)
    head_size, rest_size = (
        sum(leaf.size for path, part in adapter.items() if is_head(path) is head for leaf in jax.tree.leaves(part))
        for head in (True, False)
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
    typical = sum(np.median(times, axis=0) * len(times) for times in seconds.values()) / len(losses)
    wrong = np.flatnonzero(logits.argmax(-1) != data.test.labels).tolist()
    chosen = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(logits)), data.test.labels]
    return {
        "accuracy": 1 - len(wrong) / len(logits),
        "wrong": wrong,
        "test_loss": -float(chosen.mean()),
        "training_loss": statistics.fmean(losses[-20:]),
        "trained": rest_size,
        "head": head_size,
        # The median per length, because the first step includes compilation, then the mean over all batches.
        "step_ms": 1e3 * typical[0],
        "step_cpu_ms": 1e3 * typical[1],  # CPU time of all cores, which depends less on other load
        "seconds": time.perf_counter() - began,
    }


def run_all(
    wanted: list[tuple[Path, Configuration, int]], scale: Scale, data: Data, keep: Callable[[str, int], Path | None]
) -> list[dict[str, Any]]:
    """Runs all configurations that have no result yet, and returns all results."""
    plan = [(*run, settings(*run[1:], scale, data)) for run in wanted]  # path, configuration, seed, settings
    results = {path: finished(path, expected) for path, _, _, expected in plan}
    missing = [entry for entry in plan if results[entry[0]] is None]
    console.print(f"{len(plan)} runs of {scale.steps} steps; {len(plan) - len(missing)} of them are finished.")
    with progress_bar("", len(missing) * scale.steps, " steps", disable=not missing) as bar:
        for number, (path, configuration, seed, expected) in enumerate(missing, start=1):
            name = configuration.name
            bar.set_description_str(f"run {number} of {len(missing)}: {name}, seed {seed}", refresh=False)
            results[path] = {"settings": expected} | train(configuration, seed, scale, data, bar, keep(name, seed))
            write(path, results[path])
    return [found for found in results.values() if found is not None]


def analyze(out: Path, layers: int) -> dict[str, Any]:
    """Measures the saved adapters as in section 7 of the paper, averaged over the layers for each kernel name."""
    bases = [base(seed, layers) for seed in (0, 1)]
    adapters = {(name, seed): lj.restore(adapter_path(out, name, seed), base=bases[seed]) for name, seed in ANALYZED}
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
        rank: over_layers({path: row._asdict() for path, row in found.items()}) for rank, found in measured.items()
    }
    return {"similarity": similarity, "amplification": amplification}


def over_layers(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the mean over the layers for each kernel name, such as `query`, rounded, as JSON values."""
    kinds: dict[str, list[Any]] = {}
    for path, value in found.items():
        kinds.setdefault(path.split("/")[-2], []).append(value)

    def mean(*values: Array) -> Any:
        # NumPy would read a list of JAX arrays element by element.
        return np.round(np.mean([np.asarray(value, np.float64) for value in values], axis=0), 4).tolist()

    return {kind: jax.tree.map(mean, *values) for kind, values in kinds.items()}


def adapter_path(out: Path, name: str, seed: int) -> Path:
    """Returns the path of the saved adapter of a run."""
    return out / "adapters" / f"{name}-{seed}"


def tune(out: Path, scale: Scale) -> None:
    """Tries the rates of `GRID` on held-out training questions, and prints the accuracies."""
    data = Data(*(trec.tokenize(questions, scale.tokens) for questions in trec.split(trec.read().train, HELD_OUT)))
    wanted = []
    likeliest_first = itertools.zip_longest(*([(name, rate) for rate in rates] for name, rates in GRID.items()))
    for name, rate in filter(None, itertools.chain(*likeliest_first)):
        rates = {"rate": rate} | ({"head_rate": rate} if name == "probe" else {})
        configuration = dataclasses.replace(CONFIGURATIONS[name], **rates)
        wanted.append((out / "tuning" / f"{name}-{rate:g}.json", configuration, TUNING_SEED))
    results = run_all(wanted, scale, data, lambda name, seed: None)
    for (_, configuration, _), found in zip(wanted, results, strict=True):
        name, rate = configuration.name, configuration.rate
        console.print(f"{name:16}{rate:<8g}{found['accuracy']:7.1%}   loss {found['test_loss']:.3f}")


def reproduce(out: Path, scale: Scale) -> dict[str, Any]:
    """Runs every configuration with every seed and the analysis, and returns all results."""
    data, count = trec.read(), scale.test_questions
    test = trec.Questions(data.test.texts[:count], data.test.labels[:count])
    tokens = Data(trec.tokenize(data.train, scale.tokens), trec.tokenize(test, scale.tokens))
    wanted = [
        (out / "runs" / f"{name}-{seed}.json", configuration, seed)
        for seed in scale.seeds
        for name, configuration in CONFIGURATIONS.items()
    ]
    runs = run_all(
        wanted, scale, tokens, lambda name, seed: adapter_path(out, name, seed) if (name, seed) in ANALYZED else None
    )
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    results = {"versions": versions, "runs": runs, "analysis": analyze(out, scale.layers)}
    write(out / "results.json", results)
    return results


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("paper_output"), help="output folder (paper_output)")
    parser.add_argument("--short", action="store_true", help="every configuration, for two steps")
    parser.add_argument("--tune", action="store_true", help="try learning rates on held-out training questions")
    parser.add_argument("--write-docs", action="store_true", help="write tables and figures into docs/")
    given = parser.parse_args()
    if given.short and given.write_docs:
        parser.error("--short is for tests only; its results do not belong in the docs")
    scale = SHORT if given.short else FULL
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
