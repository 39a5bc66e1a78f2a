"""Symbolic sizes of `jax.export`: the exported function matches the merged model at any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import GRADIENT, sweep_except
from jax import lax
from law import adapted, assert_close, normal

import lora_jax as lj


class Net(NamedTuple):
    """A model, and the arrays that it is exported for.

    Attributes:
      apply: the model.
      shapes: the shapes of the parameters by path.
      axes: the axes of adapted parameters.
      args: the symbolic shape of each argument; an `i` in front means integers.
    """

    apply: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    axes: dict[str, str]
    args: tuple[str, ...]

    @property
    def params(self) -> dict[str, jax.Array]:
        return {path: normal(*shape, seed=number) for number, (path, shape) in enumerate(self.shapes.items())}

    @property
    def adapter(self) -> Any:
        return adapted(self.params, self.axes)


def attention(p: Any, x: jax.Array) -> jax.Array:
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in ("q", "k", "v"))
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
    return jnp.einsum("bhts,bshk,hkd->btd", weights, v, p["o"])


def fused(p: Any, x: jax.Array) -> jax.Array:
    return x @ jnp.concatenate([p["v"], p["w"]], axis=1)


def convolution(p: Any, x: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, p["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def tied(p: Any, ids: jax.Array) -> jax.Array:
    return jnp.tanh(p["w"][ids]) @ p["w"].T


@jax.jit
def block(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w)


def layers(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda x, w: (jax.checkpoint(block)(w, x), None), x, p["w"])[0]


def step(carry: Any, x: jax.Array) -> tuple[Any, None]:
    v, w, h = carry
    return (v, w, block(v, h) + block(w, x)), None


def recurrent(p: Any, x: jax.Array) -> jax.Array:
    """A loop over tokens in which only the length is symbolic, so that JAX caches the jaxpr for all exports."""
    return lax.scan(step, (p["v"], p["w"], jnp.zeros((2, 8))), x)[0][-1]


def generated(p: Any, x: jax.Array) -> jax.Array:
    """A loop with a symbolic number of iterations."""
    return lax.fori_loop(0, x.shape[1], lambda _, x: jnp.tanh(x @ p["w"]), x)


def branches(p: Any, x: jax.Array) -> jax.Array:
    return lax.cond(x.sum() > 0, lambda x: jnp.tanh(x @ p["w"]), lambda x: x @ p["w"] @ p["v"], x)


def experts(p: Any, x: jax.Array) -> jax.Array:
    return lax.ragged_dot(x, p["w"], jnp.full(3, x.shape[0] // 3, jnp.int32))


def per_example(p: Any, x: jax.Array) -> jax.Array:
    """A kernel that is repeated for each example, with the axes merged."""
    b, t, _ = x.shape
    w = jnp.broadcast_to(p["w"][:, None], (8, b * t, 8)).reshape(8, b, t, 8)
    return jnp.einsum("btd,dbte->bte", x, w)


def scaled(p: Any, x: jax.Array) -> jax.Array:
    return x @ (p["w"] * x.mean((0, 1))[:, None])


SQUARE = {"w": (8, 8), "v": (8, 8)}
IO = {"w": "io", "v": "io"}
NETS = {
    "dense": Net(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], SQUARE, IO, ("b, t, 8",)),
    "dense, no batch": Net(lambda p, x: x @ p["w"], {"w": (8, 8)}, {"w": "io"}, ("t, 8",)),
    "a wide rank": Net(lambda p, x: x @ p["w"] @ p["v"], {"w": (8, 2), "v": (2, 2)}, IO, ("b, t, 8",)),
    "attention": Net(
        attention,
        {"q": (8, 2, 4), "k": (8, 2, 4), "v": (8, 2, 4), "o": (2, 4, 8)},
        {"q": "ioo", "k": "ioo", "v": "ioo", "o": "iio"},
        ("b, t, 8",),
    ),
    "concatenated": Net(fused, SQUARE, IO, ("b, t, 8",)),
    "a pair": Net(lambda p, x: x @ (p["w"] @ p["v"]), SQUARE, IO, ("b, t, 8",)),
    "convolution": Net(convolution, {"w": (3, 3, 4, 6)}, {"w": "iiio"}, ("b, h, w, 4",)),
    "lookup": Net(lambda p, ids: p["w"][ids] @ p["v"], {"w": (12, 8), "v": (8, 8)}, IO, ("ib, t",)),
    "tied": Net(tied, {"w": (12, 8)}, {"w": "io"}, ("ib, t",)),
    "layers": Net(layers, {"w": (3, 8, 8)}, {"w": "bio"}, ("b, t, 8",)),
    "recurrent": Net(recurrent, SQUARE, IO, ("t, 2, 8",)),
    "generated": Net(generated, {"w": (8, 8)}, {"w": "io"}, ("b, t, 8",)),
    "branches": Net(branches, SQUARE, IO, ("b, t, 8",)),
    "experts": Net(experts, {"w": (3, 8, 8)}, {"w": "bio"}, ("3*b, 8",)),
    "experts per token": Net(
        lambda p, x, ids: jnp.einsum("btd,btdf->btf", x, p["w"][ids]),
        {"w": (3, 8, 6)},
        {"w": "bio"},
        ("b, t, 8", "ib, t"),
    ),
    "per example": Net(per_example, {"w": (8, 8)}, {"w": "io"}, ("b, t, 8",)),
    "scaled": Net(scaled, {"w": (8, 8)}, {"w": "io"}, ("b, t, 8",)),
}
SIZES = [{"b": 2, "t": 3, "h": 5, "w": 6}, {"b": 1, "t": 4, "h": 8, "w": 4}]


def symbolic_args(net: Net) -> list[jax.ShapeDtypeStruct]:
    """The arguments in a new symbolic scope, as in each export."""
    scope = jax.export.SymbolicScope()
    return [
        jax.ShapeDtypeStruct(
            jax.export.symbolic_shape(arg.removeprefix("i"), scope=scope),
            jnp.int32 if arg.startswith("i") else jnp.float32,
        )
        for arg in net.args
    ]


def concrete_args(net: Net, sizes: dict[str, int]) -> list[jax.Array]:
    arrays = []
    for number, arg in enumerate(net.args):
        shape = eval(f"({arg.removeprefix('i')},)", {}, sizes)
        ids = jnp.asarray(np.arange(np.prod(shape)).reshape(shape) % 3)
        arrays.append(ids if arg.startswith("i") else normal(*shape, seed=number + 9))
    return arrays


@pytest.mark.parametrize("name", sweep_except([*NETS][::4], NETS))
def test_an_exported_function_matches_the_merged_model(name: str) -> None:
    net = NETS[name]
    params, adapter, merged = net.params, net.adapter, lj.merge(net.params, net.adapter)
    export = jax.export.export(jax.jit(lj.lora(net.apply)))
    _, exported, plain = (export(params, ad, *symbolic_args(net)) for ad in (adapter, adapter, {}))
    for sizes in SIZES:
        args = concrete_args(net, sizes)
        assert_close(exported.call(params, adapter, *args), net.apply(merged, *args))
    assert_close(plain.call(params, {}, *args), net.apply(params, *args))


def test_an_exported_gradient_matches_the_merged_model() -> None:
    net = NETS["tied"]
    params, adapter = net.params, net.adapter

    def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(lambda adapter, params, *args: jnp.sum(jnp.sin(function(params, adapter, *args))))

    exported = jax.export.export(jax.jit(gradient(lj.lora(net.apply))))(adapter, params, *symbolic_args(net))
    for sizes in SIZES:
        args = concrete_args(net, sizes)
        expected = gradient(lambda params, adapter, *args: net.apply(lj.merge(params, adapter), *args))
        assert_close(exported.call(adapter, params, *args), expected(adapter, params, *args), GRADIENT)


@pytest.mark.parametrize("name", NETS)
def test_kernels_and_explain_match_concrete_sizes(name: str) -> None:
    net = NETS[name]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), net.params)
    sizes = {"b": 3, "t": 2, "h": 8, "w": 6}
    args = concrete_args(net, sizes)
    found, expected = (lj.kernels(net.apply, shapes, *given) for given in (symbolic_args(net), args))
    assert {path: kernel.axes for path, kernel in found.items()} == {
        path: kernel.axes for path, kernel in expected.items()
    }
    rows, numbers = (
        lj.explain(net.apply, shapes, net.adapter, *given, form="factored").rows for given in (symbolic_args(net), args)
    )
    iterations = sizes["t"] if name == "generated" else 1  # a loop of unknown length counts once
    for row, numeric in zip(rows, numbers, strict=True):
        assert (row.path, row.axes, row.parameters) == (numeric.path, numeric.axes, numeric.parameters)
        assert eval(str(row.flops), {"floordiv": int.__floordiv__}, sizes) == numeric.flops / iterations


def test_explain_shows_symbolic_flops_as_polynomials() -> None:
    net = NETS["dense, no batch"]
    text = str(lj.explain(net.apply, net.params, net.adapter, *symbolic_args(net)))
    assert "factored dot_general ×1" in text and "74*t" in text
    assert "forward:   74*t FLOPs added, the base's are 128*t" in text
    assert "74*t" in lj.explain(net.apply, net.params, net.adapter, *symbolic_args(net))._repr_html_()


def test_every_form_can_be_exported() -> None:
    net = NETS["dense"]
    params, adapter, args = net.params, net.adapter, concrete_args(net, SIZES[0])
    for form in ("factored", "hybrid", "merged"):
        exported = jax.export.export(jax.jit(lj.lora(net.apply, form=form)))(params, adapter, *symbolic_args(net))
        assert_close(exported.call(params, adapter, *args), net.apply(lj.merge(params, adapter), *args))


def test_plan_needs_concrete_sizes() -> None:
    net, mesh = NETS["dense"], jax.make_mesh((1,), ("x",))
    with pytest.raises(lj.SpecError) as error:
        lj.plan(net.apply, net.params, {"w": lj.LoRA(rank=2, alpha=4)}, optax.sgd(1.0), mesh, *symbolic_args(net))
    assert str(error.value) == (
        "Expected known sizes, to compile for them; `abstract_args[0]` has the shape (b, t, 8).\n"
        "  Pass the sizes of one batch."
    )
