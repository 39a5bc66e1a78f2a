"""A leaf with several uses, such as transposed or looked up, has one adapter with the sum of the gradients."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from law import Case, adapted, assert_case, assert_close, assert_law, normal

import lora_jax as lj
from lora_jax.testing import shapes_made

X, IDS = (3, 4), [[0, 5], [2, 2]]
TIED = {
    "there and back": Case(lambda w, x: jnp.tanh(x @ w) @ w.T, (4, 5), [X], "io"),
    "back scaled by the width": Case(lambda w, x: jnp.tanh(x @ w) @ (w.T / jnp.sqrt(5.0)), (4, 5), [X], "io"),
    "there, and back through half of it": Case(lambda w, x: jnp.tanh(x @ w[:, :3]) @ w[:, 2:].T, (4, 5), [X], "io"),
    "with both signs": Case(lambda w, x: jax.nn.relu(x @ w) - jax.nn.relu(x @ -w), (4, 5), [X], "io"),
    "with both signs, concatenated": Case(lambda w, x: jax.nn.relu(x @ jnp.hstack([w, -w])), (4, 5), [X], "io"),
    "both ways round": Case(lambda w, x: x @ w + x @ jnp.flip(w), (4, 5), [X], "io"),
    "embedding and head": Case(lambda w, ids: jnp.tanh(w[ids]) @ w.T, (6, 5), [IDS], "io"),
    "embedding times a root, and head": Case(
        lambda w, ids: jnp.tanh((w * jnp.sqrt(5.0))[ids]) @ w.T, (6, 5), [IDS], "io"
    ),
    "embedding and part of the head": Case(lambda w, ids: jnp.tanh(w[ids]) @ w[2:4].T, (6, 5), [IDS], "io"),
    "embedding and selected rows of the head": Case(
        lambda w, ids: jnp.einsum("btd,btd->bt", jnp.tanh(w[ids]), w[ids[:, ::-1]]), (6, 5), [IDS], "io"
    ),
    "one layer again and again": Case(
        lambda w, x: lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w / 2), x), (4, 4), [X], "io"
    ),
    "first and last layer of a stack": Case(lambda w, x: jnp.tanh(x @ w[0]) @ w[-1].T, (3, 4, 5), [X], "bio"),
    "one of a fused kernel, and all of it": Case(
        lambda w, x: (x @ w[:, :2], x @ w, x @ w.reshape(4, 3, 2)[:, 1]), (4, 6), [X], "io"
    ),
    "with the product with itself": Case(lambda w, x: x @ (w @ w.T) + x, (4, 5), [X], "oi", "io"),
    "in a branch, and after it": Case(
        lambda w, x: lax.cond(x[0, 0] > 0, lambda x: x @ w @ w.T, lambda x: x, x) @ w, (4, 5), [X], None, "io"
    ),
    "convolved and multiplied": Case(
        lambda w, x: (lax.conv(x, w, (1,), "SAME"), jnp.einsum("bit,oit->bo", x[..., :3], w)),
        (4, 3, 3),
        [(2, 3, 5)],
        "oii",
    ),
}


@pytest.mark.parametrize("name", TIED)
def test_every_use_matches_the_merged_kernel(name: str) -> None:
    assert_case(TIED[name])


@pytest.mark.parametrize("name", TIED)
def test_kernels_uses_the_roles_of_the_first_product_with_activations(name: str) -> None:
    case = TIED[name]
    assert case.roles in (None, lj.kernels(case.apply, case.params, *case.arrays)["w"].axes)


@pytest.mark.parametrize(
    "name", ["there and back", "embedding times a root, and head", "with both signs, concatenated"]
)
def test_tied_uses_work_outside_jit_and_under_vmap(name: str) -> None:
    case = TIED[name]
    (x,) = case.arrays
    run = functools.partial(lj.lora(case.apply), case.params, case.adapter)
    expected = case.apply(lj.merge(case.params, case.adapter), x)
    assert_close(run(x), expected)
    assert_close(jax.vmap(run)(x), expected)


def test_no_use_of_a_tied_embedding_materializes_it() -> None:
    params = {"w": normal(70, 50)}
    adapter = adapted(params, {"w": "io"})
    model = lj.lora(lambda params, ids: jnp.tanh(params["w"][ids]) @ params["w"].T)
    shapes = shapes_made(jax.grad(lambda ad: model(params, ad, jnp.array([1, 2, 3])).sum()), adapter)
    assert not shapes & {(70, 50)}


def test_two_paths_of_one_array_have_two_adapters() -> None:
    shared = normal(4, 4)
    params = {"one": shared, "two": shared}
    adapter = adapted(params, {"one": "io", "two": "oi"})
    assert_law(lambda p, x: jnp.tanh(x @ p["one"]) @ p["two"].T, params, adapter, normal(*X, seed=9))


class Tied(nn.Module):
    """An embedding that is scaled on the way in, and the head on the way out."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(7, 6)
        return embed.attend(nn.Dense(6)(embed(ids) * jnp.sqrt(6.0)))


def test_a_tied_embedding_of_linen_matches_the_merged_kernel() -> None:
    ids = jnp.array(IDS)
    variables = Tied().init(jax.random.key(0), ids)
    roles = {"params/Embed_0/embedding": "io", "params/Dense_0/kernel": "io"}
    found = lj.kernels(Tied().apply, variables, ids)
    assert {path: found[path].axes for path in roles} == roles
    assert_law(Tied().apply, variables, adapted(variables, roles), ids)


def test_a_shared_layer_of_nnx_matches_the_merged_kernel() -> None:
    class Shared(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = nnx.Linear(4, 4, rngs=rngs)
            self.last = self.first

        def __call__(self, x: jax.Array) -> Any:
            return self.last(jnp.tanh(self.first(x)))

    graph, state = nnx.split(Shared(nnx.Rngs(0)))
    apply = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    x = normal(*X, seed=9)
    (path,) = [path for path in lj.kernels(apply, state, x) if path.endswith("kernel")]
    assert_law(apply, state, adapted(state, {path: "io"}), x)
    assert len(lj.kernels(apply, state, x)[path].uses) == 2


# Uses that disagree about roles


def normed(w: jax.Array) -> jax.Array:
    """The norm of a kernel by a power iteration, which multiplies its outputs first."""
    u = jnp.ones(w.shape[1])
    for _ in range(2):
        v = w @ u
        u = (v / jnp.linalg.norm(v)) @ w
    return jnp.linalg.norm(u)


def mlp(params: Any, x: jax.Array) -> jax.Array:
    return (jnp.tanh(jnp.tanh(x @ params["first"]) @ params["middle"]) @ params["last"])[0]


def recurrent(params: Any, x: jax.Array) -> jax.Array:
    """Applies the middle layer repeatedly in a scan."""

    def step(h: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.tanh(h @ params["middle"]), None

    return (lax.scan(step, jnp.tanh(x @ params["first"]), None, length=2)[0] @ params["last"])[0]


def unpacked(params: Any, x: jax.Array) -> Any:
    """The gradient and its divergence by hand, which use only the transpose of the last layer."""
    h = jnp.tanh(x @ params["first"])
    return ((1 - h**2) * params["last"][:, 0]) @ params["first"].T


def laplacian(model: Any) -> Any:
    return lambda params, x: jnp.trace(jax.hessian(model, argnums=1)(params, x))


def hutchinson(params: Any, x: jax.Array, noise: jax.Array) -> jax.Array:
    """The trace of a Jacobian by its product with noise, as in continuous normalizing flows."""
    y, pull = jax.vjp(lambda x: jnp.tanh(x @ params["w"]) @ params["o"], x)
    return y.sum() + (pull(noise)[0] * noise).sum()


MLP = {"first": (3, 5), "middle": (5, 5), "last": (5, 1)}
IO = dict.fromkeys(MLP, "io")
Roles = dict[str, str | None]
DIFFERING: dict[str, tuple[Any, dict[str, tuple[int, ...]], list[tuple[int, ...]], Roles]] = {
    "a kernel divided by its norm": (lambda p, x: x @ (p["w"] / normed(p["w"])), {"w": (4, 5)}, [X], {"w": "io"}),
    "a norm, in jit, and then the product in remat": (
        lambda p, x: jax.checkpoint(lambda w, x: x @ w)(p["w"], x) / jax.jit(normed)(p["w"]),
        {"w": (4, 5)},
        [X],
        {"w": "io"},
    ),
    "a norm in a loop, a product in a scan": (
        lambda p, x: (
            lax.scan(lambda x, _: (jnp.tanh(x @ p["w"]), None), x, None, length=2)[0]
            * lax.fori_loop(0, 2, lambda _, u: p["w"] @ u / 3, jnp.ones(4)).sum()
        ),
        {"w": (4, 4)},
        [X],
        {"w": "io"},
    ),
    "a gradient": (jax.grad(mlp, argnums=1), MLP, [(3,)], IO),
    "a gradient of a jitted model": (jax.grad(jax.jit(mlp), argnums=1), MLP, [(3,)], IO),
    "a gradient of a model in remat": (jax.grad(jax.checkpoint(mlp), argnums=1), MLP, [(3,)], IO),
    "a gradient through a scan": (jax.grad(recurrent, argnums=1), MLP, [(3,)], IO),
    "a Laplacian": (laplacian(mlp), MLP, [(3,)], IO),
    "a Laplacian through a scan": (laplacian(recurrent), MLP, [(3,)], IO),
    "a gradient of a gradient": (
        jax.grad(lambda p, x: (jax.grad(mlp, argnums=1)(p, x) ** 2).sum(), argnums=1), MLP, [(3,)], IO
    ),
    "a product with a Hessian": (
        lambda p, x, v: jax.jvp(lambda x: jax.grad(mlp, argnums=1)(p, x), (x,), (v,))[1], MLP, [(3,), (3,)], IO
    ),
    "a derivative by hand": (unpacked, {"first": (3, 5), "last": (5, 1)}, [(3,)], {"first": "io", "last": None}),
    "a product with noise": (hutchinson, {"w": (4, 5), "o": (5, 4)}, [(4,), (4,)], {"w": "io", "o": "io"}),
    "a transposed layer by a vjp": (
        lambda p, x: jax.vjp(lambda y: y @ p["w"], jnp.zeros(4))[1](x)[0], {"w": (4, 5)}, [(5,)], {"w": "oi"}
    ),
    "a head on another's activations, and an embedding": (
        lambda p, x, ids: (x @ p["w"].T, jnp.tanh(p["w"][ids.astype(int)]) @ p["w"].T), {"w": (6, 5)}, [(3, 5), (3,)],
        {"w": None},
    ),
    "of constants only": (lambda p: jnp.ones((3, 4)) @ p["w"], {"w": (4, 5)}, [], {"w": "io"}),
    "of arrays that are closed over": (
        lambda p: (normal(3, 4) @ p["w"]) / normed(p["w"]), {"w": (4, 5)}, [], {"w": "io"}
    ),
    "a column that is taken out": (lambda p, x: x @ p["w"][:, 0], {"w": (4, 1)}, [X], {"w": "io"}),
    "a column that is summed": (lambda p, x: jnp.tensordot(x[:, :, None], p["w"], 2), {"w": (4, 1)}, [X], {"w": "io"}),
    "two ways that differ in an axis of size 1": (
        lambda p, x: (jnp.tensordot(x[:, :, None], p["w"], 2), x @ p["w"]), {"w": (4, 1)}, [X], {"w": "io"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERING)
def test_kernels_distinguishes_forward_uses_from_others(name: str) -> None:
    apply, shapes, args, roles = DIFFERING[name]
    params = {path: normal(*shape) for path, shape in shapes.items()}
    found = lj.kernels(apply, params, *[normal(*shape) for shape in args])
    assert {path: found[path].axes for path in roles} == roles
    assert all((kernel.axes is None) == bool(kernel.unknown) for kernel in found.values())


@pytest.mark.parametrize("variant", [lj.LoRA, lj.DoRA])
@pytest.mark.parametrize("name", ["a kernel divided by its norm", "a Laplacian through a scan"])
def test_a_model_with_different_uses_matches_merged_kernels(name: str, variant: Any) -> None:
    apply, shapes, args, _ = DIFFERING[name]
    if "norm" in name:  # the norm materializes the adapted kernel
        apply = lambda p, x: x @ p["w"] / lax.stop_gradient(normed(p["w"]))  # noqa: E731
    params = {path: normal(*shape, size=0.5) for path, shape in shapes.items()}
    xs = [normal(*shape, seed=3) for shape in args]
    spec = {"**": variant(rank=1, alpha=2)}
    adapter = lj.init(jax.random.key(0), params, spec, kernels=lj.kernels(apply, params, *xs))
    adapter = jax.tree.map(lambda leaf: leaf + normal(*leaf.shape, size=0.1), adapter)
    assert_law(apply, params, adapter, *xs)


def test_contradictory_uses_are_an_error_that_lists_them() -> None:
    first = lambda w, x: x[:, :5] @ w.T  # noqa: E731
    other = lambda w, x: x[:, 1:] @ w  # noqa: E731
    params, x = {"w": normal(4, 5), "v": normal(5, 5)}, normal(3, 5)

    def apply(p: Any, x: jax.Array) -> Any:
        return first(p["w"], x), other(p["w"], x), first(p["w"], 2 * x), x @ p["v"]

    found = lj.kernels(apply, params, x)  # not an error, because the leaf may stay frozen
    assert (found["w"].axes, found["v"].axes) == (None, "io")
    with pytest.raises(lj.SpecError) as caught:
        lj.init(jax.random.key(0), params, {"*": lj.DoRA(rank=2, alpha=4)}, kernels=found)
    lines = [f"{__file__}:{call.__code__.co_firstlineno}:" for call in (first, other)]
    text = str(caught.value)
    assert text.startswith(
        "Cannot adapt 'w' of shape (4, 5), by the rule '*': the traced model does not determine which of its axes are "
        f"inputs and outputs: its uses disagree\n    'oi' by `dot_general` at {lines[0]}"
    )
    assert f"\n    'io' by `dot_general` at {lines[1]}" in text
    assert text.count("dot_general") == 2
    assert text.endswith("\n  Leave it out of the spec ({'w': None}), or write the axes there: DoRA(..., axes=...).")
    stated = {"w": lj.DoRA(rank=2, alpha=4, axes="io"), "v": lj.DoRA(rank=2, alpha=4)}
    assert lj.init(jax.random.key(0), params, stated, kernels=found)["w"].magnitude.shape == (5,)


def test_a_spectral_norm_of_linen_whose_state_is_an_argument_is_not_guessed() -> None:
    model, x = nn.SpectralNorm(nn.Dense(6)), jnp.ones((4, 8))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, update_stats=False))

    def split_call(params: Any, state: Any, x: jax.Array) -> Any:
        return model.apply({"params": params, "batch_stats": state}, x, update_stats=False)

    joint = lj.kernels(functools.partial(model.apply, update_stats=False), variables, x)
    assert joint["params/layer_instance/kernel"].axes == "io"
    found = lj.kernels(split_call, variables["params"], variables["batch_stats"], x)["layer_instance/kernel"]
    assert found.axes is None
    assert "its uses disagree" in found.unknown


def test_unused_results_give_roles_but_are_not_uses() -> None:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        _ = x @ p["w"]
        return x

    found = lj.kernels(apply, {"w": normal(4, 5)}, normal(*X))["w"]
    assert (found.axes, found.uses) == ("io", ())
