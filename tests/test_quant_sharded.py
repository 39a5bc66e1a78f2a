"""Quantized bases on meshes: the law holds, and a step sends packed bytes, never dense kernels.

The bytes are read from the program that is compiled for CPUs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import FORWARD, GRADIENT, assert_close, bits
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from evaluate import without_compiling
from law import normal, total
from test_shard_map import SHARD_MAPS

import lora_jax as lj
from lora_jax import quant, testing

LAYERS, WIDTH, HIDDEN, RANK = 3, 256, 512, 2
FORMATS: dict[str, Callable[..., quant.Format]] = {
    "NF4": lambda axes: quant.NF4(block=16, axes=axes),
    "NF4, single": lambda axes: quant.NF4(block=16, double=False, axes=axes),
    "int8": lambda axes: quant.Int8(axes=axes),
}
SHAPES = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}


class Layout(NamedTuple):
    """The shardings of the model on eight devices: the sizes of the mesh, and the specs of the kernels of a layer."""

    data: int
    model: int
    up: P
    down: P

    def mesh(self, kind: AxisType = AxisType.Auto) -> Mesh:
        return jax.make_mesh((self.data, self.model), ("data", "model"), axis_types=(kind,) * 2)

    def shardings(self, mesh: Mesh, *, stacked: bool) -> dict[str, Any]:
        stack = [None] if stacked else []
        return {name: NamedSharding(mesh, P(*stack, *getattr(self, name))) for name in SHAPES}


LAYOUTS = {
    "FSDP along inputs": Layout(8, 1, P("data", None), P("data", None)),
    "FSDP along outputs": Layout(8, 1, P(None, "data"), P(None, "data")),
    "tensor parallel": Layout(1, 8, P(None, "model"), P("model", None)),
    "both": Layout(2, 4, P("data", "model"), P("model", "data")),
}


def layer(x: jax.Array, kernels: Any) -> jax.Array:
    """The hidden units are sharded along `model`, if there is a mesh; everything along the batch."""
    hidden = constrained(jnp.tanh(x @ kernels["up"]), P("data", "model"))
    return x + constrained(hidden @ kernels["down"], P("data", None))


def constrained(x: jax.Array, spec: P) -> jax.Array:
    return x if jax.sharding.get_abstract_mesh().empty else lax.with_sharding_constraint(x, spec)


def scanned(params: Any, x: jax.Array) -> jax.Array:
    return lax.scan(jax.checkpoint(lambda x, kernels: (layer(x, kernels), None)), x, params)[0]


def unrolled(params: Any, x: jax.Array) -> jax.Array:
    for kernels in params:
        x = layer(x, kernels)
    return x


MODELS = {"scanned": scanned, "unrolled": unrolled}


@functools.cache
def dense_params(model: str) -> Any:
    stack = {name: normal(LAYERS, *shape, seed=seed, size=0.05) for seed, (name, shape) in enumerate(SHAPES.items())}
    if model == "scanned":
        return stack
    return [{name: w[number] for name, w in stack.items()} for number in range(LAYERS)]


class Case(NamedTuple):
    """A model on a quantized base, on one device."""

    apply: Any
    dense: Any
    formats: Any
    small: Any
    adapter: Any
    x: jax.Array


@functools.cache
def case(model: str, name: str) -> Case:
    axes = "bio" if model == "scanned" else "io"
    params, formats = dense_params(model), {"**": FORMATS[name](axes)}
    small = quant.quantize(params, formats)
    spec = {"**": lj.LoRA(rank=RANK, alpha=3, axes=axes)}
    adapter = lj.init(jax.random.key(0), small, spec)
    leaves, treedef = jax.tree.flatten(adapter)
    adapter = treedef.unflatten([normal(*leaf.shape, seed=9 + at, size=0.1) for at, leaf in enumerate(leaves)])
    return Case(MODELS[model], params, formats, small, adapter, normal(32, WIDTH, seed=5))


def mean_square(y: jax.Array) -> jax.Array:
    return jnp.mean((y - 1) ** 2)


def loss_of(apply: Any) -> Any:
    return lambda adapter, params, x: mean_square(lj.lora(apply)(params, adapter, x))


@functools.cache
def expected(model: str, name: str) -> Any:
    """The loss and its gradient with merged kernels on one device."""
    one = case(model, name)
    base = quant.dequantize(one.small)
    merged = lambda adapter: mean_square(one.apply(lj.merge(base, adapter), one.x))  # noqa: E731
    return jax.jit(jax.value_and_grad(merged))(one.adapter)


def place_all(shardings: Any, model: str) -> Any:
    return shardings if model == "scanned" else [shardings] * LAYERS


class Run(NamedTuple):
    """A step on a mesh: its results, and what it sends."""

    results: Any
    text: str
    sent: Any

    def gathered(self) -> dict[int, int]:
        """How often each device receives an array of a size, by its bytes."""
        found: dict[int, int] = {}
        for collective in self.sent:
            if collective.kind == "all-gather":
                found[collective.result] = found.get(collective.result, 0) + collective.times
        return found

    def shapes(self) -> set[tuple[str, tuple[int, ...]]]:
        """The dtypes and sizes of all that is gathered or exchanged."""
        kinds = "all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce"
        results = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", self.text)
        arrays = [found for result in results for found in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", result)]
        return {(dtype, tuple(sorted(int(size) for size in sizes.split(",") if size))) for dtype, sizes in arrays}


@functools.cache
def run(layout: str, model: str, name: str) -> Run:
    one, placement = case(model, name), LAYOUTS[layout]
    mesh = placement.mesh()
    dense = place_all(placement.shardings(mesh, stacked=model == "scanned"), model)
    small = quant.quantize(jax.device_put(one.dense, dense), one.formats)
    everywhere, batch = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def step(adapter: Any, params: Any, x: jax.Array) -> Any:
        if placement.data > 1:
            params = quant.gather(params, dense, "data")
        return jax.value_and_grad(loss_of(one.apply))(adapter, params, x)

    with jax.set_mesh(mesh):
        adapter, x = jax.device_put(one.adapter, everywhere), jax.device_put(one.x, batch)
        program = jax.jit(step, out_shardings=everywhere).lower(adapter, small, x).compile()
        return Run(program(adapter, small, x), program.as_text(), testing.collectives(program))


def packed_sizes(layout: str, model: str, name: str) -> dict[str, list[int]]:
    """The bytes of a layer's arrays that are gathered along `data`, on the devices of one row of `model`."""
    one, placement = case(model, name), LAYOUTS[layout]
    layer = jax.tree.map(lambda x: x[0], one.small) if model == "scanned" else one.small[0]
    places = quant.shardings(layer, placement.shardings(placement.mesh(), stacked=False))

    def gathered(array: Any, place: NamedSharding) -> int:
        count = {None: 1, "data": 1, "model": placement.model}
        return array.nbytes // np.prod([count[entry] for entry in place.spec]) if "data" in place.spec else 0

    return {path: [n for n in jax.tree.leaves(jax.tree.map(gathered, layer[path], places[path])) if n] for path in layer}


EVERYTHING = [(layout, model, name) for layout in LAYOUTS for model in MODELS for name in FORMATS]


@pytest.mark.parametrize(("layout", "model", "name"), EVERYTHING)
def test_a_step_on_a_mesh_matches_merged_kernels_on_one_device(layout: str, model: str, name: str) -> None:
    assert_close(run(layout, model, name).results, expected(model, name), GRADIENT)


@pytest.mark.parametrize(("layout", "model", "name"), EVERYTHING)
def test_a_step_sends_packed_bytes_of_the_base(layout: str, model: str, name: str) -> None:
    found, sizes = run(layout, model, name), packed_sizes(layout, model, name)
    print(layout, model, name, found.gathered(), sizes, sorted(found.shapes()))
    raise SystemExit


# Explicit meshes


def explicit_layer(x: jax.Array, kernels: Any) -> jax.Array:
    up, down = jax.reshard(kernels["up"], P(None, "model")), jax.reshard(kernels["down"], P("model", None))
    hidden = jnp.tanh(x @ up)
    return x + jnp.einsum("bh,hd->bd", hidden, down, out_sharding=P("data", None))


def explicit_model(params: Any, tokens: jax.Array) -> jax.Array:
    x = params["table"].at[tokens].get(out_sharding=P("data", None))
    x = lax.scan(jax.checkpoint(lambda x, kernels: (explicit_layer(x, kernels), None)), x, params["layers"])[0]
    return explicit_layer(x, params["last"])


def explicit_run(name: str, sizes: tuple[int, int]) -> tuple[Any, Any, Run]:
    """The loss and gradient of the adapted model, of the model with merged kernels, and the collectives of the former."""
    data, model = sizes
    mesh = Layout(data, model, P(), P()).mesh(AxisType.Explicit)
    both = LAYOUTS["both"]
    stack, last = dense_params("scanned"), {name: w[0] for name, w in dense_params("scanned").items()}
    params = {"layers": stack, "last": last, "table": normal(64, WIDTH, seed=7)}
    at = {
        "layers": both.shardings(mesh, stacked=True),
        "last": both.shardings(mesh, stacked=False),
        "table": NamedSharding(mesh, P("model", "data")),
    }
    with jax.set_mesh(mesh):
        params = jax.device_put(params, at)
        make = FORMATS[name]
        small = quant.quantize(params, {"table": make("oi"), "layers/*": make("bio"), "last/*": make("io")})
        spec = {
            "table": lj.LoRA(rank=RANK, alpha=3, axes="io"),
            "layers/*": lj.LoRA(rank=RANK, alpha=3, axes="bio"),
            "last/*": lj.LoRA(rank=RANK, alpha=3, axes="io"),
        }
        shapes = jax.eval_shape(lambda key: lj.init(key, small, spec), jax.random.key(0))
        leaves, treedef = jax.tree.flatten(shapes)
        adapter = treedef.unflatten([normal(*leaf.shape, seed=9 + n, size=0.1) for n, leaf in enumerate(leaves)])
        adapter = jax.device_put(adapter, lj.sharding.like_base(adapter, small))
        tokens = jax.device_put(jnp.arange(32) * 7 % 64, NamedSharding(mesh, P("data")))
        step = jax.jit(jax.value_and_grad(loss_of(explicit_model)))
        program = step.lower(adapter, small, tokens).compile()
        got = program(adapter, small, tokens)

        def merged(adapter: Any, base: Any) -> jax.Array:
            return mean_square(explicit_model(lj.merge(base, adapter), tokens))

        expected = jax.jit(jax.value_and_grad(merged))(adapter, quant.dequantize(small))
    return got, expected, Run(got, program.as_text(), testing.collectives(program))


@pytest.mark.parametrize("name", FORMATS)
def test_a_step_on_an_explicit_mesh_sends_packed_bytes(name: str) -> None:
    got, expected, found = explicit_run(name, (2, 4))
    print(name, found.gathered(), sorted(found.shapes()))
    assert_close(got, expected, GRADIENT)


# Models with `shard_map`

BY_DEVICE = {"int8": lambda axes: quant.Int8(axes=axes), "NF4": lambda axes: quant.NF4(block=2, axes=axes)}


@pytest.mark.parametrize("name", BY_DEVICE)
@pytest.mark.parametrize("case_name", SHARD_MAPS)
def test_a_shard_map_of_a_quantized_kernel_matches_the_merged_kernel(case_name: str, name: str) -> None:
    one = SHARD_MAPS[case_name]
    small = quant.quantize(one.params, {"w": BY_DEVICE[name](one.axes or one.roles)})
    base = quant.dequantize(small)

    def both(adapter: Any, small: Any) -> Any:
        loss = lambda adapter: total(lj.lora(one.apply)(small, adapter, *one.arrays))  # noqa: E731
        merged = lambda adapter: total(one.apply(lj.merge(base, adapter), *one.arrays))  # noqa: E731
        return jax.value_and_grad(loss)(adapter), jax.value_and_grad(merged)(adapter)

    got, expected = without_compiling(both)(one.adapter, small)
    assert_close(got, expected, GRADIENT)
