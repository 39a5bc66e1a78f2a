"""Low-rank products where each example has the adapter of its number: three ways to reach its factors.

gathered    A[which], B[which], then products batched over examples, as in `many.per_example`
sorted      examples sorted by adapter, `ragged_dot` with the stacked factors, back in order
all         products with the factors of all adapters as one matrix, of which those of others are set to zero
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import records
from against.figures import progress
from jax import Array, lax
from jax.sharding import SingleDeviceSharding
from timing import timed

from lora_jax import testing


class Size(NamedTuple):
    """A kernel `(d_in, d_out)` with adapters, and a batch of examples."""

    examples: int
    tokens: int
    adapters: int
    d_in: int = 576
    d_out: int = 1536
    rank: int = 8


SIZES = [Size(*numbers, adapters) for numbers in ((8, 1), (64, 1), (8, 128)) for adapters in (1, 8, 64)]
TINY = [Size(4, 2, adapters, d_in=16, d_out=12, rank=2) for adapters in (1, 3)]


def base(x: Array, w: Array, a: Array, b: Array, which: Array) -> Array:
    """The base's product alone, `(examples, tokens, d_out)`."""
    del a, b, which
    return x @ w


def gathered(x: Array, w: Array, a: Array, b: Array, which: Array) -> Array:
    """Gathers the factors of each example."""
    return x @ w + jnp.einsum("ntr,nrf->ntf", jnp.einsum("ntd,ndr->ntr", x, a[which]), b[which])


def sorted_by_adapter(x: Array, w: Array, a: Array, b: Array, which: Array) -> Array:
    """Sorts the examples and multiplies each group with the factors of its adapter."""
    order = jnp.argsort(which)
    rows = x[order].reshape(-1, x.shape[-1])
    sizes = jnp.bincount(which, length=a.shape[0]).astype(jnp.int32) * x.shape[1]
    y = lax.ragged_dot(lax.ragged_dot(rows, a, sizes), b, sizes).reshape(*x.shape[:-1], -1)
    return x @ w + jnp.zeros_like(y).at[order].set(y, unique_indices=True)


def of_all(x: Array, w: Array, a: Array, b: Array, which: Array) -> Array:
    """Multiplies with the factors of all adapters, and sets the products of other adapters to zero."""
    thin = jnp.einsum("ntd,edr->nter", x, a)
    own = which[:, None, None, None] == jnp.arange(a.shape[0])[None, None, :, None]
    return x @ w + jnp.einsum("nter,erf->ntf", jnp.where(own, thin, 0), b)


FIGURES = {"FLOPs of the compiler": "M", "accessed": "MB"}
METHODS: dict[str, Callable[..., Array]] = {
    "base": base,
    "gathered": gathered,
    "sorted": sorted_by_adapter,
    "all": of_all,
}


def arguments(size: Size, dtype: Any = jnp.float32) -> tuple[Any, ...]:
    """Random arrays."""
    shapes = {
        "x": (size.examples, size.tokens, size.d_in),
        "w": (size.d_in, size.d_out),
        "a": (size.adapters, size.d_in, size.rank),
        "b": (size.adapters, size.rank, size.d_out),
    }
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes.values()]
    return *arrays, jnp.asarray(rng.integers(0, size.adapters, size.examples), jnp.int32)


def measure(size: Size, *, rounds: int, device: Any = None, dtype: Any = jnp.float32) -> dict[str, dict[str, Any]]:
    """Returns the figures of all methods, interleaved; for another device only those of the compiler."""
    args = arguments(size, dtype)
    sharding = None if device is None else SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in args]
    rows: dict[str, dict[str, Any]] = {}
    programs = {}
    for name, method in METHODS.items():
        programs[name] = jax.jit(method).lower(*shapes).compile()
        cost = programs[name].cost_analysis()
        rows[name] = {
            "FLOPs": testing.flops(method, *args),
            "FLOPs of the compiler": cost["flops"],
            "accessed": cost["bytes accessed"],
        }
    if device is not None or not rounds:
        return rows
    results = {name: np.asarray(program(*args)) for name, program in programs.items()}
    for name in ("sorted", "all"):
        np.testing.assert_allclose(results[name], results["gathered"], rtol=1e-3, atol=1e-2)
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for _, (name, program) in itertools.product(range(5 * rounds), programs.items()):
        seconds[name].append(timed(lambda p=program: p(*args))[0])
    for name, row in rows.items():
        row["seconds"] = seconds[name]
    return rows


def tables(
    rounds: int, *, short: bool = False, device: Any = None, dtype: Any = jnp.float32
) -> Iterator[records.Table]:
    """Yields what each method needs in addition to the base's product; then, if it was run, their times."""
    added: dict[str, dict[str, float]] = {}
    seconds: dict[str, dict[str, list[float]]] = {}
    sizes = TINY if short else SIZES
    for size in sizes:
        name = f"{size.examples} × {size.tokens} tokens, {records.plural(size.adapters)}"
        progress(f"lookups: {name}")
        rows = measure(size, rounds=rounds, device=device, dtype=dtype)
        added[name] = {
            f"{method}: {figure}": row[figure] - rows["base"][figure]
            for method, row in rows.items()
            for figure in FIGURES
            if method != "base"
        }
        seconds[name] = {method: row["seconds"] for method, row in rows.items() if "seconds" in row}
    kernel = f"a kernel ({size.d_in}, {size.d_out}), rank {size.rank}, {jnp.dtype(dtype).name}"
    columns = {column: FIGURES[column.split(": ")[1]] for column in added[name]}
    yield records.Table(f"In addition to the product of the base: {kernel}", columns, added)
    if rounds:
        yield records.Table(f"Time: {kernel}", dict.fromkeys(seconds[name], "×ms"), seconds, across=True)
