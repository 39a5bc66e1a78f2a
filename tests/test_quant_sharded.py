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
import optax
import orbax.checkpoint as ocp
import pytest
from evaluate import without_compiling
from helpers import FORWARD, GRADIENT, assert_close, bits, sweep_except
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from law import normal, total
from test_shard_map import SHARD_MAPS

import lora_jax as lj
from lora_jax import quant, testing

LAYERS, WIDTH, HIDDEN, RANK = 2, 256, 512, 3  # bytes of the adapter are multiples of 3, those of kernels are not
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


def mean_square(y: jax.Array) -> jax.Array:
    return jnp.mean((y - 1) ** 2)


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
def run(layout: str, model: str, name: str, gather: bool = True, on_host: bool = False) -> Run:
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
    small = lj.sharding.to_host(small) if on_host else small
    with jax.set_mesh(mesh):
        args = jax.device_put(adapter, everywhere), small, jax.device_put(x, NamedSharding(mesh, P("data")))
        program = jax.jit(step, out_shardings=everywhere).lower(*args).compile()
        return Run(program(*args), expected, testing.collectives(program))


EVERYTHING = [
    pytest.param(layout, model, name, marks=() if (layout, name) == ("both", "NF4") else pytest.mark.sweep)
    for layout in LAYOUTS
    for model in MODELS
    for name in ("NF4", "int8")
]


@pytest.mark.parametrize(("layout", "model", "name"), EVERYTHING)
def test_a_step_on_a_mesh_matches_merged_kernels_on_one_device(layout: str, model: str, name: str) -> None:
    found = run(layout, model, name)
    assert_close(found.results, found.expected, GRADIENT)


def packed(layout: str, name: str, times: dict[str, int]) -> Counter[int]:
    """The bytes of the stored arrays of a layer's kernels that are sharded along `data`, gathered some times each."""
    placement = LAYOUTS[layout]
    mesh, found = placement.mesh(), Counter[int]()
    for path, shape in SHAPES.items():
        leaf = quant.quantize({"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, {"w": FORMATS[name]("io")})["w"]
        places = quant.shardings({"w": leaf}, {"w": placement.shardings(mesh, stacked=False)[path]})["w"]
        for array, place in zip(jax.tree.leaves(leaf), jax.tree.leaves(places), strict=True):
            if "data" in place.spec:
                bytes_on_device = math.prod(place.shard_shape(array.shape)) * array.dtype.itemsize
                found[placement.data * bytes_on_device] += times[path]
    return found


@pytest.mark.parametrize(("layout", "model", "name"), EVERYTHING)
def test_a_step_sends_packed_bytes_of_the_base(layout: str, model: str, name: str) -> None:
    # Forward, and again backward for the gradient of the activations, which the first kernel does not need.
    times = {"up": 2 * LAYERS - (model == "unrolled"), "down": 2 * LAYERS}
    found, expected, dense = run(layout, model, name), packed(layout, name, times), run(layout, model, "dense")
    assert bool(expected) == (LAYOUTS[layout].data > 1)
    assert of_base(found.sent_by("all-gather")) == expected
    assert {collective.kind for collective in found.sent} <= {"all-gather", "all-reduce"}
    assert found.sent_by("all-reduce") == dense.sent_by("all-reduce")


def of_base(gathered: Counter[int]) -> Counter[int]:
    return Counter({size: times for size, times in gathered.items() if size % RANK})


@pytest.mark.parametrize("name", sweep_except([*FORMATS][:1], FORMATS))
def test_a_base_in_host_memory_sends_packed_bytes(name: str) -> None:
    found, on_device = run("both", "scanned", name, on_host=True), run("both", "scanned", name)
    assert_close(found.results, found.expected, GRADIENT)
    assert found.sent_by("all-gather") == on_device.sent_by("all-gather")


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
        "table": NamedSharding(mesh, P("model", None)),
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
    return Run(got, expected, testing.collectives(program))


@pytest.mark.parametrize("name", sweep_except([*FORMATS][:1], FORMATS))
def test_a_step_on_an_explicit_mesh_sends_packed_bytes(name: str) -> None:
    found = explicit_run(name)
    # Forward, backward, and in the scan again to recompute the input of `down`.
    times = {"up": 3 * LAYERS + 2, "down": 2 * LAYERS + 2}
    assert of_base(found.sent_by("all-gather")) == packed("both", name, times)
    assert_close(found.results, found.expected, GRADIENT)


# Models with `shard_map`

BY_DEVICE = {"int8": lambda axes: quant.Int8(axes=axes), "NF4": lambda axes: quant.NF4(block=2, axes=axes)}


@pytest.mark.parametrize("name", sweep_except([*BY_DEVICE][:1], BY_DEVICE))
@pytest.mark.parametrize("case_name", sweep_except([*SHARD_MAPS][::6], SHARD_MAPS))
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


def test_a_gather_in_a_shard_map_sends_packed_bytes() -> None:
    """The scales are sent in float32, because those of double quantization depend on their position in the kernel."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P(None, "data"))
    params = jax.device_put({"w": normal(LAYERS, WIDTH, WIDTH, size=0.1)}, {"w": sharding})
    small = quant.quantize(params, {"w": quant.NF4(block=16, axes="bio")})
    adapter = random_adapter(small, {"w": lora_of("bio")})

    def local(w: jax.Array, x: jax.Array) -> jax.Array:
        def step(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ lax.all_gather(w, "data", tiled=True)), None

        return lax.scan(jax.checkpoint(step), x, w)[0]

    def apply(params: Any, x: jax.Array) -> jax.Array:
        mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(None, "data"), P("data")), out_specs=P("data"))
        return mapped(params["w"], x)

    x = jax.device_put(normal(32, WIDTH, seed=5), NamedSharding(mesh, P("data")))
    step = jax.jit(jax.value_and_grad(loss_of(apply))).lower(adapter, small, x).compile()
    base = quant.dequantize(small)
    expected = jax.jit(jax.value_and_grad(lambda adapter: mean_square(apply(lj.merge(base, adapter), x))))(adapter)
    assert_close(step(adapter, small, x), expected, GRADIENT)
    sent = Run(None, None, testing.collectives(step)).sent_by("all-gather")
    codes, scales = WIDTH * WIDTH // 2, 4 * WIDTH * WIDTH // 16
    # Forward, backward, and again for the recomputation, unless the compiler merges these two.
    assert of_base(sent) in [dict.fromkeys((codes, scales), times * LAYERS) for times in (2, 3)]


# Other uses


def mesh_of_eight(kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


@pytest.mark.parametrize("name", sweep_except([*FORMATS][:1], FORMATS))
@pytest.mark.parametrize("stacked", [False, True])
def test_a_constraint_in_the_model_gathers_packed_bytes(stacked: bool, name: str) -> None:
    mesh = mesh_of_eight()
    shape, axes = ((LAYERS, WIDTH, WIDTH), "bio") if stacked else ((WIDTH, WIDTH), "io")
    spec = P(*[None] * stacked, "data")
    params = jax.device_put({"w": normal(*shape, size=0.1)}, {"w": NamedSharding(mesh, spec)})
    small = quant.quantize(params, {"w": FORMATS[name](axes)})
    adapter = random_adapter(small, {"w": lora_of(axes)})

    def apply(params: Any, x: jax.Array) -> jax.Array:
        w = lax.with_sharding_constraint(params["w"].astype(jnp.bfloat16), NamedSharding(mesh, P()))
        return lax.scan(lambda x, w: (x @ w, None), x, w)[0] if stacked else x @ w

    x = jax.device_put(normal(32, WIDTH, seed=5, dtype=jnp.bfloat16), NamedSharding(mesh, P("data")))
    step = jax.jit(lj.lora(apply)).lower(small, adapter, x).compile()
    sent = Run(None, None, testing.collectives(step)).sent_by("all-gather")
    arrays = [array for array in jax.tree.leaves(small) if "data" in array.sharding.spec]
    assert of_base(sent) == Counter(array.nbytes for array in arrays)
    expected = jax.jit(apply)(lj.merge(quant.dequantize(small), adapter), x)
    assert_close(step(small, adapter, x), expected, FORWARD)


@pytest.mark.parametrize("spec", [P("data", None), P(None, "data")])
@pytest.mark.parametrize("name", sweep_except([*FORMATS][:1], FORMATS))
def test_a_lookup_in_a_sharded_table_sends_rows(name: str, spec: P) -> None:
    mesh = mesh_of_eight()
    sharding = {"table": NamedSharding(mesh, spec)}
    small = quant.quantize(jax.device_put({"table": normal(512, 256)}, sharding), {"table": FORMATS[name]("oi")})
    adapter = random_adapter(small, {"table": lora_of("io")})
    tokens = jax.device_put(jnp.arange(16) * 37 % 512, NamedSharding(mesh, P("data")))
    apply = lambda params, tokens: params["table"][tokens]  # noqa: E731
    step = jax.jit(lambda params, *args: lj.lora(apply)(quant.gather(params, sharding, "data"), *args))
    found = testing.collectives(step, small, adapter, tokens)
    assert max(collective.result for collective in found) <= 16 * 256 * 4
    expected = apply(lj.merge(quant.dequantize(small), adapter), tokens)
    assert_close(step(small, adapter, tokens), expected, FORWARD)


def test_gather_checks_its_axes() -> None:
    params = {"w": normal(WIDTH, WIDTH)}
    for kind, axis, message in (
        (AxisType.Auto, "model", r"sharded along 'model'; none of 1 is"),
        (AxisType.Explicit, "data", r"'data' is explicit.\n  Call `jax.reshard` on the kernel"),
    ):
        sharding = {"w": NamedSharding(mesh_of_eight(kind), P("data"))}
        small = quant.quantize(jax.device_put(params, sharding), {"w": quant.NF4()})
        with pytest.raises(lj.SpecError, match=message):
            quant.gather(small, sharding, axis)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", sweep_except([*FORMATS][:1], FORMATS))
def test_quantized_leaves_keep_their_shardings(kind: AxisType, name: str, tmp_path: Any) -> None:
    """Those of shapes are those of arrays; `quantize` under `jit` and Orbax keep them."""
    sharding = {"w": NamedSharding(mesh_of_eight(kind), P("data")), "bias": NamedSharding(mesh_of_eight(kind), P())}
    params = jax.device_put({"w": normal(WIDTH, WIDTH), "bias": normal(WIDTH)}, sharding)
    make = functools.partial(quant.quantize, spec={"w": FORMATS[name]("io")})
    small = make(params)
    shapes = make(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params))
    assert "data" in small["w"].codes.sharding.spec
    assert jax.tree.structure(shapes) == jax.tree.structure(small)
    assert places(small) == places(shapes) == places(quant.shardings(small, sharding))
    moved = jax.device_put(jax.device_get(small), quant.shardings(small, sharding))
    assert (bits(moved), places(moved)) == (bits(small), places(small))
    if kind is AxisType.Explicit:
        assert bits(jax.jit(make)(params)) == bits(small)
        assert places(jax.jit(make)(params)) == places(small)
    assert quant.dequantize(small)["w"].sharding.spec == P("data", None)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "base", small)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "base", shapes)
    assert bits(restored) == bits(small)
    assert places(restored) == places(small)


def places(tree: Any) -> list[Any]:
    shardings = [getattr(leaf, "sharding", leaf) for leaf in jax.tree.leaves(tree)]
    return [(place.mesh.shape_tuple, place.spec.index("data") if "data" in place.spec else None) for place in shardings]


def test_quantize_holds_one_leaf_in_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `donate`, the memory of the device never exceeds the tree and one quantized leaf."""
    params = {str(number): normal(WIDTH, WIDTH, seed=number) for number in range(6)}
    before, held = live_bytes(), []
    # Called for each leaf before it is deleted.
    monkeypatch.setattr(jax, "block_until_ready", lambda stored: held.append(live_bytes() - before))
    small = quant.quantize(params, {"*": quant.NF4()}, donate=True)
    one, dense = small["0"].nbytes, 4 * WIDTH * WIDTH
    assert held == [(number + 1) * one - number * dense for number in range(6)]


def live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def test_a_plan_of_a_quantized_base() -> None:
    mesh = mesh_of_eight()
    sharding = NamedSharding(mesh, P(None, "data"))
    params = {"w": jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.bfloat16, sharding=sharding)}

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (constrained(x @ w, P("data", None)), None), x, params["w"])[0]

    x = jax.ShapeDtypeStruct((64, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))

    def planned(params: Any, **options: Any) -> Any:
        return lj.plan(apply, params, {"w": lora_of("bio")}, optax.adam(1e-3), mesh, x, **options)

    small = quant.quantize(params, {"w": quant.NF4(axes="bio", block=16)})
    dense, found = planned(params), planned(small)
    shards = [math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(small)]
    assert found.lora.parameters == sum(shards) < dense.lora.parameters / 3
    assert found.full.parameters == dense.full.parameters
    assert (found.full.peak, found.full.flops) == (dense.full.peak, dense.full.flops)
    gathered = planned(quant.gather(small, {"w": sharding}, "data"), full=False)
    assert gathered.lora.parameters == found.lora.parameters
    # A CPU sends float32.
    sizes, of_gathered = ({one.result for one in step.lora.collectives} for step in (found, gathered))
    assert (4 * WIDTH * WIDTH in sizes, 4 * WIDTH * WIDTH in of_gathered) == (True, False)
    assert gathered.lora.largest_gather == WIDTH * WIDTH // 2


def test_a_leaf_without_a_sharding_is_an_error() -> None:
    small = quant.quantize({"w": jnp.ones((64, 4)), "v": jnp.ones(4)}, {"w": quant.NF4()})
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(lj.SpecError, match=r"Expected a sharding for each leaf; there is none for 1 of 2.\n  'v'"):
        quant.shardings(small, {"w": place})
    with pytest.raises(lj.SpecError, match=r"Expected a sharding for each leaf; there is none for 1 of 1.\n  'w'"):
        quant.gather(small, {"v": place}, "fsdp")
