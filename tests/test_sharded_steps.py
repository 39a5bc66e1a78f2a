"""Training steps on a mesh match one device and send no more bytes than LoRA by hand.

The bytes are read from the program that is compiled for CPUs, which sums with all-reduces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import jax_utils
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import sweep_except
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from law import adapted, assert_close, normal

import lora_jax as lj
from benchmarks import models
from lora_jax import testing
from lora_jax._report.collectives import Collective

SIZE = models.Size(layers=2, width=32, heads=8, hidden=64, vocabulary=48, batch=8, length=8, rank=4)
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
CLOSE = {"float32": 1e-5}


class Layout(NamedTuple):
    """The shardings of a decoder on eight devices.

    Attributes:
      axes: the axes of the mesh and their sizes.
      width: the mesh axes that shard the width.
      heads: the mesh axes that shard heads and hidden units.
      layers: the mesh axes that shard the stack of layers.
      batch: the mesh axes that shard the examples.
    """

    axes: dict[str, int]
    width: str | None = None
    heads: str | None = None
    layers: str | None = None
    batch: str | None = None

    @property
    def mesh(self) -> Mesh:
        return jax.make_mesh(tuple(self.axes.values()), tuple(self.axes), axis_types=(AxisType.Auto,) * len(self.axes))

    def shardings(self, params: Any) -> Any:
        """The shardings of the parameters."""
        into, out = (self.width, self.heads), (self.heads, self.width)
        kernels = dict.fromkeys(("query", "key", "value", "up"), into) | {"out": (self.heads, None, self.width)}
        kernels |= {"down": out, "embedding": out}
        mesh = self.mesh

        def place(path: str) -> NamedSharding:
            *above, layer, name = path.split("/")
            stack = [self.layers] if "blocks" in above else []
            return NamedSharding(mesh, P(*stack, *(kernels.get(layer, ()) if name in ("kernel", "embedding") else ())))

        flat = flatten_dict(params, sep="/")
        return unflatten_dict({path: place(path) for path in flat}, sep="/")

    def constrained(self, loss: Any) -> Any:
        """The loss of a model with activations constrained to be sharded only along the batch.

        Without the constraint, the compiler sums activations instead of gathering kernels.
        """
        if self.batch is None:
            return loss
        mesh = self.mesh

        def constrain(x: jax.Array) -> jax.Array:
            spec = P(self.batch, *(P.UNCONSTRAINED,) * (x.ndim - 1))
            return lax.with_sharding_constraint(x, NamedSharding(mesh, spec)) if x.ndim > 2 else x

        def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            out = call(*args, **kwargs)
            return jax.tree.map(constrain, out) if context.method_name == "__call__" else out

        def run(*args: Any) -> jax.Array:
            with nn.intercept_methods(interceptor):
                return loss(*args)

        return run


LAYOUTS = {
    "data parallel": Layout({"data": 8}, batch="data"),
    "FSDP": Layout({"data": 8}, width="data", batch="data"),
    "tensor parallel": Layout({"model": 8}, heads="model"),
    "FSDP and tensor parallel": Layout({"data": 2, "model": 4}, width="data", heads="model", batch="data"),
    "layers on devices": Layout({"stage": 2, "model": 4}, layers="stage", heads="model"),
}
METHODS: dict[str, Callable[[models.Case], models.Method]] = {
    "lora()": functools.partial(models.through_lora, form="factored"),
    "by hand": models.by_hand,
    "full": models.full_fine_tuning,
}


@functools.cache
def case(rank: int = SIZE.rank) -> models.Case:
    """A decoder with random parameters, made without compilation."""
    model, tokens = models.Decoder(SIZE, scanned=True), (7 * jnp.arange(64) % SIZE.vocabulary).reshape(8, 8)
    params = random_params(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])
    spec = {"**/{query,key,value,out,up,down}/kernel": lj.LoRA(rank=rank, alpha=models.ALPHA)}
    kernels = lj.kernels(models.plain(model), params, tokens)
    adapter = jax.eval_shape(lambda key: lj.init(key, params, spec, kernels=kernels), jax.random.key(0))
    return models.Case(
        model.clone(size=models.Size(**{**vars(SIZE), "rank": rank})), params, random_params(adapter), tokens
    )


def random_params(shapes: Any) -> Any:
    leaves, treedef = jax.tree.flatten(shapes)
    return treedef.unflatten([normal(*leaf.shape, seed=number, size=0.2) for number, leaf in enumerate(leaves)])


class Step(NamedTuple):
    """The results of a step, and the collectives of its program."""

    loss: jax.Array
    trained: Any
    sent: list[Collective]

    def bytes(self, kind: str) -> int:
        return sum(collective.times * collective.bytes for collective in self.sent if collective.kind == kind)

    @property
    def wire(self) -> int:
        return sum(collective.wire for collective in self.sent)

    @property
    def largest_gather(self) -> int:
        return max((collective.result for collective in self.sent if collective.kind == "all-gather"), default=0)


def update(loss: Any) -> Any:
    """One step of an optimizer."""

    def step(trained: Any, state: Any, *args: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(trained, *args)
        updates, state = TX.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value

    return step


def run(loss: Any, trained: Any, *args: Any, mesh: Mesh | None = None) -> Step:
    state = TX.init(trained)
    if mesh is None:
        step = jax.jit(update(loss))
    else:
        everywhere = NamedSharding(mesh, P())
        named = lambda x: x.sharding if isinstance(x.sharding, NamedSharding) else everywhere  # noqa: E731
        places = jax.tree.map(named, (trained, state))
        trained, state = jax.device_put((trained, state), places)
        step = jax.jit(update(loss), out_shardings=(*places, everywhere))
    program = step.lower(trained, state, *args).compile()
    trained, _, value = program(trained, state, *args)
    return Step(value, trained, testing.collectives(program))


@functools.cache
def sharded(layout: str, method: str, rank: int = SIZE.rank) -> Step:
    placement, one = LAYOUTS[layout], case(rank)
    shardings = placement.shardings(one.params)
    on_mesh = one._replace(
        params=jax.device_put(one.params, shardings),
        adapter=jax.device_put(one.adapter, lj.sharding.like_base(one.adapter, shardings)),
        tokens=jax.device_put(one.tokens, NamedSharding(placement.mesh, P(placement.batch))),
    )
    loss, trained, frozen = METHODS[method](on_mesh)
    return run(placement.constrained(loss), trained, frozen, on_mesh.tokens, mesh=placement.mesh)


@functools.cache
def on_one_device() -> Step:
    loss, trained, frozen = METHODS["lora()"](case())
    return run(loss, trained, frozen, case().tokens)


@pytest.mark.parametrize("layout", sweep_except(["FSDP and tensor parallel"], LAYOUTS))
def test_a_step_on_a_mesh_matches_one_device(layout: str) -> None:
    step, expected = sharded(layout, "lora()"), on_one_device()
    assert_close((step.loss, step.trained), (expected.loss, expected.trained), CLOSE)


@pytest.mark.parametrize("layout", sweep_except(["FSDP and tensor parallel"], LAYOUTS))
def test_a_step_sends_and_gathers_no_more_than_by_hand(layout: str) -> None:
    step, by_hand = sharded(layout, "lora()"), sharded(layout, "by hand")
    assert 0 < step.wire <= by_hand.wire
    assert step.largest_gather <= by_hand.largest_gather


def bytes_of(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.sweep
def test_only_gradients_of_the_adapter_are_summed_over_devices() -> None:
    """Bytes are proportional to the rank, plus those of the loss."""
    loss = 4
    few, many, full = (
        sharded("data parallel", method, rank).bytes("all-reduce")
        for method, rank in (("lora()", 4), ("lora()", 8), ("full", 4))
    )
    assert few == bytes_of(case().adapter) + loss
    assert many == 2 * bytes_of(case().adapter) + loss
    assert full >= bytes_of(case().params) + loss > 5 * few


def test_an_fsdp_step_gathers_one_kernel_of_one_layer_at_a_time() -> None:
    step = sharded("FSDP", "lora()")
    assert step.largest_gather == 4 * SIZE.width * SIZE.hidden
    # The gradient of the adapter and the norm of its shards are summed.
    assert step.bytes("all-reduce") <= sharded("data parallel", "lora()").bytes("all-reduce") + 64


# Data parallel by hand: `pmap`, and `shard_map` around the step


def perceptron(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]) @ params["down"]


PARAMS = {"up": normal(8, 24, size=0.5), "down": normal(24, 8, seed=1, size=0.5)}
X = normal(16, 8, seed=2)


def mean_loss(adapter: Any, params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sin(lj.lora(perceptron, form="factored")(params, adapter, x)))


def averaged(trained: Any, state: Any, params: Any, x: jax.Array) -> Any:
    """A step in which each device has its examples, and gradients are averaged."""
    value, gradient = jax.value_and_grad(mean_loss)(trained, params, x)
    value, gradient = lax.pmean((value, gradient), "data")
    updates, state = TX.update(gradient, state, trained)
    return optax.apply_updates(trained, updates), state, value


def joint(trained: Any, state: Any, params: Any, x: jax.Array) -> Any:
    """A step with the loss of all examples, whose gradient JAX sums."""
    return update(lambda *args: lax.pmean(mean_loss(*args), "data"))(trained, state, params, x)


def test_a_pmapped_step_matches_one_device() -> None:
    adapter = adapted(PARAMS, {"up": "io", "down": "io"})
    everywhere = jax_utils.replicate((adapter, TX.init(adapter), PARAMS))
    step = jax.pmap(averaged, axis_name="data")
    program = step.lower(*everywhere, X.reshape(8, 2, 8)).compile()
    trained, _, value = program(*everywhere, X.reshape(8, 2, 8))
    expected = run(mean_loss, adapter, PARAMS, X)
    assert_close(jax_utils.unreplicate((value, trained)), (expected.loss, expected.trained), CLOSE)
    (sent,) = {collective.kind for collective in testing.collectives(program)}
    assert sent == "all-reduce"
    assert sum(collective.bytes for collective in testing.collectives(program)) == bytes_of(adapter) + value[0].nbytes


@pytest.mark.parametrize(("step", "checked"), [(averaged, False), (joint, True)])
def test_a_step_in_a_shard_map_matches_one_device(step: Any, checked: bool) -> None:
    adapter = adapted(PARAMS, {"up": "io", "down": "io"})
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P(), P(), P("data")), out_specs=(P(), P(), P()), check_vma=checked
    )
    program = jax.jit(mapped).lower(adapter, TX.init(adapter), PARAMS, X).compile()
    trained, _, value = program(adapter, TX.init(adapter), PARAMS, X)
    expected = run(mean_loss, adapter, PARAMS, X)
    assert_close((value, trained), (expected.loss, expected.trained), CLOSE)
    assert {collective.kind for collective in testing.collectives(program)} == {"all-reduce"}
    assert sum(collective.bytes for collective in testing.collectives(program)) == bytes_of(adapter) + value.nbytes


# A pipeline: each stage has a layer and sends its output to the next stage

STAGES = 8


def pipeline(params: Any, x: jax.Array) -> jax.Array:
    """Micro-batches, (count, examples, width), pass through the stages; each stage processes one per iteration."""
    mesh = jax.make_mesh((STAGES,), ("stage",), axis_types=(AxisType.Auto,))
    onwards = [(stage, stage + 1) for stage in range(STAGES - 1)]

    def stages(w: jax.Array, x: jax.Array) -> jax.Array:
        def tick(held: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
            first = x[jnp.minimum(number, len(x) - 1)]
            y = jnp.tanh(jnp.where(lax.axis_index("stage") == 0, first, held) @ w[0])
            return lax.ppermute(y, "stage", onwards), y

        start = lax.pcast(jnp.zeros_like(x[0]), "stage", to="varying")
        return lax.scan(tick, start, jnp.arange(len(x) + STAGES - 1))[1][None]

    outputs = jax.shard_map(stages, mesh=mesh, in_specs=(P("stage"), P()), out_specs=P("stage"))(params["layers"], x)
    return outputs[-1, STAGES - 1 :]


def in_order(params: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]


def test_a_pipelined_step_matches_sequential_layers_and_sends_only_activations() -> None:
    params, x = {"layers": normal(STAGES, 8, 8, size=0.5)}, normal(3, 4, 8, seed=1)
    adapter = adapted(params, {"layers": "bio"})

    at = NamedSharding(jax.make_mesh((STAGES,), ("stage",), axis_types=(AxisType.Auto,)), P("stage"))

    def loss(apply: Any, adapter: Any, params: Any) -> jax.Array:
        return jnp.sum(jnp.sin(lj.lora(apply, form="factored")(params, adapter, x)))

    def dense(params: Any) -> jax.Array:
        return jnp.sum(jnp.sin(pipeline(params, x)))

    expected = jax.jit(jax.value_and_grad(functools.partial(loss, in_order)))(adapter, params)
    params, adapter = jax.device_put((params, adapter), (at, lj.sharding.like_base(adapter, at)))
    step = jax.jit(jax.value_and_grad(functools.partial(loss, pipeline)))
    assert_close(step(adapter, params), expected, CLOSE)
    assert testing.wire_bytes(step, adapter, params) == testing.wire_bytes(jax.jit(jax.value_and_grad(dense)), params)
    repeated = [collective for collective in testing.collectives(step, adapter, params) if collective.times > 1]
    assert {(collective.kind, collective.bytes, collective.times) for collective in repeated} == {
        ("collective-permute", x[0].nbytes, 10)
    }


# Explicit meshes


def decoder(params: Any, tokens: jax.Array) -> jax.Array:
    """A decoder with explicit shardings of gathered kernels and of sums."""

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        into = {name: jax.reshard(layer[name], P(None, "model", *more)) for name, more in INTO.items()}
        out = {name: jax.reshard(layer[name], P("model", *more, None)) for name, more in OUT.items()}
        query, key, value = (jnp.einsum("btd,dhk->bthk", x, into[name]) for name in ("query", "key", "value"))
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", query, key))
        heads = jnp.einsum("bhts,bshk->bthk", weights, value)
        x = x + jnp.einsum("bthk,hkd->btd", heads, out["out"], out_sharding=P("data"))
        hidden = jnp.tanh(jnp.einsum("btd,df->btf", x, into["up"]))
        return x + jnp.einsum("btf,fd->btd", hidden, out["down"], out_sharding=P("data")), None

    layers = {name: params[name] for name in (*INTO, *OUT)}
    x = params["embedding"].at[tokens].get(out_sharding=P("data"))
    x, _ = lax.scan(jax.checkpoint(block), x, layers)
    return jnp.einsum("btd,vd->btv", x, jax.reshard(params["embedding"], P("model", None)))


INTO: dict[str, tuple[None, ...]] = {"query": (None,), "key": (None,), "value": (None,), "up": ()}
OUT: dict[str, tuple[None, ...]] = {"out": (None,), "down": ()}
SHAPES = {"query": (8, 4, 2), "key": (8, 4, 2), "value": (8, 4, 2), "up": (8, 16), "out": (4, 2, 8), "down": (16, 8)}
ROLES = dict.fromkeys(("query", "key", "value"), "bioo") | {"up": "bio", "out": "biio", "down": "bio"}


def explicit_step(*devices: int) -> Step:
    mesh = jax.make_mesh(devices, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    at = {name: P(None, "data", "model") for name in INTO} | {"out": P(None, "model", None, "data")}
    at |= {"down": P(None, "model", "data"), "embedding": P("model", "data")}
    params = {name: normal(2, *shape, seed=n, size=0.3) for n, (name, shape) in enumerate(SHAPES.items())}
    params["embedding"] = normal(12, 8, seed=9)
    with jax.set_mesh(mesh):
        params = {name: jax.device_put(w, NamedSharding(mesh, at[name])) for name, w in params.items()}
        adapter = adapted(params, ROLES | {"embedding": "io"})
        adapter = jax.device_put(adapter, lj.sharding.like_base(adapter, params))
        tokens = jax.device_put(jnp.arange(24).reshape(4, 6) % 12, NamedSharding(mesh, P("data")))

        def loss(adapter: Any, params: Any, tokens: jax.Array) -> jax.Array:
            logits = lj.lora(decoder)(params, adapter, tokens)
            return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(tokens, 12), -1))

        return run(loss, adapter, params, tokens)


def test_a_step_on_an_explicit_mesh_matches_one_device() -> None:
    step, expected = explicit_step(2, 4), explicit_step(1, 1)
    assert step.sent and not expected.sent
    assert_close((step.loss, step.trained), (expected.loss, expected.trained), CLOSE)
