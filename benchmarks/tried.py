"""Possible optimizations of LoRA by hand, measured.

1. One product for kernels that read the same activation: x·[Aq Ak Av], split in three.
2. Recomputing the rank-r activations in the backward pass.
3. No gradient of the activations below the first adapted layer.

Usage:
    python benchmarks/tried.py
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import models
from jax import Array
from sizes import SMALL
from timing import timed

from lora_jax import testing

Loss = Callable[[Any, Any, Array], Array]


class Trial(NamedTuple):
    """Losses `loss(adapter, base, x)` that compute the same values; the first one is the reference."""

    losses: dict[str, Loss]
    args: tuple[Any, Any, Array]


def attention(width: int, rank: int, tokens: int, layers: int = 4) -> Trial:
    """Returns losses with queries, keys and values of some layers, and the same operations on them."""
    keys = jax.random.split(jax.random.key(0), 4)
    base = jax.random.normal(keys[0], (layers, 3, width, width)) / width**0.5
    adapter = {
        "a": jax.random.normal(keys[1], (layers, 3, width, rank)) / width**0.5,
        "b": jax.random.normal(keys[2], (layers, 3, rank, width)) / rank**0.5,
    }
    x = jax.random.normal(keys[3], (tokens, width))

    def loss_with(project: Callable[..., list[Array]]) -> Loss:
        def loss(adapter: Any, base: Any, x: Array) -> Array:
            for layer in range(layers):
                query, key, value = project(x, base[layer], adapter["a"][layer], adapter["b"][layer])
                x = jnp.tanh(query * jax.nn.sigmoid(key)) + value
            return x.sum()

        return loss

    def separate(x: Array, w: Array, a: Array, b: Array) -> list[Array]:
        return [x @ w[i] + ((x @ a[i]) * 2.0) @ b[i] for i in range(3)]

    def joined(x: Array, w: Array, a: Array, b: Array) -> list[Array]:
        thin = jnp.split((x @ jnp.concatenate(a, 1)) * 2.0, 3, 1)
        return [x @ w[i] + thin[i] @ b[i] for i in range(3)]

    def recomputed(x: Array, w: Array, a: Array, b: Array) -> list[Array]:
        thin = jax.checkpoint(lambda x, a, b: ((x @ a) * 2.0) @ b)
        return [x @ w[i] + thin(x, a[i], b[i]) for i in range(3)]

    losses = {
        "separate products": loss_with(separate),
        "one product": loss_with(joined),
        "rank-r activations recomputed": loss_with(recomputed),
    }
    return Trial(losses, (adapter, base, x))


def last_layer(layers: int = 8) -> Trial:
    """Returns losses of a decoder whose layers are all adapted, or only the last one."""
    size = dataclasses.replace(SMALL, layers=layers)
    one = models.case(size, scanned=False)
    last = {path: part for path, part in one.adapter.items() if path.startswith(f"block_{layers - 1}/")}
    loss = models.through_lora(one).loss

    def sum_of_gradient(adapter: Any) -> Loss:
        return lambda _, params, tokens: jax.tree.reduce(
            lambda total, leaf: total + leaf.sum(), jax.grad(loss)(adapter, params, tokens), 0.0
        )

    losses = {"all layers": sum_of_gradient(one.adapter), "only the last layer": sum_of_gradient(last)}
    return Trial(losses, (None, one.params, one.tokens))


def measure(trial: Trial, *, steps: int, gradient: bool) -> dict[str, tuple[int, int, float]]:
    """Returns FLOPs, temporary bytes and seconds of each loss or its gradient; the runs are interleaved."""
    functions = {name: jax.grad(loss) if gradient else loss for name, loss in trial.losses.items()}
    compiled = {name: jax.jit(function).lower(*trial.args).compile() for name, function in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(steps + 1):
        for name, program in compiled.items():
            seconds[name].append(timed(lambda p=program: p(*trial.args))[0])
    return {
        name: (
            testing.flops(functions[name], *trial.args),
            int(program.memory_analysis().temp_size_in_bytes),
            statistics.median(seconds[name][1:]),
        )
        for name, program in compiled.items()
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=15, help="how many times each program is timed")
    given = parser.parse_args()
    trials = {
        "query, key, value, d = 256, rank 8, 512 tokens": (attention(256, 8, 512), True),
        "query, key, value, d = 768, rank 8, 512 tokens": (attention(768, 8, 512), True),
        "query, key, value, d = 768, rank 64, 512 tokens": (attention(768, 64, 512), True),
        "decoder of 8 layers": (last_layer(), False),
    }
    for title, (trial, gradient) in trials.items():
        figures = measure(trial, steps=given.steps, gradient=gradient)
        reference = next(iter(figures.values()))
        print(f"\n{title:50}{'FLOPs':>12}{'temporary':>12}{'time':>10}")
        for name, row in figures.items():
            ratios = (f"× {value / other:.3f}" for value, other in zip(row, reference, strict=True))
            print(f"{name:50}" + "".join(f"{ratio:>11} " for ratio in ratios))


if __name__ == "__main__":
    main()
