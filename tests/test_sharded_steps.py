"""Training steps on a mesh: what one device computes, and nothing on the wire that LoRA by hand would not send.

The bytes are read from the compiled program. They are those of the compiler for CPUs, which sums with all-reduces.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import jax_utils
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from law import adapted, assert_close, assert_law, normal

import lora_jax as lj
from benchmarks import models
from lora_jax import testing
from lora_jax._collectives import Collective

SIZE = models.Size(layers=2, width=32, heads=8, hidden=64, vocabulary=48, batch=8, length=8, rank=4)
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
CLOSE = {"float32": 1e-5}


class Layout(NamedTuple):
    """How a decoder lies on eight devices.

    Attributes:
      axes: of the mesh, with their sizes.
      width: along which the axes of the width are cut.
      heads: along which heads and hidden units are.
      layers: along which the stack of layers is.
      batch: along which the examples are.
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
        """Those of the parameters."""
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
        """The loss of a model whose activations are cut along the batch alone, as a model for a mesh says of them.

        Without that the compiler would rather sum activations than gather kernels.
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
    "full": models.whole,
}


@functools.cache
def case(rank: int = SIZE.rank) -> models.Case:
    return models.case(models.Size(**{**vars(SIZE), "rank": rank}), scanned=True)


class Step(NamedTuple):
    """What a step gave, and what its program sends."""

    loss: jax.Array
    trained: Any
    sent: list[Collective]

    def bytes(self, kind: str) -> int:
        return sum(each.times * each.bytes for each in self.sent if each.kind == kind)

    @property
    def wire(self) -> int:
        return sum(each.wire for each in self.sent)

    @property
    def largest_gather(self) -> int:
        return max((each.result for each in self.sent if each.kind == "all-gather"), default=0)


def update(loss: Any) -> Any:
    """One step of an optimiser."""

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
        places = jax.tree.map(
            lambda x: getattr(x.sharding, "spec", None) and x.sharding or everywhere, (trained, state)
        )
        trained, state = jax.device_put((trained, state), places)
        step = jax.jit(update(loss), out_shardings=(*places, everywhere))
    program = step.lower(trained, state, *args).compile()
    trained, _, value = program(trained, state, *args)
    return Step(value, trained, testing.collectives(program))


@functools.cache
def sharded(layout: str, method: str, rank: int = SIZE.rank) -> Step:
    its, one = LAYOUTS[layout], case(rank)
    shardings = its.shardings(one.params)
    on_mesh = one._replace(
        params=jax.device_put(one.params, shardings),
        adapter=jax.device_put(one.adapter, lj.sharding.of(one.adapter, shardings)),
        tokens=jax.device_put(one.tokens, NamedSharding(its.mesh, P(its.batch))),
    )
    loss, trained, frozen = METHODS[method](on_mesh)
    return run(its.constrained(loss), trained, frozen, on_mesh.tokens, mesh=its.mesh)


@functools.cache
def on_one_device() -> Step:
    loss, trained, frozen = METHODS["lora()"](case())
    return run(loss, trained, frozen, case().tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_on_a_mesh_is_that_on_one_device(layout: str) -> None:
    step, expected = sharded(layout, "lora()"), on_one_device()
    assert_close((step.loss, step.trained), (expected.loss, expected.trained), CLOSE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_sends_and_gathers_no_more_than_by_hand(layout: str) -> None:
    step, by_hand = sharded(layout, "lora()"), sharded(layout, "by hand")
    assert 0 < step.wire <= by_hand.wire
    assert step.largest_gather <= by_hand.largest_gather


def bytes_of(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("layout", ["data parallel", "FSDP"])
def test_gradients_are_summed_over_the_devices_for_the_adapter_alone(layout: str) -> None:
    """Twice the rank, twice the bytes; what is left is the loss and, of shards, their norm."""
    few, many = ({rank: sharded(layout, "lora()", rank).bytes("all-reduce") for rank in (4, 8)}).values()
    adapter = bytes_of(case(4).adapter)
    assert many - few == adapter
    assert adapter < few <= adapter + 64
    assert sharded(layout, "full").bytes("all-reduce") >= bytes_of(case().params) > 5 * few


def test_an_fsdp_step_gathers_one_kernel_of_one_layer_at_a_time() -> None:
    step = sharded("FSDP", "lora()")
    assert step.largest_gather == 4 * SIZE.width * SIZE.hidden
