"""One leaf that a model uses several times, transposed, cut, scaled, looked up: one adapter, gradients of every use."""

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
    "with both signs, side by side": Case(lambda w, x: jax.nn.relu(x @ jnp.hstack([w, -w])), (4, 5), [X], "io"),
    "both ways round": Case(lambda w, x: x @ w + x @ jnp.flip(w), (4, 5), [X], "io"),
    "embedding and head": Case(lambda w, ids: jnp.tanh(w[ids]) @ w.T, (6, 5), [IDS], "io"),
    "embedding times a root, and head": Case(
        lambda w, ids: jnp.tanh((w * jnp.sqrt(5.0))[ids]) @ w.T, (6, 5), [IDS], "io"
    ),
    "embedding and part of the head": Case(lambda w, ids: jnp.tanh(w[ids]) @ w[2:4].T, (6, 5), [IDS], "io"),
    "embedding and the head's rows that are asked for": Case(
        lambda w, ids: jnp.einsum("btd,btd->bt", jnp.tanh(w[ids]), w[ids[:, ::-1]]), (6, 5), [IDS], "io"
    ),
    "one layer again and again": Case(
        lambda w, x: lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w / 2), x), (4, 4), [X], "io"
    ),
    "first and last layer of a stack": Case(lambda w, x: jnp.tanh(x @ w[0]) @ w[-1].T, (3, 4, 5), [X], "bio"),
    "one of a fused kernel, and all of it": Case(
        lambda w, x: (x @ w[:, :2], x @ w, x @ w.reshape(4, 3, 2)[:, 1]), (4, 6), [X], "io"
    ),
    "with its own product": Case(lambda w, x: x @ (w @ w.T) + x, (4, 5), [X], "oi", "io"),
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
def test_every_use_is_that_of_the_formed_kernel(name: str) -> None:
    assert_case(TIED[name])


@pytest.mark.parametrize("name", TIED)
def test_kernels_takes_the_roles_of_the_first_use(name: str) -> None:
    case = TIED[name]
    assert case.roles in (None, lj.kernels(case.apply, case.params, *case.arrays)["w"].axes)


@pytest.mark.parametrize(
    "name", ["there and back", "embedding times a root, and head", "with both signs, side by side"]
)
def test_it_holds_outside_jit_and_under_vmap(name: str) -> None:
    case = TIED[name]
    (x,) = case.arrays
    run = functools.partial(lj.lora(case.apply), case.params, case.adapter)
    expected = case.apply(lj.merge(case.params, case.adapter), x)
    assert_close(run(x), expected)
    assert_close(jax.vmap(run)(x), expected)


def test_no_use_of_a_tied_embedding_forms_it() -> None:
    params = {"w": normal(70, 50)}
    adapter = adapted(params, {"w": "io"})
    model = lj.lora(lambda params, ids: jnp.tanh(params["w"][ids]) @ params["w"].T)
    made = shapes_made(jax.grad(lambda ad: model(params, ad, jnp.array([1, 2, 3])).sum()), adapter)
    assert not made & {(70, 50)}


def test_two_names_for_one_array_have_an_adapter_each() -> None:
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


def test_a_tied_embedding_of_linen() -> None:
    ids = jnp.array(IDS)
    variables = Tied().init(jax.random.key(0), ids)
    roles = {"params/Embed_0/embedding": "io", "params/Dense_0/kernel": "io"}
    found = lj.kernels(Tied().apply, variables, ids)
    assert {path: found[path].axes for path in roles} == roles
    assert_law(Tied().apply, variables, adapted(variables, roles), ids)


def test_a_layer_of_nnx_that_two_places_share() -> None:
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
