"""Control flow inside the model, transforms around it, and values that must pass through unchanged."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import GRADIENT, dense, sweep
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from law import Case, adapted, assert_case, assert_close, assert_law, normal, total

import lora_jax as lj

X = (3, 4)


def layer(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w)


def scan_layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
    """The body of a scan over layers."""
    return layer(x, w), None


def scan_layers(x: jax.Array, w: jax.Array, **options: Any) -> jax.Array:
    """A scanned stack of layers."""
    return lax.scan(scan_layer, x, w, **options)[0]


# Calls

NAMES = jax.checkpoint_policies.save_only_these_names("activation")
JITTED = jax.jit(lambda w, x: layer(x, w))
CALLS = {
    "jit": Case(lambda w, x: jax.jit(layer)(x, w), (4, 4), [X], "io"),
    "jit of a function used twice": Case(lambda w, x: JITTED(w, JITTED(w, x)), (4, 4), [X], "io"),
    "jit in jit": Case(lambda w, x: jax.jit(lambda w, x: jax.jit(layer)(x, w))(w, x), (4, 4), [X], "io"),
    "jit that closes over the kernel": Case(lambda w, x: jax.jit(lambda x: layer(x, w))(x), (4, 4), [X], "io"),
    "jit with a static argument": Case(
        lambda w, x: jax.jit(lambda w, x, times: layer(x, w) * times, static_argnums=2)(w, x, 3), (4, 4), [X], "io"
    ),
    "jit that returns kernels": Case(lambda w, x: x @ jax.jit(lambda w: (w.T, w))(w)[0], (4, 4), [X], "oi"),
    "jit, inlined": Case(lambda w, x: jax.jit(layer, inline=True)(x, w), (4, 4), [X], "io"),
    "jit that donates an activation": Case(lambda w, x: jax.jit(layer, donate_argnums=0)(x + 1, w), (4, 4), [X], "io"),
    "jit of one kernel passed twice": Case(
        lambda w, x: jax.jit(lambda a, b, x: layer(layer(x, a), b.T))(w, w, x), (4, 4), [X], "io"
    ),
    "remat": Case(lambda w, x: jax.checkpoint(layer)(x, w), (4, 4), [X], "io"),
    "remat with a policy": Case(
        lambda w, x: jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable)(x, w), (4, 4), [X], "io"
    ),
    "remat in jit in remat": Case(
        lambda w, x: jax.checkpoint(jax.jit(jax.checkpoint(layer, prevent_cse=False)))(x, w), (4, 4), [X], "io"
    ),
    "custom derivative elsewhere": Case(lambda w, x: jax.nn.relu(x @ w) @ w, (4, 4), [X], "io"),
}

# Loops and branches

LOOPS = {
    "scan, kernel as constant": Case(
        lambda w, x: lax.scan(lambda x, _: scan_layer(x, w), x, length=3)[0], (4, 4), [X], "io"
    ),
    "scan, kernel stacked": Case(lambda w, x: scan_layers(x, w), (3, 4, 4), [X], "bio"),
    "scan, in reverse": Case(lambda w, x: scan_layers(x, w, reverse=True), (3, 4, 4), [X], "bio"),
    "scan, unrolled by two": Case(lambda w, x: scan_layers(x, w, unroll=2), (3, 4, 4), [X], "bio"),
    "scan, unrolled": Case(lambda w, x: scan_layers(x, w, unroll=True), (3, 4, 4), [X], "bio"),
    "scan with a length": Case(lambda w, x: scan_layers(x, w, length=3), (3, 4, 4), [X], "bio"),
    "scan, rematerialized": Case(
        lambda w, x: lax.scan(jax.checkpoint(scan_layer, prevent_cse=False), x, w)[0], (3, 4, 4), [X], "bio"
    ),
    "scan, layers on axis 1": Case(lambda w, x: scan_layers(x, jnp.moveaxis(w, 1, 0)), (4, 3, 4), [X], "ibo"),
    "scan, layers on axis 2": Case(lambda w, x: scan_layers(x, jnp.moveaxis(w, 2, 0)), (4, 4, 3), [X], "iob"),
    "scan over part of the input": Case(
        lambda w, x: lax.scan(lambda y, xw: (y + xw[0] @ xw[1], None), jnp.zeros((3, 5)), (x, w))[0],
        (2, 4, 5),
        [(2, 3, 4)],
        "bio",
        "iio",
    ),
    "scan over the input": Case(
        lambda w, x: lax.scan(lambda y, xw: (y + jnp.tensordot(xw[0], xw[1], 0), None), jnp.zeros((3, 5)), (x, w))[0],
        (4, 5),
        [(4, 3)],
        "bo",
        "io",
    ),
    "scan over part of the output": Case(
        lambda w, x: lax.scan(lambda _, w: (None, x @ w), None, w)[1], (2, 4, 5), [X], "bio", "oio"
    ),
    "scan over the output": Case(
        lambda w, x: lax.scan(lambda _, w: (None, x @ w), None, w.T)[1], (4, 5), [X], "ib", "io"
    ),
    "scan that starts from a Python number": Case(
        lambda w, x: lax.scan(lambda y, _: (y + layer(x, w).sum(), None), 0.0, length=3)[0], (4, 4), [X], "io"
    ),
    "scan that returns the layers": Case(
        lambda w, x: jnp.einsum("bi,lio->lbo", x, lax.scan(lambda _, w: (None, w.T), None, w)[1]),
        (3, 5, 4),
        [X],
        "boi",
    ),
    "scan that returns its constant": Case(
        lambda w, x: jnp.einsum("bi,lio->lbo", x, lax.scan(lambda _, __: (None, w), None, length=2)[1]),
        (4, 5),
        [X],
        "io",
    ),
    "scan that carries the kernel": Case(
        lambda w, x: lax.scan(lambda wx, _: ((wx[0], layer(wx[1], wx[0])), None), (w, x), length=3)[0][1],
        (4, 4),
        [X],
        "io",
    ),
    "scan that carries the kernel, and the kernel after it": Case(
        lambda w, x: layer(*lax.scan(lambda xw, _: ((layer(*xw), xw[1]), None), (x, w), length=2)[0]), (4, 4), [X], "io"
    ),
    "fori_loop that carries the parameters": Case(
        lambda w, x: lax.fori_loop(0, 3, lambda _, wx: (wx[0], layer(wx[1], wx[0]["w"])), ({"w": w}, x))[1],
        (4, 4),
        [X],
        "io",
    ),
    "loop that carries the kernel through a jit": Case(
        lambda w, x: lax.fori_loop(0, 3, lambda _, wx: jax.jit(lambda w, x: (w, layer(x, w)))(*wx), (w, x))[1],
        (4, 4),
        [X],
        "io",
    ),
    "loop that carries the kernel through a remat in a jit": Case(
        lambda w, x: lax.fori_loop(
            0, 3, lambda _, wx: jax.jit(jax.checkpoint(lambda w, x: (w, layer(x, w))))(*wx), (w, x)
        )[1],
        (4, 4),
        [X],
        "io",
    ),
    "loop in a loop that both carry the kernel": Case(
        lambda w, x: lax.fori_loop(
            0, 2, lambda _, wx: lax.fori_loop(0, 2, lambda _, wx: (wx[0], layer(wx[1], wx[0])), wx), (w, x)
        )[1],
        (4, 4),
        [X],
        "io",
    ),
    "scan in scan": Case(
        lambda w, x: lax.scan(lambda x, w: (lax.scan(lambda x, _: scan_layer(x, w), x, length=2)[0], None), x, w)[0],
        (3, 4, 4),
        [X],
        "bio",
    ),
    "scan of a stack of stacks": Case(
        lambda w, x: lax.scan(lambda x, w: (scan_layers(x, w), None), x, w)[0], (2, 3, 4, 4), [X], "bbio"
    ),
    "map": Case(lambda w, x: lax.map(lambda x: x @ w, x, batch_size=2), (4, 5), [X], "io"),
    "cond, taken": Case(lambda w, x: lax.cond(x[0, 0] < 99, lambda: x @ w, lambda: x), (4, 4), [X], "io"),
    "cond, not taken": Case(lambda w, x: lax.cond(x[0, 0] > 99, lambda: x @ w, lambda: x), (4, 4), [X], "io"),
    "cond with operands": Case(
        lambda w, x: lax.cond(x[0, 0] < 99, lambda w: x @ w, lambda w: x @ w.T, w), (4, 4), [X], None, "io"
    ),
    "switch": Case(
        lambda w, x, i: lax.switch(
            i,
            [lambda: x @ w, lambda: x, lambda: x @ w.T],
        ),
        (4, 4),
        [X, 2],
        None,  # because the branches disagree
        "io",
    ),
    "switch, kernel in one branch": Case(
        lambda w, x, i: lax.switch(i, [lambda: x, lambda: jnp.tanh(x), lambda: x @ w]), (4, 4), [X, 2], "io"
    ),
    "cond in cond": Case(
        lambda w, x: lax.cond(
            x[0, 0] < 99, lambda: lax.cond(x[0, 1] < 99, lambda: x @ w, lambda: x), lambda: layer(x, w.T)
        ),
        (4, 4),
        [X],
        None,
        "io",
    ),
    "platform": Case(
        lambda w, x: lax.platform_dependent(w, x, cpu=lambda w, x: x @ w, default=lambda w, x: x @ w.T),
        (4, 4),
        [X],
        None,
        "io",
    ),
    "platform, another": Case(
        lambda w, x: lax.platform_dependent(w, x, tpu=lambda w, x: x @ w.T, default=lambda w, x: x @ w),
        (4, 4),
        [X],
        None,
        "oi",
    ),
    "platform, in a scan": Case(
        lambda w, x: lax.scan(
            lambda x, w: (lax.platform_dependent(x, w, cpu=layer, cuda=layer, default=layer), None), x, w
        )[0],
        (3, 4, 4),
        [X],
        "bio",
    ),
    "loop of three levels": Case(
        lambda w, x: lax.scan(lambda x, w: (lax.fori_loop(0, 2, lambda _, x: scan_layers(x, w), x), None), x, w)[0],
        (2, 3, 4, 4),
        [X],
        "bbio",
    ),
    "switch, out of range": Case(lambda w, x, i: lax.switch(i, [lambda: x, lambda: x @ w.T]), (4, 4), [X, 7], "oi"),
    "cond in scan": Case(
        lambda w, x: lax.scan(
            lambda x, iw: (lax.cond(iw[0] == 1, lambda: x, lambda: layer(x, iw[1])), None), x, (jnp.arange(3), w)
        )[0],
        (3, 4, 4),
        [X],
        "bio",
    ),
}

# Transforms inside the model


def energy(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.sum(layer(layer(x, w), w.T) ** 2)


def energy_of_layers(x: jax.Array, w: jax.Array, remat: bool = False) -> jax.Array:
    body = jax.checkpoint(scan_layer) if remat else scan_layer
    return jnp.sum(lax.scan(body, x, w)[0] ** 2)


INSIDE = {
    "vmap over experts": Case(lambda w, x: jax.vmap(layer)(x, w), (2, 4, 5), [(2, 3, 4)], "bio"),
    "vmap over experts on axis 1": Case(
        lambda w, x: jax.vmap(layer, in_axes=(0, 1))(x, w), (4, 2, 5), [(2, 3, 4)], "ibo"
    ),
    "vmap over activations": Case(lambda w, x: jax.vmap(lambda x: layer(x, w))(x), (4, 5), [X], "io"),
    "vmap over experts that are stacks": Case(
        lambda w, x: jax.vmap(scan_layers)(x, w), (2, 3, 4, 4), [(2, 3, 4)], "bbio"
    ),
    "vmap of a loop": Case(
        lambda w, x: jax.vmap(lambda x: lax.fori_loop(0, 3, lambda _, x: layer(x, w), x))(x), (4, 4), [X], "io"
    ),
    "grad": Case(lambda w, x: jax.grad(energy)(x, w), (4, 5), [X], "io"),
    "grad of remat": Case(lambda w, x: jax.grad(jax.checkpoint(energy))(x, w), (4, 5), [X], "io"),
    "grad of jit": Case(lambda w, x: jax.grad(jax.jit(energy))(x, w), (4, 5), [X], "io"),
    "grad of scan": Case(lambda w, x: jax.grad(energy_of_layers)(x, w), (3, 4, 4), [X], "bio"),
    "grad of scan of remat": Case(
        lambda w, x: jax.grad(functools.partial(energy_of_layers, remat=True))(x, w), (3, 4, 4), [X], "bio"
    ),
    "grad of scan of a transposed kernel": Case(
        lambda w, x: jax.grad(lambda x: jnp.sum(lax.scan(lambda x, w: scan_layer(x, w.T), x, w)[0] ** 2))(x),
        (3, 4, 4),
        [X],
        "boi",
    ),
    "jacfwd": Case(lambda w, x: jax.jacfwd(layer)(x, w), (4, 5), [X], "io"),
    "jacrev": Case(lambda w, x: jax.jacrev(layer)(x, w), (4, 5), [X], "io"),
    "hessian": Case(lambda w, x: jax.hessian(energy)(x, w), (4, 5), [(2, 4)], "io"),
    "linearize": Case(lambda w, x: jax.linearize(lambda x: layer(x, w), x)[1](x), (4, 5), [X], "io"),
}
ALL = CALLS | LOOPS | INSIDE


@pytest.mark.parametrize("name", ALL)
def test_control_flow_matches_the_merged_kernel(name: str) -> None:
    assert_case(ALL[name])


@pytest.mark.parametrize("name", ALL)
def test_kernels_finds_the_role_of_each_axis(name: str) -> None:
    case = ALL[name]
    assert lj.kernels(case.apply, case.params, *case.arrays)["w"].axes == case.roles


def test_a_while_loop_matches_the_merged_kernel() -> None:
    def settle(w: jax.Array, x: jax.Array) -> jax.Array:
        def unsettled(state: Any) -> jax.Array:
            w, x, steps = state
            return (jnp.abs(layer(x, w) - x).max() > 0.1) & (steps < 5)

        def step(state: Any) -> Any:
            w, x, steps = state
            return w, layer(x, w), steps + 1

        def twice(state: Any) -> Any:
            w, x, steps = state
            w, x, _ = lax.while_loop(lambda state: state[2] < 2, step, (w, x, 0))
            return w, x, steps + 1

        return lax.while_loop(unsettled, twice, (w, x, 0))[1:]

    # Reverse mode stops at a `while`; forward mode does not.
    case = Case(settle, (4, 4), [X], "io")
    tangent = jax.tree.map(jnp.ones_like, case.adapter)

    def run(function: Any) -> Any:
        call = lambda adapter: function(case.params, adapter, *case.arrays)  # noqa: E731
        return jax.jit(lambda adapter: jax.jvp(call, (adapter,), (tangent,)))(case.adapter)

    assert_close(run(lj.lora(case.apply))[0], run(dense(case.apply))[0])
    assert_close(run(lj.lora(case.apply))[1][0], run(dense(case.apply))[1][0], GRADIENT)


@pytest.mark.parametrize(
    "loop", [nnx.fori_loop, "while", "scan", "fori with jit"], ids=["nnx", "while", "scan", "fori with jit"]
)
def test_an_nnx_module_may_be_the_carry_of_a_loop(loop: Any) -> None:
    graph, state = nnx.split(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))

    def apply(state: Any, x: jax.Array) -> jax.Array:
        module = nnx.merge(graph, state)
        match loop:
            case "while":
                body = lambda c: (c[0], jnp.tanh(c[0](c[1])), c[2] + 1)  # noqa: E731
                return nnx.while_loop(lambda c: c[2] < 3, body, (module, x, 0))[1]
            case "scan":
                body = lambda c, _: ((c[0], jnp.tanh(c[0](c[1]))), None)  # noqa: E731
                axes = {"in_axes": (nnx.Carry, 0), "out_axes": (nnx.Carry, 0)}
                return nnx.scan(body, **axes)((module, x), jnp.arange(3))[0][1]
            case "fori with jit":
                call = nnx.jit(lambda module, x: jnp.tanh(module(x)))
                return nnx.fori_loop(0, 3, lambda _, c: (c[0], call(*c)), (module, x))[1]
        return nnx.fori_loop(0, 3, lambda _, c: (c[0], jnp.tanh(c[0](c[1]))), (module, x))[1]

    adapter = adapted(state, {"kernel": "io"})
    x = normal(*X, seed=1)
    out = jax.jit(lj.lora(apply))(state, adapter, x)
    assert_close(out, jax.jit(dense(apply))(state, adapter, x))


# Layers that Flax stacks


class Layer(nn.Module):
    """A layer for `nn.scan`."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        return jnp.tanh(nn.Dense(4, name="dense")(x)), None


class Stack(nn.Module):
    """A scan of scans."""

    axis: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        return stacked(Layer, self.axis, 2)(name="inner")(x, None)


def stacked(layer: Any, axis: int, length: int) -> Any:
    return nn.scan(layer, variable_axes={"params": axis}, split_rngs={"params": True}, length=length)


STACKS: dict[str, tuple[nn.Module, str, str]] = {
    "on axis 0": (stacked(Layer, 0, 3)(), "dense/kernel", "bio"),
    "on axis 1": (stacked(Layer, 1, 3)(), "dense/kernel", "ibo"),
    "on the last axis": (stacked(Layer, -1, 3)(), "dense/kernel", "iob"),
    "on axis 0, rematerialized": (stacked(nn.remat(Layer, prevent_cse=False), 0, 3)(), "dense/kernel", "bio"),
    "of stacks": (stacked(Stack, 0, 3)(axis=0), "inner/dense/kernel", "bbio"),
    "of stacks, on axes 0 and 1": (stacked(Stack, 0, 3)(axis=1), "inner/dense/kernel", "bibo"),
    "of stacks, on axes 2 and 1": (stacked(Stack, 2, 3)(axis=1), "inner/dense/kernel", "ibbo"),
    "all of one kernel": (
        nn.scan(Layer, variable_broadcast="params", split_rngs={"params": False}, length=3)(),
        "dense/kernel",
        "io",
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_of_linen_layers_matches_the_merged_kernel(name: str) -> None:
    module, path, roles = STACKS[name]
    x = normal(*X, seed=1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, None)["params"]
    params = jax.tree.map(lambda leaf: normal(*leaf.shape, seed=2, size=0.5), shapes)
    apply = lambda params, x: module.apply({"params": params}, x, None)[0]  # noqa: E731
    assert lj.kernels(apply, params, x)[path].axes == roles
    assert_law(apply, params, adapted(params, {path: roles}), x)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("remat", [False, True], ids=["scan", "scan of remat"])
def test_a_stack_of_nnx_layers_matches_the_merged_kernel(remat: bool, axis: int) -> None:
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=axis)
    def make(rngs: nnx.Rngs) -> nnx.Linear:
        return nnx.Linear(4, 4, rngs=rngs, use_bias=False)

    def call(module: nnx.Linear, x: jax.Array) -> jax.Array:
        return jnp.tanh(module(x))

    graph, state = nnx.split(make(nnx.Rngs(0)))
    scan = nnx.scan(nnx.remat(call) if remat else call, in_axes=(axis, nnx.Carry), out_axes=nnx.Carry)
    apply = lambda state, x: scan(nnx.merge(graph, state), x)  # noqa: E731
    x, roles = normal(*X, seed=1), "bio" if axis == 0 else "ibo"
    assert lj.kernels(apply, state, x)["kernel"].axes == roles
    assert_law(apply, state, adapted(state, {"kernel": roles}), x)


# Counts of uses


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("jit of a function used twice", [1, 1]),
        ("remat", [1]),
        ("scan, kernel as constant", [3]),
        ("scan, kernel stacked", [3]),
        ("scan, unrolled by two", [3]),
        ("scan, rematerialized", [3]),
        ("scan that starts from a Python number", [3]),
        ("scan that carries the kernel, and the kernel after it", [2, 1]),
        ("scan in scan", [6]),
        ("scan of a stack of stacks", [6]),
        ("cond with operands", [1, 1]),
        ("cond in scan", [3]),
        ("grad of scan of remat", [3, 3, 3]),
        ("vmap of a loop", [3]),
    ],
)
def test_kernels_counts_uses_in_a_loop_once_per_iteration(name: str, times: list[int]) -> None:
    case = ALL[name]
    uses = lj.kernels(case.apply, case.params, *case.arrays)["w"].uses
    assert [(use.kind, use.times) for use in uses] == [("factored", count) for count in times]


def test_explain_counts_uses_like_kernels() -> None:
    case = LOOPS["scan of a stack of stacks"]
    row = lj.explain(case.apply, case.params, case.adapter, *case.arrays, form="factored").rows[0]
    # x·A, the scale, ·B, and the sum with the base: (3, 4) by (4, 4) at rank 2, six times.
    flops = 6 * (2 * 3 * 4 * 2 + 3 * 2 + 2 * 3 * 2 * 4 + 3 * 4)
    assert (row.used, row.flops) == ("factored dot_general ×6", flops)


# Residuals, names and shardings


def residuals(function: Callable[..., Any], *args: Any) -> set[tuple[int, ...]]:
    """The shapes that the forward pass saves for the backward pass."""
    return {leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args))}


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (None, False),
        (jax.checkpoint_policies.nothing_saveable, False),
        (jax.checkpoint_policies.everything_saveable, True),
        (jax.checkpoint_policies.save_only_these_names("activation"), True),
        (jax.checkpoint_policies.save_only_these_names("another"), False),
    ],
    ids=["none", "nothing", "everything", "this name", "another name"],
)
def test_remat_keeps_its_policy(policy: Any, kept: bool) -> None:
    def block(w: jax.Array, x: jax.Array) -> jax.Array:
        y = checkpoint_name(jnp.sin(jnp.tanh(x @ w)), "activation")
        return jnp.sum(jnp.exp(y) ** 2)

    case = Case(lambda w, x: jax.checkpoint(block, policy=policy)(w, x), (4, 7), [X], "io")
    adapted = lj.lora(case.apply)
    assert ((3, 7) in residuals(lambda ad: adapted(case.params, ad, *case.arrays), case.adapter)) == kept


OFFLOAD = {"offload_src": "device", "offload_dst": "pinned_host"}
POLICIES = {
    name: getattr(jax.checkpoint_policies, name)(*args, **options)
    for name, args, options in [
        ("save_only_these_names", ["activation"], {}),
        ("save_any_names_but_these", ["activation"], {}),
        ("save_anything_except_these_names", ["activation"], {}),
        ("save_from_both_policies", [jax.checkpoint_policies.dots_saveable, NAMES], {}),
        ("offload_dot_with_no_batch_dims", OFFLOAD.values(), {}),
        (
            "save_and_offload_only_these_names",
            [],
            {"names_which_can_be_saved": [], "names_which_can_be_offloaded": ["activation"], **OFFLOAD},
        ),
    ]
}
POLICIES |= {
    name: policy
    for name, policy in vars(jax.checkpoint_policies).items()
    if name not in POLICIES and callable(policy) and not isinstance(policy, type)  # classes of JAX 0.11
}


def named(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.exp(jnp.sin(checkpoint_name(layer(x, w), "activation"))) @ w.T


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_saves_the_same_activations_as_in_the_model(name: str) -> None:
    block = jax.checkpoint(named, policy=POLICIES[name])
    case = Case(lambda w, x: block(x, w), (4, 7), [X], "io")
    assert_case(case)
    adapted, merged = (
        str(jax.make_jaxpr(jax.grad(lambda ad: total(function(case.params, ad, *case.arrays))))(case.adapter))  # noqa: B023
        for function in (lj.lora(case.apply), dense(case.apply))
    )
    # In the forward pass, and in the backward pass if it was not saved.
    assert adapted.count("name[name=activation]") == merged.count("name[name=activation]")
    assert adapted.count("sin ") == merged.count("sin ")
    assert ("<host>" in adapted) == ("<host>" in merged) == ("offload" in name)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_applies_in_a_scan_over_layers(name: str) -> None:
    block = jax.checkpoint(lambda x, w: (named(x, w), None), policy=POLICIES[name], prevent_cse=False)
    assert_case(Case(lambda w, x: lax.scan(block, x, w)[0], (3, 4, 7), [X], "bio"))


def test_remat_of_a_scanned_layer_saves_one_activation_per_layer() -> None:
    def block(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.sin(jnp.tanh(x @ w)) @ w.T, None

    def model(w: jax.Array, x: jax.Array) -> jax.Array:
        return lax.scan(jax.checkpoint(block, prevent_cse=False), x, w)[0]

    case = Case(model, (5, 4, 7), [X], "bio")
    kept = residuals(lambda ad: lj.lora(case.apply)(case.params, ad, *case.arrays), case.adapter)
    assert (5, 3, 4) in kept
    assert (5, 3, 7) not in kept


@jax.custom_vjp
def lying_vjp(x: jax.Array) -> jax.Array:
    return jnp.sin(x)


lying_vjp.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (3 * g * jnp.cos(x),))


@jax.custom_jvp
def lying_jvp(x: jax.Array) -> jax.Array:
    return jnp.sin(x)


lying_jvp.defjvps(lambda g, out, x: 3 * g * jnp.cos(x))

AROUND: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "next to a kernel": lambda lie: lambda w, x: lie(x @ w) @ w,
    "in jit": lambda lie: lambda w, x: jax.jit(lambda w, x: lie(x @ w) @ w)(w, x),
    "in remat": lambda lie: lambda w, x: jax.checkpoint(lambda w, x: lie(x @ w) @ w)(w, x),
    "in scan": lambda lie: lambda w, x: lax.scan(lambda x, _: (lie(x @ w), None), x, length=2)[0],
    "in cond": lambda lie: lambda w, x: lax.cond(x[0, 0] < 99, lambda: lie(x @ w), lambda: x),
    "in vmap": lambda lie: lambda w, x: jax.vmap(lambda x: lie(x @ w))(x),
}


@pytest.mark.parametrize("lie", [lying_vjp, lying_jvp], ids=["custom_vjp", "custom_jvp"])
@pytest.mark.parametrize("around", AROUND)
def test_custom_derivatives_of_the_model_are_kept(around: str, lie: Any) -> None:
    assert_case(Case(AROUND[around](lie), (4, 4), [X], "io"))


def test_low_rank_products_have_the_name_scopes_of_the_model() -> None:
    def model(w: jax.Array, x: jax.Array) -> jax.Array:
        with jax.named_scope("attention"):
            x = jnp.tanh(x @ w)
        return lax.scan(jax.named_scope("layer")(lambda x, _: scan_layer(x, w)), x, length=2)[0]

    case = Case(model, (4, 4), [X], "io")
    text = jax.jit(lj.lora(case.apply)).lower(case.params, case.adapter, *case.arrays).as_text(debug_info=True)
    compiled = jax.jit(lj.lora(case.apply)).lower(case.params, case.adapter, *case.arrays).compile().as_text()
    assert "attention/dot_general" in compiled
    assert "layer/dot_general" in text
    assert "/dot_general" in text and '"dot_general' not in text  # none is outside the scopes


def test_the_name_of_a_jit_inside_the_model_is_kept() -> None:
    def feed_forward(w: jax.Array, x: jax.Array) -> jax.Array:
        return layer(x, w)

    case = Case(lambda w, x: jax.jit(feed_forward)(w, x), (4, 4), [X], "io")
    jaxpr = jax.make_jaxpr(lj.lora(case.apply))(case.params, case.adapter, *case.arrays)
    assert [eqn.params["name"] for eqn in jaxpr.eqns if eqn.primitive.name == "jit"] == ["feed_forward"]


def test_shardings_of_a_jit_inside_the_model_are_kept() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    call = jax.jit(lambda w, x: x @ w, in_shardings=(None, rows), out_shardings=rows)
    case = Case(lambda w, x: call(w, x), (4, 4), [(8, 4)], "io")
    assert_case(case)
    jaxpr = jax.make_jaxpr(lj.lora(case.apply))(case.params, case.adapter, *case.arrays)
    (eqn,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "jit")
    assert eqn.params["in_shardings"][-1] == rows
    assert eqn.params["out_shardings"] == (rows,)


# Effects and random numbers


def prints(text: str, *, ordered: bool = False) -> Callable[..., Any]:
    def model(w: jax.Array, x: jax.Array) -> jax.Array:
        y = x @ w
        jax.debug.print(text, y.shape[0], ordered=ordered)
        return y

    return model


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("ordered", [False, True], ids=["unordered", "ordered"])
def test_a_debug_print_prints_once(jit: bool, ordered: bool, capfd: pytest.CaptureFixture[str]) -> None:
    case = Case(prints("rows: {}", ordered=ordered), (4, 4), [X], "io")
    adapted = lj.lora(case.apply)
    (jax.jit(adapted) if jit else adapted)(case.params, case.adapter, *case.arrays).block_until_ready()
    jax.effects_barrier()
    assert capfd.readouterr().out == "rows: 3\n"


def test_effects_in_a_scan_happen_once_per_iteration_in_order() -> None:
    seen: list[int] = []

    def model(w: jax.Array, x: jax.Array) -> jax.Array:
        def body(x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            jax.debug.callback(lambda i: seen.append(int(i)), i, ordered=True)
            return scan_layer(x, w)

        return lax.scan(body, x, jnp.arange(4))[0]

    case = Case(model, (4, 4), [X], "io")
    jax.jit(lj.lora(case.apply))(case.params, case.adapter, *case.arrays).block_until_ready()
    jax.effects_barrier()
    assert seen == [0, 1, 2, 3]


def test_results_of_callbacks_reach_the_model() -> None:
    def model(w: jax.Array, x: jax.Array) -> jax.Array:
        y = x @ w
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(y.shape, y.dtype), y) @ w.T

    case = Case(model, (4, 5), [X], "io")
    got = jax.jit(lj.lora(case.apply))(case.params, case.adapter, *case.arrays)
    assert_close(got, jax.jit(dense(case.apply))(case.params, case.adapter, *case.arrays))


def test_a_model_may_write_to_a_reference() -> None:
    def model(w: jax.Array, x: jax.Array) -> jax.Array:
        sums = jax.new_ref(jnp.zeros(5))
        sums[...] = sums[...] + (x @ w).sum(0)
        y = jnp.tanh(x @ w)
        sums[...] = sums[...] + y.sum(0)
        return sums[...]

    case = Case(model, (4, 5), [X], "io")
    got = jax.jit(lj.lora(case.apply))(case.params, case.adapter, *case.arrays)
    assert_close(got, jax.jit(dense(case.apply))(case.params, case.adapter, *case.arrays))


KEYS = {"typed": jax.random.key, "raw": jax.random.PRNGKey}


@pytest.mark.parametrize("make", KEYS.values(), ids=KEYS)
def test_keys_are_carried_and_split_as_in_the_model(make: Callable[[int], jax.Array]) -> None:
    def model(params: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        def body(carry: Any, w_and_key: Any) -> tuple[Any, None]:
            x, key = carry
            w, noise_key = w_and_key
            key, layer_key = jax.random.split(key)
            noise = jax.random.normal(layer_key, x.shape) + jax.random.uniform(noise_key, x.shape)
            return (layer(x, w) + noise, key), None

        (x, key), _ = lax.scan(body, (x, key), (params["w"], jax.random.split(key, 3)))
        return x, key

    params = {"w": normal(3, 4, 4)}
    args = params, adapted(params, {"w": "bio"}), normal(*X, seed=1), make(7)
    (y, key), (expected, expected_key) = jax.jit(lj.lora(model))(*args), jax.jit(dense(model))(*args)
    assert_close(y, expected)
    assert (key == expected_key).all() and key.dtype == expected_key.dtype


class Net(nn.Module):
    """A layer with all that Linen passes in addition to parameters."""

    def setup(self) -> None:
        self.dense, self.norm, self.dropout = nn.Dense(6), nn.BatchNorm(), nn.Dropout(0.5)

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        x = self.dense(x)
        self.sow("intermediates", "hidden", x)
        return self.dropout(self.norm(x, use_running_average=not train), deterministic=not train)

    def hidden(self, x: jax.Array, scale: float) -> jax.Array:
        return self.dense(x) * scale


@pytest.fixture(scope="module")
def net() -> tuple[Any, Any]:
    shapes = jax.eval_shape(functools.partial(Net().init, train=False), jax.random.key(0), jnp.ones(X))
    variables = jax.tree.map(lambda leaf: normal(*leaf.shape, seed=2) ** 2, shapes)
    return variables, adapted(variables, {"params/dense/kernel": "io"})


@pytest.mark.parametrize("make", KEYS.values(), ids=KEYS)
def test_dropout_draws_the_same_masks_as_the_model(make: Callable[[int], jax.Array], net: tuple[Any, Any]) -> None:
    apply = functools.partial(Net().apply, mutable=["batch_stats"])
    assert_law(lambda v, x, key: apply(v, x, rngs={"dropout": key})[0], *net, normal(*X, seed=1), make(3))


def test_mutable_collections_are_returned(net: tuple[Any, Any]) -> None:
    apply = lambda v, x: Net().apply(v, x, False, mutable=["batch_stats", "intermediates"])  # noqa: E731
    assert_law(apply, *net, normal(*X, seed=1))


def test_a_method_can_be_called_by_name_with_keywords(net: tuple[Any, Any]) -> None:
    x = normal(*X, seed=1)
    got = lj.lora(Net().apply)(*net, x, scale=2.0, method="hidden")
    assert_close(got, dense(Net().apply)(*net, x, scale=2.0, method="hidden"))


# Python values


class Pair(NamedTuple):
    array: jax.Array
    text: str


@dataclasses.dataclass(frozen=True)
class Options:
    """Not a pytree, so a leaf to JAX."""

    width: int


VALUES = {
    "bool": True,
    "int": 3,
    "float": 0.5,
    "str": "gelu",
    "None": None,
    "callable": jnp.tanh,
    "dataclass": Options(4),
    "NamedTuple": Pair(jnp.ones(2), "text"),
    "nested": {"a": [1, ("b", None)], "c": np.float32(2)},
    "dtype": jnp.bfloat16,
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("by", ["position", "keyword"])
def test_a_python_value_reaches_the_model_unchanged_and_is_returned(by: str, value: Any) -> None:
    received = []

    def model(params: Any, x: jax.Array, value: Any) -> tuple[jax.Array, Any]:
        received.append(value)
        return x @ params["w"], value

    case = Case(lambda w, x: x @ w, (4, 5), [X], "io")
    args = (case.params, case.adapter, *case.arrays)
    adapted = lj.lora(model)
    _, returned = adapted(*args, value) if by == "position" else adapted(*args, value=value)
    for copy in (received[0], returned):
        assert jax.tree.structure(copy) == jax.tree.structure(value)
        for one, other in zip(jax.tree.leaves(copy), jax.tree.leaves(value), strict=True):
            assert one is other or isinstance(other, jax.Array)


def test_python_values_among_the_parameters_are_unchanged() -> None:
    params = {"w": normal(4, 5), "name": "dense", "scale": 2, "activation": jnp.tanh}

    def model(params: Any, x: jax.Array) -> Any:
        return {params["name"]: params["activation"](x @ params["w"]) * params["scale"]}

    adapter, x = adapted(params, {"w": "io"}), normal(*X, seed=1)
    assert_close(lj.lora(model)(params, adapter, x), dense(model)(params, adapter, x))


DTYPES = [np.float32, np.float64, jnp.bfloat16, np.int64, np.bool_]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_numpy_arrays_are_converted_as_by_jax(jit: bool, dtype: Any) -> None:
    case = Case(lambda w, x: x @ w, (4, 5), [], "io")
    x = np.ones(X).astype(dtype)
    adapted = lj.lora(case.apply)
    got = (jax.jit(adapted) if jit else adapted)(case.params, case.adapter, x)
    assert_close(got, adapted(case.params, case.adapter, jnp.asarray(x)))


def test_a_numpy_array_of_text_reaches_the_model_unchanged() -> None:
    case = Case(lambda w, x: x @ w, (4, 5), [X], "io")
    names = np.array(["a", "b"])
    _, returned = lj.lora(lambda p, x, names: (x @ p["w"], names))(case.params, case.adapter, *case.arrays, names)
    assert returned is names


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_numpy_parameters_are_converted_as_by_jax(jit: bool, dtype: Any) -> None:
    case = Case(lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32).T, (5, 4), [X], "oi")
    adapted = lj.lora(case.apply)
    params = {"w": np.asarray(case.params["w"], dtype)}
    got = (jax.jit(adapted) if jit else adapted)(params, case.adapter, *case.arrays)
    assert_close(got, adapted(case.params, case.adapter, *case.arrays))


def test_a_numpy_result_stays_numpy() -> None:
    table = np.arange(3)
    case = Case(lambda w, x: x @ w, (4, 5), [X], "io")
    _, returned = lj.lora(lambda p, x: (x @ p["w"], table))(case.params, case.adapter, *case.arrays)
    assert returned is table


def test_weak_types_of_results_are_kept() -> None:
    case = Case(lambda w, x: x @ w, (4, 5), [X], "io")
    model = lambda p, x, s: (x @ p["w"], s * 2)  # noqa: E731
    args = (case.params, case.adapter, *case.arrays)
    assert lj.lora(model)(*args, jnp.asarray(2.0))[1].weak_type
    assert not lj.lora(model)(*args, jnp.float32(2.0))[1].weak_type


STRICT: dict[str, tuple[Callable[..., jax.Array], Any]] = {
    "one dtype": (lambda w, x: x @ w, jnp.float32),
    "bfloat16": (lambda w, x: x.astype(jnp.bfloat16) @ w, jnp.bfloat16),
    "mixed operands": (
        lambda w, x: lax.dot(x.astype(jnp.bfloat16), w, preferred_element_type=jnp.float32),
        jnp.float32,
    ),
    "materialized": (lambda w, x: x.astype(jnp.bfloat16) @ -w, jnp.bfloat16),
}


@pytest.mark.parametrize("name", STRICT)
def test_models_run_under_strict_promotion(name: str) -> None:
    call, dtype = STRICT[name]
    case = Case(call, (4, 5), [X], "io")
    params = {"w": case.params["w"].astype(dtype)}
    adapted = lj.lora(case.apply, materialize=["w"])
    with jax.numpy_dtype_promotion("strict"):
        got = adapted(params, case.adapter, *case.arrays)
    assert_close(got, adapted(params, case.adapter, *case.arrays))


# Transforms of the adapted function


def stack(w: jax.Array, x: jax.Array) -> jax.Array:
    return lax.scan(jax.checkpoint(scan_layer, prevent_cse=False), x, w)[0]


STACK = Case(stack, (2, 4, 4), [(8, 3, 4)], "bio")
Call = Callable[[Any, jax.Array], jax.Array]


def two(adapter: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf / 2]), adapter)


def hessian_vector(call: Call) -> Call:
    gradient = lambda adapter, x: jax.grad(lambda adapter: total(call(adapter, x)))(adapter)  # noqa: E731
    return lambda adapter, x: jax.jvp(lambda ad: gradient(ad, x), (adapter,), (jax.tree.map(jnp.sin, adapter),))[1]


OUTER: dict[str, Callable[[Call], Call]] = {
    "jit": jax.jit,
    "grad": lambda call: lambda ad, x: jax.grad(lambda ad: total(call(ad, x)))(ad),
    "grad in x": lambda call: lambda ad, x: jax.grad(lambda x: total(call(ad, x)))(x),
    "vmap over adapters": lambda call: lambda ad, x: jax.vmap(call, (0, None))(two(ad), x),
    "vmap over x": lambda call: jax.vmap(call, (None, 0)),
    "vmap over both": lambda call: lambda ad, x: jax.vmap(call)(two(ad), x[:2]),
    "scan over x": lambda call: lambda ad, x: lax.scan(lambda _, x: (None, call(ad, x)), None, x)[1],
    "scan over adapters": lambda call: lambda ad, x: lax.scan(lambda _, ad: (None, call(ad, x)), None, two(ad))[1],
    "remat": lambda call: lambda ad, x: jax.grad(lambda ad: total(jax.checkpoint(call)(ad, x)))(ad),
    "jvp": lambda call: lambda ad, x: jax.jvp(call, (ad, x), (jax.tree.map(jnp.cos, ad), jnp.cos(x)))[1],
    "linearize": lambda call: lambda ad, x: jax.linearize(lambda ad: call(ad, x), ad)[1](jax.tree.map(jnp.cos, ad)),
    "second derivative": hessian_vector,
    "pmap": lambda call: jax.pmap(call, in_axes=(None, 0)),
    "shard_map": lambda call: jax.shard_map(
        call,
        mesh=jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)),
        in_specs=(PartitionSpec(), PartitionSpec("x")),
        out_specs=PartitionSpec("x"),
    ),
    "shard_map with grad": lambda call: lambda ad, x: jax.grad(lambda ad: total(OUTER["shard_map"](call)(ad, x)))(ad),
}


@pytest.mark.parametrize("name", OUTER)
def test_a_transform_of_the_adapted_model_matches_the_merged_model(name: str) -> None:
    def run(function: Any) -> Any:
        call = OUTER[name](lambda adapter, x: function(STACK.params, adapter, x))
        return (call if name == "pmap" else jax.jit(call))(STACK.adapter, *STACK.arrays)

    assert_close(run(lj.lora(STACK.apply)), run(dense(STACK.apply)), GRADIENT)


def test_an_adapted_model_can_be_adapted_again() -> None:
    case = Case(lambda w, x: layer(x, w), (4, 5), [X], "io")
    first, second = case.adapter, jax.tree.map(jnp.cos, case.adapter)
    got = lj.lora(lj.lora(case.apply))(case.params, second, first, *case.arrays)
    assert_close(got, case.apply(lj.merge(lj.merge(case.params, first), second), *case.arrays))


WIDE = {"w": normal(2, 16, 16)}  # at rank 16 the planner merges, except under another `lora`
WIDE_ADAPTED = jax.tree.map(lambda x: x / 8, adapted(WIDE, {"w": "bio"}, rank=16))


@pytest.mark.parametrize("jit", [False, True], ids=["plain", "in a jit of the user's"])
def test_an_adapted_model_that_was_called_before_can_be_adapted_again(jit: bool) -> None:
    block = jax.jit(layer)
    net = lambda params, x: lax.scan(lambda x, w: (block(x, w), None), x, params["w"])[0]  # noqa: E731
    adapted_net, x = lj.lora(net), normal(128, 16)
    assert lj.explain(net, WIDE, WIDE_ADAPTED, x).rows[0].used.startswith("merged")
    inner = lambda params, x: adapted_net(params, WIDE_ADAPTED, x)  # noqa: E731
    inner = jax.jit(inner) if jit else inner
    inner(WIDE, x)  # JAX's cache of this call must not be used for the next one
    second = jax.tree.map(jnp.cos, WIDE_ADAPTED)
    second["w"].arrays["b"] /= 32
    got = lj.lora(inner)(WIDE, second, x)
    assert_close(got, net(lj.merge(lj.merge(WIDE, WIDE_ADAPTED), second), x), {"float32": 1e-4})


@pytest.mark.parametrize("x64", [True, False])
def test_cached_calls_are_not_used_under_another_jax_setting(x64: bool) -> None:
    apply = lj.lora(STACK.apply)
    apply(STACK.params, STACK.adapter, *STACK.arrays)
    with jax.enable_x64(x64):
        params, adapter, x = jax.tree.map(
            lambda leaf: np.asarray(leaf, float), (STACK.params, STACK.adapter, STACK.arrays)
        )
        got, expected = apply(params, adapter, *x), STACK.apply(lj.merge(params, adapter), *x)
        assert got.dtype == (jnp.float64 if x64 else jnp.float32)
        np.testing.assert_allclose(got, expected, rtol=1e-12 if x64 else 1e-5)


# Compilation and leaks


def test_a_deleted_model_leaves_no_program_and_no_constant() -> None:
    def call(number: int) -> None:
        constant = jnp.full(4, float(number))
        block = jax.jit(lambda x, w: layer(x, w) + constant)
        apply = lambda params, x: lax.scan(lambda x, w: (block(x, w), None), x, params["w"])[0]  # noqa: E731
        params = {"w": normal(2, 4, 4)}
        lj.lora(apply)(params, adapted(params, {"w": "bio"}), normal(3, 4)).block_until_ready()

    def held() -> int:
        return len(jax.live_arrays()) + len(jax.devices()[0].client.live_executables())

    call(0)
    before = held()
    for number in range(1, 13):
        call(number)
    assert held() <= before + 4


def test_a_kernel_that_an_inner_jit_donates_is_kept() -> None:
    donating = jax.jit(lambda w, x: layer(x, w), donate_argnums=0)
    params = {"w": normal(4, 4)}
    adapter, x = adapted(params, {"w": "io"}), normal(4, 4)
    expected = layer(x, lj.merge(params, adapter)["w"])
    run = lj.lora(lambda params, x: donating(params["w"], x))
    for _ in range(2):
        assert_close(run(params, adapter, x), expected)


def test_a_second_call_with_new_values_traces_nothing() -> None:
    run = jax.jit(chex.assert_max_traces(lj.lora(STACK.apply), n=1))
    for number in range(2):
        params, adapter, x = jax.tree.map(lambda leaf: leaf + number, (STACK.params, STACK.adapter, STACK.arrays[0]))  # noqa: B023
        run(params, adapter, x)
    assert run._cache_size() == 1


def grow(state: Any) -> Any:
    w, x, steps = state
    return w, layer(x, w), steps + 1


def two_iterations(state: Any) -> jax.Array:
    return state[2] < 2


def straight(w: jax.Array, x: jax.Array) -> jax.Array:
    return layer(x, w)


def transposed(w: jax.Array, x: jax.Array) -> jax.Array:
    return layer(x, w.T)


def layer_with_remat(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
    return jax.checkpoint(layer)(x, w), None


AGAIN = {
    "jit": CALLS["jit of a function used twice"],
    "scan": LOOPS["scan, kernel stacked"],
    "scan of remat": Case(lambda w, x: lax.scan(layer_with_remat, x, w)[0], (3, 4, 4), [X], "bio"),
    "while": Case(lambda w, x: lax.while_loop(two_iterations, grow, (w, x, 0))[1], (4, 4), [X], "io"),
    "cond": Case(lambda w, x: lax.cond(x[0, 0] > 0, straight, transposed, w, x), (4, 4), [X], "io"),
    "switch": Case(
        lambda w, x: lax.switch(jnp.int32(x[0, 0] > 0), [straight, transposed, straight], w, x), (4, 4), [X], "io"
    ),
    "platform": Case(lambda w, x: lax.platform_dependent(w, x, cpu=straight, default=transposed), (4, 4), [X], "io"),
}


@pytest.mark.parametrize("name", AGAIN)
def test_a_second_call_outside_jit_compiles_nothing(name: str) -> None:
    # As in a model whose inner functions are the same objects in each call.
    case = AGAIN[name]
    first = case.params, case.adapter, *case.arrays
    second = jax.tree.map(jnp.negative, first)
    adapted = lj.lora(case.apply)
    assert_close(adapted(*first), dense(case.apply)(*first))
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, _, **__: compiled.append(name))
    try:
        got = adapted(*second)
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [name for name in compiled if "backend_compile" in name]
    assert_close(got, dense(case.apply)(*second))


def test_a_cached_loop_is_not_used_for_another_adapter() -> None:
    case = LOOPS["scan, kernel stacked"]
    adapted_case = lj.lora(case.apply)
    for rank, scale in ((1, 1.0), (2, 1.0), (2, 2.0)):
        adapter = adapted(case.params, {"w": "bio"}, rank=rank)
        scaled = {"w": lj.Adapter(dataclasses.replace(adapter["w"].variant, alpha=scale), "bio", **adapter["w"].arrays)}
        args = case.params, scaled, *case.arrays
        assert_close(adapted_case(*args), dense(case.apply)(*args))


def test_a_cached_loop_raises_with_the_right_line() -> None:
    def swap(carry: Any, _: None) -> Any:
        one, other, x = carry
        return (other, one, x @ one), None

    case = Case(lambda w, x: lax.scan(swap, (w, jnp.eye(4), x), length=2)[0][2], (4, 4), [X], "io")
    again = Case(lambda w, x: lax.scan(swap, (w, jnp.eye(4), x), length=2)[0][2], (4, 4), [X], "io")
    for one in (case, again):
        with pytest.raises(lj.UnsupportedError, match=f"{__file__}:{one.call.__code__.co_firstlineno}:"):
            lj.lora(one.apply)(one.params, one.adapter, *one.arrays)
        # Another call may materialize the kernel.
        assert_law(one.apply, one.params, one.adapter, *one.arrays, materialize=["w"])


@pytest.mark.parametrize(
    ("name", "jit"),
    [
        ("stack", True),
        ("grad", True),
        sweep("stack", False),
        sweep("jit", False),
        sweep("loop", False),
        sweep("cond", True),
    ],
)
def test_no_tracer_leaks(name: str, jit: bool) -> None:
    case = {
        "stack": STACK,
        "jit": CALLS["jit that closes over the kernel"],
        "loop": LOOPS["fori_loop that carries the parameters"],
        "cond": LOOPS["cond in scan"],
        "grad": INSIDE["grad of scan of remat"],
    }[name]
    adapted = lj.lora(case.apply)
    with jax.checking_leaks():
        (jax.jit(adapted) if jit else adapted)(case.params, case.adapter, *case.arrays)


def test_a_compiled_call_transfers_nothing_from_or_to_the_host() -> None:
    run = jax.jit(lj.lora(STACK.apply))
    args = STACK.params, STACK.adapter, *STACK.arrays
    run(*args)
    with jax.transfer_guard("disallow_explicit"):
        run(*args)
