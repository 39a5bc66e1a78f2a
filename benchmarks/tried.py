"""Possible optimizations of LoRA by hand, measured.

1. One product for kernels that read the same activation: x·[Aq Ak Av], split in three.
2. Recomputing the rank-r activations in the backward pass.
3. No gradient of the activations below the first adapted layer.

Usage:
    python benchmarks/tried.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import models
import records
from against.figures import progress
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


COLUMNS = {"FLOPs": "×G", "temporary": "×MB", "time": "×ms"}


def measure(trial: Trial, *, steps: int, gradient: bool) -> dict[str, dict[str, Any]]:
    """Returns the figures of each loss or its gradient; the runs are interleaved."""
    rows: dict[str, dict[str, Any]] = {}
    programs = {}
    for name, loss in trial.losses.items():
        function = jax.grad(loss) if gradient else loss
        programs[name] = jax.jit(function).lower(*trial.args).compile()
        temporary = programs[name].memory_analysis().temp_size_in_bytes
        rows[name] = {"FLOPs": testing.flops(function, *trial.args), "temporary": temporary, "time": []}
    for number in range(steps + 1 if steps else 0):
        for name, program in programs.items():
            took = timed(lambda p=program: p(*trial.args))[0]
            rows[name]["time"] += [took] * (number > 0)
    return rows


def tables(steps: int) -> Iterator[records.Table]:
    """Yields a table for each trial."""
    trials = {
        "query, key, value, d = 256, rank 8, 512 tokens": (lambda: attention(256, 8, 512), True),
        "query, key, value, d = 768, rank 8, 512 tokens": (lambda: attention(768, 8, 512), True),
        "query, key, value, d = 768, rank 64, 512 tokens": (lambda: attention(768, 64, 512), True),
        "decoder of 8 layers": (last_layer, False),
    }
    for title, (make, gradient) in trials.items():
        progress(title)
        yield records.Table(title, COLUMNS, measure(make(), steps=steps, gradient=gradient))


def main() -> None:
    """Measures, prints, and writes the requested file."""
    parser = records.parser(__doc__)
    parser.add_argument("--steps", type=int, default=15, help="how many times each program is timed; 0 for none")
    given = parser.parse_args()
    records.publish(tables(given.steps), given.json)


if __name__ == "__main__":
    main()
