"""What LoRA by hand leaves on the table, tried: which of it pays.

1. One skinny product for kernels that read the same activation: x·[Aq Ak Av], cut in three.
2. The rank-r activations made again in the backward pass instead of kept.
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
    """Ways to take one gradient, the first of which is the reference: `loss(adapter, base, x)`."""

    ways: dict[str, Loss]
    args: tuple[Any, Any, Array]


def attention(width: int, rank: int, tokens: int, layers: int = 4) -> Trial:
    """The queries, keys and values of some layers; what they are used for is all the same in both ways."""
    keys = jax.random.split(jax.random.key(0), 4)
    base = jax.random.normal(keys[0], (layers, 3, width, width)) / width**0.5
    adapter = {
        "a": jax.random.normal(keys[1], (layers, 3, width, rank)) / width**0.5,
        "b": jax.random.normal(keys[2], (layers, 3, rank, width)) / rank**0.5,
    }
    x = jax.random.normal(keys[3], (tokens, width))

    def run(three: Callable[..., list[Array]]) -> Loss:
        def loss(adapter: Any, base: Any, x: Array) -> Array:
            for layer in range(layers):
                query, key, value = three(x, base[layer], adapter["a"][layer], adapter["b"][layer])
                x = jnp.tanh(query * jax.nn.sigmoid(key)) + value
            return x.sum()

        return loss

    def apart(x: Array, w: Array, a: Array, b: Array) -> list[Array]:
        return [x @ w[i] + ((x @ a[i]) * 2.0) @ b[i] for i in range(3)]

    def together(x: Array, w: Array, a: Array, b: Array) -> list[Array]:
        thin = jnp.split((x @ jnp.concatenate(a, 1)) * 2.0, 3, 1)
        return [x @ w[i] + thin[i] @ b[i] for i in range(3)]

    def again(x: Array, w: Array, a: Array, b: Array) -> list[Array]:
        thin = jax.checkpoint(lambda x, a, b: ((x @ a) * 2.0) @ b)
        return [x @ w[i] + thin(x, a[i], b[i]) for i in range(3)]

    ways = {"each with its own": run(apart), "one skinny product": run(together), "rank-r made again": run(again)}
    return Trial(ways, (adapter, base, x))


def last_layer(layers: int = 8) -> Trial:
    """A decoder of which all layers are adapted, or the last alone."""
    size = dataclasses.replace(SMALL, layers=layers)
    one = models.case(size, scanned=False)
    last = {path: part for path, part in one.adapter.items() if path.startswith(f"block_{layers - 1}/")}
    loss = models.through_lora(one).loss

    def of(adapter: Any) -> Loss:
        return lambda _, params, tokens: jax.tree.reduce(
            lambda total, leaf: total + leaf.sum(), jax.grad(loss)(adapter, params, tokens), 0.0
        )

    return Trial({"all layers": of(one.adapter), "the last alone": of(last)}, (None, one.params, one.tokens))


def measure(trial: Trial, *, steps: int, gradient: bool) -> dict[str, tuple[int, int, float]]:
    """Operations, temporary bytes and seconds of each way; they take turns."""
    functions = {name: jax.grad(loss) if gradient else loss for name, loss in trial.ways.items()}
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
    parser.add_argument("--steps", type=int, default=15, help="how many times each way is timed")
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
        print(f"\n{title:50}{'operations':>12}{'temporary':>12}{'time':>10}")
        for name, its in figures.items():
            print(
                f"{name:50}"
                + "".join(
                    f"{'× ' + format(one / other, '.3f'):>11} " for one, other in zip(its, reference, strict=True)
                )
            )


if __name__ == "__main__":
    main()
