"""Decoding a batch whose rows have different adapters, at the sizes of SmolLM2, relative to the base and to PEFT.

All methods make the same steps, one token of each row with a cache, and are interleaved step by step. Weights are
random: neither time nor memory depends on them.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import records
from against.figures import progress
from flax import nnx
from jax import Array
from jax.sharding import SingleDeviceSharding
from records import plural
from timing import timed

import lora_jax as lj
import qlora_smollm2
import smollm2
from lora_jax import many

RANK = 8
VARIANT = lj.LoRA(rank=RANK, alpha=16)
TARGETS = {"attention": ("query", "key", "value", "out"), "mlp": ("gate", "up", "down")}
LOADED = (1, 8, 64)  # adapters
PEFT = "PEFT, `adapter_names=`"
TORCH = ("torch", "transformers", "peft")
HELD = "parameters, adapters, cache"
COLUMNS = {"step": "×ms", HELD: "MB", "temporary": "MB"}


class Load(NamedTuple):
    """The sizes of the decoder, the rows of the batch, the tokens of each prompt and the tokens to decode."""

    sizes: smollm2.Sizes
    rows: int
    prompt: int
    tokens: int


FULL = Load(smollm2.Sizes(), rows=8, prompt=32, tokens=8)
TINY = Load(smollm2.Sizes(vocabulary=61, d_model=32, layers=2, heads=2, kv_heads=1, d_mlp=64), 4, 5, 2)


class Method(NamedTuple):
    """A way to decode: `decode(held, ids, cache, at) -> (logits, cache)`, and the arrays `held` in memory."""

    decode: Callable[..., tuple[Array, smollm2.Cache]]
    held: Any


class Gathered(nnx.Module):
    """A linear layer whose factors are gathered for each row: what one would write by hand."""

    def __init__(self, kernel: Array, a: Array, b: Array, which: Array) -> None:
        self.kernel, self.a, self.b, self.which = map(nnx.Variable, (kernel, a, b, which))

    def __call__(self, x: Array) -> Array:
        which, rows = self.which[...], x.reshape(self.which.shape[0], -1, x.shape[-1])
        a, b = (factor[...][which].astype(x.dtype) for factor in (self.a, self.b))
        low_rank = jnp.einsum("ntr,nrf->ntf", jnp.einsum("ntd,ndr->ntr", rows, a) * VARIANT.scale, b)
        return (rows @ self.kernel[...] + low_rank).reshape(*x.shape[:-1], -1)


def decoder_of(sizes: smollm2.Sizes, dtype: Any) -> smollm2.Llama:
    """Returns a decoder with random weights."""
    return nnx.jit(lambda: smollm2.Llama(sizes, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(params=0)))()


def numbers_of(rows: int, adapters: int) -> np.ndarray:
    """Returns the adapter of each row: as many different ones as there can be."""
    return (np.arange(rows) * max(adapters // rows, 1) % adapters).astype(np.int32)


def methods(load: Load, loaded: tuple[int, ...] = LOADED, dtype: Any = jnp.float32) -> Iterator[tuple[str, Method]]:
    """Yields the methods by name."""
    decoder = decoder_of(load.sizes, dtype)
    model = qlora_smollm2.functions(decoder)
    kernels = qlora_smollm2.find_kernels(model)
    make = lambda key: lj.init(key, model.params, {lj.targets.all_linear: VARIANT}, kernels=kernels)  # noqa: E731

    @jax.jit
    def draw(key: Array) -> Any:
        leaves, treedef = jax.tree.flatten(make(key))
        keys = jax.random.split(key, len(leaves))
        return treedef.unflatten(0.1 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True))

    def adapters(number: int) -> Any:
        return {str(at): jax.tree.map(np.asarray, draw(jax.random.key(at))) for at in range(number)}

    one = adapters(1)["0"]
    yield "base", Method(model.decode, model.params)
    yield "merged", Method(model.decode, jax.jit(lj.merge)(model.params, one))
    adapted = lj.lora(model.decode)
    yield "one adapter for all rows", Method(lambda held, *args: adapted(*held, *args), (model.params, one))
    axes = smollm2.Cache(1, 1, 0)
    mixed = many.per_example(model.decode, in_axes=(0, axes, 0), out_axes=(0, axes))
    for number in loaded:
        which, stacked = numbers_of(load.rows, number), many.stack(adapters(number))
        yield (
            f"mixed, {plural(number)}",
            Method(lambda held, *args: mixed(*held, *args), (model.params, stacked, which)),
        )
        selected = jax.jit(many.select)(stacked, which)
        yield (
            f"mixed, {plural(number)}, selected before",
            Method(lambda held, *args: mixed(*held[:2], None, *args), (model.params, selected)),
        )
        graph, state = nnx.split(by_hand(decoder, stacked, which))
        yield (
            f"by hand, {plural(number)}",
            Method(lambda held, *args, graph=graph: nnx.merge(graph, held, copy=True).decode(*args), state),
        )


def by_hand(decoder: smollm2.Llama, stacked: many.Stack, which: np.ndarray) -> smollm2.Llama:
    """Returns the decoder with `Gathered` in place of its linear layers."""
    graph, state = nnx.split(decoder)
    found = nnx.merge(graph, state)
    for part, names in TARGETS.items():
        for name in names:
            leaf = stacked.members.trainable[f"layers/{part}/{name}/kernel"]
            kernel = getattr(getattr(found.layers, part), name).kernel[...]
            factors = (jnp.moveaxis(leaf.arrays[factor], 0, 1) for factor in ("a", "b"))  # layers first
            by_layer = jnp.broadcast_to(which, (len(kernel), *which.shape))
            setattr(getattr(found.layers, part), name, Gathered(kernel, *factors, by_layer))
    return found


class Session:
    """One method: its compiled step, its memory, and the state of decoding."""

    def __init__(self, name: str, method: Method, load: Load, dtype: Any = jnp.float32, device: Any = None) -> None:
        progress(f"compile: {name}")
        self.method, self.load, self.dtype = method, load, dtype
        self.slots = load.prompt + load.tokens + 1

        def step(held: Any, ids: Array, cache: smollm2.Cache) -> tuple[Array, smollm2.Cache]:
            at = jnp.full_like(ids[:, :1], ids.shape[1] - 1)
            logits, cache = method.decode(held, ids, cache, at)
            return logits[:, 0].argmax(-1).astype(jnp.int32)[:, None], cache

        self.jitted = jax.jit(step, donate_argnums=2)
        sharding = None if device is None else SingleDeviceSharding(device)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=sharding),
            (method.held, np.zeros((load.rows, 1), np.int32), self.empty()),
        )
        self.program = self.jitted.lower(*shapes).compile()
        memory, cost = self.program.memory_analysis(), self.program.cost_analysis()
        self.figures = {
            "arguments": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "FLOPs": cost["flops"],  # counts a loop body once
            "accessed": cost["bytes accessed"],
        }

    def empty(self) -> smollm2.Cache:
        """Returns an empty cache."""
        return smollm2.empty_cache(self.load.sizes, self.load.rows, self.slots, self.dtype)

    def start(self) -> Array:
        """Evaluates the prompts; returns the first token of each row."""
        rng = np.random.default_rng(0)
        prompts = rng.integers(3, self.load.sizes.vocabulary, (self.load.rows, self.load.prompt)).astype(np.int32)
        self.ids, self.cache = self.jitted(self.method.held, prompts, self.empty())
        return jax.block_until_ready(self.ids)

    def step(self) -> float:
        """Decodes one token of each row; returns the seconds."""
        seconds, (self.ids, self.cache) = timed(lambda: self.program(self.method.held, self.ids, self.cache))
        return seconds


class Torch:
    """PEFT's methods, in a process of another interpreter."""

    def __init__(self, interpreter: str, load: Load, loaded: tuple[int, ...]) -> None:
        script = Path(__file__).with_name("many_torch.py")
        given = {**load._asdict(), "sizes": dataclasses.asdict(load.sizes), "loaded": loaded, "rank": RANK}
        self.process = subprocess.Popen(
            [interpreter, str(script), json.dumps(given)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.methods: dict[str, int] = self._read()  # resident bytes by name

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"Expected an answer of the process of torch; it ended with {self.process.wait()}.")
        return json.loads(line)

    def call(self, command: str, name: str) -> float:
        """Calls `start` or `step` of a method; returns the seconds."""
        assert self.process.stdin is not None
        print(json.dumps([command, name]), file=self.process.stdin, flush=True)
        return float(self._read())

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def why_no_torch(interpreter: str) -> str:
    """Returns why an interpreter cannot run PEFT; nothing if it can."""
    if not interpreter:
        return "not installed: pass --torch"
    try:
        ran = subprocess.run([interpreter, "-c", f"import {', '.join(TORCH)}"], capture_output=True, text=True)
    except OSError as error:
        return f"not installed: {error}"
    return "" if ran.returncode == 0 else f"not installed: {ran.stderr.strip().splitlines()[-1]}"


def versions(interpreter: str) -> dict[str, str]:
    """Returns the versions of what PEFT needs; empty if the interpreter cannot run it."""
    if why_no_torch(interpreter):
        return {}
    code = f"from importlib.metadata import version; print(*map(version, {TORCH}))"
    ran = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(TORCH, ran.stdout.split(), strict=True))


def measure(load: Load, loaded: tuple[int, ...], rounds: int, interpreter: str = "") -> dict[str, dict[str, Any]]:
    """Returns the figures of all methods; their steps are interleaved."""
    sessions = {name: Session(name, method, load) for name, method in methods(load, loaded)}
    rows: dict[str, dict[str, Any]] = {
        name: {HELD: session.figures["arguments"], "temporary": session.figures["temporary"]}
        for name, session in sessions.items()
    }
    steps: dict[str, Callable[[], float]] = {name: session.step for name, session in sessions.items()}
    starts: list[Callable[[], Any]] = [session.start for session in sessions.values()]
    reason = why_no_torch(interpreter)
    torch = None if reason else Torch(interpreter, load, loaded)
    if torch is None:
        rows[PEFT] = {"step": reason}
    else:
        for name, size in torch.methods.items():
            rows[name] = {HELD: size}
            starts.append(lambda n=name: torch.call("start", n))
            steps[name] = lambda n=name: torch.call("step", n)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        tokens = [start() for start in starts]
        if number == 0:
            names = list(sessions)
            for name in names[names.index("one adapter for all rows") :]:
                assert np.isfinite(np.asarray(tokens[names.index(name)])).all()
        for at in range(load.tokens):
            for name, step in steps.items():
                took = step()
                if at:  # the first step after the prompts is another program's cache
                    seconds[name].append(took)
    if torch is not None:
        torch.close()
    return {name: row | ({"step": seconds[name]} if name in seconds else {}) for name, row in rows.items()}


def table(load: Load, rows: dict[str, dict[str, Any]]) -> records.Table:
    """Returns time and memory, relative to the base."""
    return records.Table(f"Decoding {load.rows} rows, float32", COLUMNS, rows)


def counted(load: Load, loaded: tuple[int, ...], device: Any, dtype: Any) -> records.Table:
    """Returns the compiler's figures of a step for a device, which need not exist."""
    rows = {name: Session(name, method, load, dtype, device).figures for name, method in methods(load, loaded, dtype)}
    columns = dict.fromkeys(("arguments", "temporary", "accessed"), "MB")
    return records.Table(f"Decoding {load.rows} rows, {jnp.dtype(dtype).name}", columns, rows)


def tables(rounds: int, interpreter: str, *, short: bool = False) -> Iterator[records.Table]:
    """Yields the table."""
    load, loaded = (TINY, (1, 2)) if short else (FULL, LOADED)
    yield table(load, measure(load, loaded, min(rounds, 2) if short else rounds, interpreter))
