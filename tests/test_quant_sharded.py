"""Quantized bases on meshes: the law holds, and a step sends packed bytes, never dense kernels.

The bytes are read from the program that is compiled for CPUs.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from evaluate import without_compiling
from helpers import GRADIENT, assert_close
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
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


def spec_of(variant: Callable[[str], Any], model: str) -> dict[str, Any]:
    return {"**": variant("bio" if model == "scanned" else "io")}


def lora_of(axes: str) -> lj.LoRA:
    return lj.LoRA(rank=RANK, alpha=3, axes=axes)


def random_adapter(params: Any, spec: Any) -> Any:
    """An adapter with nonzero factors on the default device."""
    shapes = jax.eval_shape(lambda key: lj.init(key, params, spec), jax.random.key(0))
    leaves, treedef = jax.tree.flatten(shapes)
    return treedef.unflatten([normal(*leaf.shape, seed=9 + at, size=0.1) for at, leaf in enumerate(leaves)])


def loss_of(apply: Any) -> Any:
    return lambda adapter, params, x: mean_square(lj.lora(apply)(params, adapter, x))


def place_all(shardings: Any, model: str) -> Any:
    return shardings if model == "scanned" else [shardings] * LAYERS


class Run(NamedTuple):
    """A step on a mesh: its results, those of merged kernels on one device, and what the step sends."""

    results: Any
    expected: Any
    sent: list[Any]

    def sent_by(self, kind: str) -> Counter[int]:
        """How often each device receives an array in a kind of collective, by its bytes."""
        found: Counter[int] = Counter()
        for collective in self.sent:
            if collective.kind == kind:
                found[collective.result] += collective.times
        return found


@functools.cache
def run(layout: str, model: str, name: str, gather: bool = True) -> Run:
    """The loss and its gradient."""
    apply, dense, placement = MODELS[model], dense_params(model), LAYOUTS[layout]
    mesh = placement.mesh()
    shardings = placement.shardings(mesh, stacked=model == "scanned")
    shardings = shardings if model == "scanned" else [shardings] * LAYERS
    small = jax.device_put(dense, shardings)
    if name != "dense":
        small = quant.quantize(small, spec_of(FORMATS[name], model))
    adapter, x = random_adapter(small, spec_of(lora_of, model)), normal(32, WIDTH, seed=5)

    def step(adapter: Any, params: Any, x: jax.Array) -> Any:
        if gather and name != "dense" and placement.data > 1:
            params = quant.gather(params, shardings, "data")
        return jax.value_and_grad(loss_of(apply))(adapter, params, x)

    base = quant.dequantize(jax.device_get(small))
    merged = lambda adapter: mean_square(apply(lj.merge(base, adapter), x))  # noqa: E731
    expected = jax.jit(jax.value_and_grad(merged))(adapter)
    everywhere = NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        args = jax.device_put(adapter, everywhere), small, jax.device_put(x, NamedSharding(mesh, P("data")))
        program = jax.jit(step, out_shardings=everywhere).lower(*args).compile()
        return Run(program(*args), expected, testing.collectives(program))


EVERYTHING = [(layout, model, name) for layout in LAYOUTS for model in MODELS for name in FORMATS]


@pytest.mark.parametrize(("layout", "model", "name"), EVERYTHING)
def test_a_step_on_a_mesh_matches_merged_kernels_on_one_device(layout: str, model: str, name: str) -> None:
    found = run(layout, model, name)
    assert_close(found.results, found.expected, GRADIENT)


def packed(layout: str, model: str, name: str) -> Counter[int]:
    """The bytes of each array that a step gathers, by hand, and how often.

    The stored arrays of each kernel of each layer that are sharded along `data`: forward, and again backward for the
    gradient of the activations, which the first kernel does not need.
    """
    placement = LAYOUTS[layout]
    mesh, found = placement.mesh(), Counter[int]()
    for path, shape in SHAPES.items():
        leaf = quant.quantize({"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, {"w": FORMATS[name]("io")})["w"]
        places = quant.shardings({"w": leaf}, {"w": placement.shardings(mesh, stacked=False)[path]})["w"]
        for array, place in zip(jax.tree.leaves(leaf), jax.tree.leaves(places), strict=True):
            if "data" in place.spec:
                times = 2 * LAYERS - (path == "up" and model == "unrolled")
                found[placement.data * math.prod(place.shard_shape(array.shape)) * array.dtype.itemsize] += times
    return found


@pytest.mark.parametrize(("layout", "model", "name"), EVERYTHING)
def test_a_step_sends_packed_bytes_of_the_base(layout: str, model: str, name: str) -> None:
    found, expected, plain = run(layout, model, name), packed(layout, model, name), run(layout, model, "dense")
    of_adapter = 4 * RANK * HIDDEN * (LAYERS if model == "scanned" else 1)  # sharded along `model`, and replicated
    gathered = found.sent_by("all-gather")
    assert bool(expected) == (LAYOUTS[layout].data > 1)
    assert gathered - Counter({of_adapter: gathered[of_adapter]}) == expected
    assert {collective.kind for collective in found.sent} <= {"all-gather", "all-reduce"}
    assert found.sent_by("all-reduce") == plain.sent_by("all-reduce")


def test_without_gather_the_compiler_sends_the_dense_kernel() -> None:
    sizes = run("FSDP along inputs", "scanned", "NF4", gather=False).sent_by("all-gather")
    assert set(sizes) == {4 * WIDTH * HIDDEN}


# Explicit meshes


def explicit_layer(x: jax.Array, kernels: Any) -> jax.Array:
    up, down = jax.reshard(kernels["up"], P(None, "model")), jax.reshard(kernels["down"], P("model", None))
    hidden = jnp.tanh(x @ up)
    return x + jnp.einsum("bh,hd->bd", hidden, down, out_sharding=P("data", None))


def explicit_model(params: Any, tokens: jax.Array) -> jax.Array:
    x = params["table"].at[tokens].get(out_sharding=P("data", None))
    x = lax.scan(jax.checkpoint(lambda x, kernels: (explicit_layer(x, kernels), None)), x, params["layers"])[0]
    return explicit_layer(x, params["last"])


@functools.cache
def explicit_run(name: str) -> Run:
    """The loss and its gradient; expected are those of merged kernels on the same mesh."""
    both = LAYOUTS["both"]
    mesh = both.mesh(AxisType.Explicit)
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
        adapter = random_adapter(small, spec)
        adapter = jax.device_put(adapter, lj.sharding.like_base(adapter, small))
        tokens = jax.device_put(jnp.arange(32) * 7 % 64, NamedSharding(mesh, P("data")))
        step = jax.jit(jax.value_and_grad(loss_of(explicit_model)))
        program = step.lower(adapter, small, tokens).compile()
        got = program(adapter, small, tokens)

        def merged(adapter: Any, base: Any) -> jax.Array:
            return mean_square(explicit_model(lj.merge(base, adapter), tokens))

        expected = jax.jit(jax.value_and_grad(merged))(adapter, quant.dequantize(small))
    return got, expected, Run(got, testing.collectives(program))


@pytest.mark.parametrize("name", FORMATS)
def test_a_step_on_an_explicit_mesh_sends_packed_bytes(name: str) -> None:
    found = explicit_run(name)
    print(name, found.sent_by("all-gather"), found.sent_by("all-reduce"), packed("both", "scanned", name))
    assert_close(found.results, found.expected, GRADIENT)


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
