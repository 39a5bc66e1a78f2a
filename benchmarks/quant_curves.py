"""Fine-tunes MiniLM on TREC question types with LoRA, on bases of 16, 8 and 4 bits, and plots the losses.

All runs have the same data, seeds and hyperparameters, those of `examples/finetune_trec.py`. The kernels of all layers
are quantized; embeddings and norms stay in bfloat16.

Usage:
    PYTHONPATH=examples python benchmarks/quant_curves.py                # writes docs/quantization.png
    PYTHONPATH=examples python benchmarks/quant_curves.py --steps 8 --plot curves.png
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import records

import finetune_trec
import lora_jax as lj
import trec
from lora_jax import quant

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "encoder/**/{attention,mlp}/*/kernel"
BASES: dict[str, quant.Format | None] = {
    "bfloat16": None,
    "Int8": quant.Int8(),
    "NF4": quant.NF4(double=False),
    "NF4, double": quant.NF4(),
}
WINDOW = 25


def run(name: str, scale: finetune_trec.Scale, data: trec.Trec, seed: int) -> dict[str, Any]:
    """Trains on one base; returns the loss of each batch and the test accuracy."""
    params = finetune_trec.base_params()
    params["params"]["encoder"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["params"]["encoder"])
    train, test = (trec.tokenize(questions, scale.max_tokens) for questions in (data.train, data.test))
    example = next(trec.ordered_batches(test, finetune_trec.BATCH))
    kernels = lj.kernels(finetune_trec.MODEL.apply, params, example.ids, example.mask)
    adapter = lj.init(jax.random.key(seed), params, finetune_trec.SPEC, kernels=kernels)
    if (format_ := BASES[name]) is not None:
        params = quant.quantize(params, {f"params/{KERNELS}": format_}, kernels=kernels)
    start = time.perf_counter()
    _, curve, logits = finetune_trec.train(params, adapter, scale, train, test)
    return {
        "bytes": sum(x.nbytes for x in jax.tree.leaves(params["params"]["encoder"] | {"embeddings": None})),
        "loss": [value for _, value in curve.loss],
        "accuracy": finetune_trec.accuracy(logits, test.labels),
        "seconds": time.perf_counter() - start,
    }


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Returns the mean loss of the last batches and the test accuracy, for each seed."""
    lines = [["base", "layers", f"loss, last {WINDOW} batches", "test accuracy"]]
    for name, runs in found.items():
        losses = ", ".join(f"{np.mean(one['loss'][-WINDOW:]):.4f}" for one in runs)
        accuracies = ", ".join(f"{one['accuracy']:.1%}" for one in runs)
        lines.append([name, f"{runs[0]['bytes'] / 1e6:.1f} MB", losses, accuracies])
    return records.aligned(lines)


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plots the mean loss over seeds, smoothed, and its difference from that of the first base."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def smooth(runs: list[dict[str, Any]]) -> np.ndarray:
        mean = np.mean([one["loss"] for one in runs], axis=0)
        window = min(WINDOW, len(mean))
        return np.convolve(mean, np.ones(window) / window, mode="valid")

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7.2, 6.4), sharex=True, layout="constrained")
    reference = smooth(next(iter(found.values())))
    for name, runs in found.items():
        top.plot(smooth(runs), label=name, linewidth=1.4)
        bottom.plot(smooth(runs) - reference, label=name, linewidth=1.4)
    top.set_ylabel(f"training loss, mean of {WINDOW} batches")
    top.set_ylim(bottom=0)
    top.legend(frameon=False)
    bottom.set_ylabel("difference from bfloat16")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    top.set_title("MiniLM on TREC's 50 question types, LoRA of rank 8", loc="left")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Trains, prints and plots."""
    parser = records.parser(__doc__)
    parser.add_argument("--steps", type=int, default=153, help="steps of each run; an epoch has 153")
    parser.add_argument("--seeds", type=int, default=1, help="number of adapters for each base")
    parser.add_argument("--only", action="append", choices=BASES, help="only this base; repeatable")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "quantization.png", help="the plot, as PNG")
    given = parser.parse_args()
    # Truncated to 18 tokens, 13 % of the questions, so that each base compiles two programs and not three.
    scale = finetune_trec.FULL._replace(steps=given.steps, evaluations=1, max_tokens=trec.LENGTHS[1])
    data = trec.read()
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(given.seeds):
        for name in given.only or BASES:
            found.setdefault(name, []).append(run(name, scale, data, seed))
            print(f"{name}, seed {seed}: {found[name][-1]['seconds']:.0f} s", flush=True)
    print("\n" + table(found))
    if given.json:
        given.json.write_text(json.dumps(found) + "\n")
    plot(found, given.plot)


if __name__ == "__main__":
    main()
