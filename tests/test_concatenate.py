"""Kernels that are concatenated before one product, such as a fused query, key and value, keep their factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from law import adapted, assert_close, assert_law, normal

import lora_jax as lj
from lora_jax.testing import shapes_made


class Fused(NamedTuple):
    """A function of several kernels.

    Attributes:
      call: `call(params, x)`.
      shapes: the shape of each kernel.
      x: the shape of `x`.
      roles: the axes of each kernel; None for a leaf that is not adapted.
    """

    call: Callable[[Any, jax.Array], Any]
    shapes: dict[str, tuple[int, ...]]
    x: tuple[int, ...]
    roles: dict[str, str | None]

    @property
    def params(self) -> dict[str, jax.Array]:
        return {path: normal(*shape, seed=number) for number, (path, shape) in enumerate(self.shapes.items())}

    @property
    def adapter(self) -> Any:
        """An adapter with different ranks and scales."""
        adapter = {}
        for number, (path, roles) in enumerate(self.roles.items()):
            if roles is not None:
                adapter |= adapted(self.params, {path: roles}, rank=1 + number % 2)
        return adapter


QKV = {"q": (4, 6), "k": (4, 2), "v": (4, 3)}
SQUARE = {"q": (4, 4), "k": (4, 4), "v": (4, 4)}
IO = {"q": "io", "k": "io", "v": "io"}
FUSED = {
    "along the output": Fused(lambda p, x: x @ jnp.concatenate([p["q"], p["k"], p["v"]], 1), QKV, (3, 4), IO),
    "along the input": Fused(
        lambda p, x: x @ jnp.concatenate([p["a"], p["b"]]), {"a": (4, 5), "b": (2, 5)}, (3, 6), {"a": "io", "b": "io"}
    ),
    "heads": Fused(
        lambda p, x: jnp.einsum("btd,dhk->bthk", x, jnp.concatenate([p["q"], p["k"]], 1)),
        {"q": (4, 2, 3), "k": (4, 1, 3)},
        (2, 3, 4),
        {"q": "ioo", "k": "ioo"},
    ),
    "along a batch": Fused(
        lambda p, x: jnp.einsum("lbd,ldk->lbk", x, jnp.concatenate([p["a"], p["b"]])),
        {"a": (2, 4, 5), "b": (1, 4, 5)},
        (3, 3, 4),
        {"a": "bio", "b": "bio"},
    ),
    "twice the same": Fused(lambda p, x: x @ jnp.hstack([p["q"], p["q"]]), {"q": (4, 5)}, (3, 4), {"q": "io"}),
    "transposed, then concatenated": Fused(
        lambda p, x: x @ jnp.vstack([p["q"], p["k"]]).T, {"q": (5, 4), "k": (2, 4)}, (3, 4), {"q": "oi", "k": "oi"}
    ),
    "one transposed": Fused(
        lambda p, x: x @ jnp.hstack([p["q"], p["k"].T]), {"q": (4, 4), "k": (4, 4)}, (3, 4), {"q": "io", "k": "oi"}
    ),
    "with a leaf that is not adapted": Fused(
        lambda p, x: x @ jnp.concatenate([p["k"], p["q"], p["v"]], 1), QKV, (3, 4), IO | {"k": None}
    ),
    "with zeros": Fused(
        lambda p, x: x @ jnp.concatenate([jnp.zeros((4, 2)), p["q"], jnp.ones((4, 1))], 1),
        {"q": (4, 4)},
        (3, 4),
        {"q": "io"},
    ),
    "with zeros, along the input": Fused(
        lambda p, x: x @ jnp.concatenate([p["q"], jnp.ones((2, 4))]), {"q": (4, 4)}, (3, 6), {"q": "io"}
    ),
    "concatenated and split again": Fused(
        lambda p, x: [x @ part for part in jnp.split(jnp.hstack([p["q"], p["k"], p["v"]]), (6, 8), 1)], QKV, (3, 4), IO
    ),
    "scaled before": Fused(lambda p, x: x @ jnp.hstack([p["q"] / 2, -p["k"], p["v"] * x[0, 0]]), QKV, (3, 4), IO),
    "scaled after": Fused(lambda p, x: x @ (jnp.hstack([p["q"], p["k"], p["v"]]) / 2), QKV, (3, 4), IO),
    "in a jit, then in another": Fused(
        lambda p, x: jax.jit(lambda w, x: x @ w)(jax.jit(lambda *ws: jnp.hstack(ws))(p["q"], p["k"]), x),
        QKV,
        (3, 4),
        {"q": "io", "k": "io"},
    ),
    "of a loop's constants": Fused(
        lambda p, x: lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ jnp.hstack([p["q"], p["k"]])[:, 2:6]), x),
        SQUARE,
        (3, 4),
        {"q": "io", "k": "io"},
    ),
    "a stack of layers that is scanned": Fused(
        lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.stack([p["q"], p["k"], p["v"]]))[0],
        SQUARE,
        (3, 4),
        IO,
    ),
    "a stack with one that is not adapted": Fused(
        lambda p, x: jnp.einsum("bd,dlk->blk", x, jnp.stack([p["q"], p["k"], p["v"]], 1)),
        SQUARE,
        (3, 4),
        IO | {"k": None},
    ),
    "rolled": Fused(lambda p, x: x @ jnp.roll(p["q"], (1, 2), (0, 1)), {"q": (4, 5)}, (3, 4), {"q": "io"}),
    "a convolution": Fused(
        lambda p, x: lax.conv(x, jnp.concatenate([p["a"], p["b"]]), (1,), "SAME"),
        {"a": (2, 3, 3), "b": (4, 3, 3)},
        (2, 3, 5),
        {"a": "oii", "b": "oii"},
    ),
    "a lookup in two tables": Fused(
        lambda p, x: jnp.concatenate([p["a"], p["b"]])[jnp.argsort(x[0])],
        {"a": (3, 5), "b": (2, 5)},
        (1, 5),
        {"a": "io", "b": "io"},
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_concatenated_kernels_match_concatenated_merged_kernels(name: str) -> None:
    case = FUSED[name]
    assert_law(case.call, case.params, case.adapter, normal(*case.x, seed=9))


@pytest.mark.parametrize("name", FUSED)
def test_kernels_finds_the_roles_of_each_part(name: str) -> None:
    case = FUSED[name]
    found = lj.kernels(case.call, case.params, normal(*case.x))
    for path, roles in case.roles.items():
        assert found[path].axes is not None
        assert roles in (None, found[path].axes)


def test_a_full_leaf_next_to_a_kernel_is_read() -> None:
    case = FUSED["with a leaf that is not adapted"]
    adapter = case.adapter | lj.init(jax.random.key(0), case.params, {"k": lj.Full()})
    assert_law(case.call, case.params, adapter, normal(*case.x, seed=9))
    used = {
        row.path: row.used for row in lj.explain(case.call, case.params, adapter, normal(*case.x), form="factored").rows
    }
    assert used == {"q": "factored dot_general ×1", "v": "factored dot_general ×1", "k": "whole concatenate ×1"}


def test_explain_divides_the_flops_of_one_product_among_leaves() -> None:
    case = FUSED["along the output"]
    rows = lj.explain(case.call, case.params, case.adapter, normal(*case.x), form="factored").rows
    assert [row.used for row in rows] == ["factored dot_general ×1"] * 3
    tokens, d, out, rank = 3, 4, 11, 4
    total = 2 * tokens * rank * (d + out) + tokens * rank + tokens * out
    assert sum(row.flops for row in rows) == total
    assert max(row.flops for row in rows) - min(row.flops for row in rows) <= 1


def test_an_unsupported_use_names_every_leaf() -> None:
    case = FUSED["along the output"]
    model = lambda p, x: x @ jnp.tanh(jnp.hstack([p["q"], p["k"], p["v"]]))  # noqa: E731
    with pytest.raises(lj.UnsupportedError) as error:
        lj.lora(model)(case.params, case.adapter, normal(*case.x))
    text = str(error.value)
    assert text.startswith("Cannot apply LoRA to 'q' and 'k' and 'v': the model passes it to `tanh`")
    assert text.endswith("or materialize it there: lora(apply, materialize=['q', 'k', 'v']).")
    with pytest.raises(lj.UnsupportedError):  # materializing it needs permission for every leaf
        lj.lora(model, materialize=["q", "v"])(case.params, case.adapter, normal(*case.x))
    assert_law(model, case.params, case.adapter, normal(*case.x, seed=9), materialize=["q", "k", "v"])


def test_equal_scales_are_kept_and_different_scales_join_a_factor() -> None:
    def primitives(*alphas: float) -> list[str]:
        params = {"q": normal(4, 6), "k": normal(4, 2)}
        spec = {path: lj.LoRA(rank=2, alpha=alpha) for path, alpha in zip(params, alphas, strict=True)}
        adapter = lj.init(jax.random.key(0), params, spec)
        model = lambda p, x: x @ jnp.hstack([p["q"], p["k"]])  # noqa: E731
        assert_law(model, params, adapter, normal(3, 4, seed=9))
        return [
            eqn.primitive.name
            for eqn in jax.make_jaxpr(lj.lora(model, form="factored"))(params, adapter, normal(3, 4)).eqns
        ]

    assert primitives(2, 2).count("mul") == 1
    assert primitives(2, 3).count("mul") == 3


def test_only_the_base_has_the_shape_of_the_fused_kernel() -> None:
    params, x = {"q": normal(40, 30), "k": normal(40, 20)}, normal(3, 40)
    adapter = adapted(params, {"q": "io", "k": "io"})
    fused = lambda p, x: x @ jnp.hstack([p["q"], p["k"]])  # noqa: E731
    shapes = shapes_made(jax.grad(lambda ad: lj.lora(fused)(params, ad, x).sum()), adapter)
    assert not shapes & {(40, 30), (40, 20)}
    jaxpr = jax.make_jaxpr(lj.lora(fused))(params, adapter, x)
    assert [eqn.primitive.name for eqn in jaxpr.eqns if eqn.outvars[0].aval.shape == (40, 50)] == ["concatenate"]


PIECES = {
    "rolled along the output": lambda w: jnp.roll(w, 1, 1),
    "rolled along the input": lambda w: jnp.roll(w, 1, 0),
    "halves exchanged, and one negated": lambda w: jnp.concatenate([-w[:, 3:], w[:, :3]], 1),
    "parts exchanged, with zeros between": lambda w: jnp.concatenate([w[2:], jnp.zeros((1, 6)), w[:2]])[:4],
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces_of_one_kernel_can_be_concatenated(name: str) -> None:
    params = {"w": normal(4, 6)}
    adapter = adapted(params, {"w": "io"})
    model = lambda params, x: x @ PIECES[name](params["w"])  # noqa: E731
    assert_law(model, params, adapter, normal(3, 4, seed=9))


@pytest.mark.parametrize("name", ["along the output", "along a batch", "a stack of layers that is scanned"])
def test_concatenation_works_outside_jit_and_under_vmap(name: str) -> None:
    case = FUSED[name]
    xs = normal(2, *case.x, seed=9)
    run = lambda x: lj.lora(case.call)(case.params, case.adapter, x)  # noqa: E731
    merged = lj.merge(case.params, case.adapter)
    assert_close(run(xs[0]), case.call(merged, xs[0]))
    assert_close(jax.vmap(run)(xs), jax.vmap(lambda x: case.call(merged, x))(xs))


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")], ids=str)
def test_kernels_may_have_factors_of_different_dtypes(dtypes: tuple[str, str]) -> None:
    case = FUSED["along the output"]
    adapter = {
        path: jax.tree.map(lambda leaf, to=to: leaf.astype(to), part)
        for (path, part), to in zip(case.adapter.items(), (*dtypes, "float32"), strict=True)
    }
    assert_law(case.call, case.params, adapter, normal(*case.x, seed=9), dtype="bfloat16")


# Layers of Flax that fuse their gates


def test_the_fused_lstm_of_linen_matches_merged_kernels() -> None:
    cell = nn.OptimizedLSTMCell(6)
    x = normal(3, 5, 4)
    model = nn.RNN(cell)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    found = lj.kernels(model.apply, variables, x)
    roles = {path: kernel.axes for path, kernel in found.items() if path.endswith("/kernel")}
    assert len(roles) == 8
    assert set(roles.values()) == {"io"}
    assert_law(model.apply, variables, adapted(variables, roles), x)
    some = {path: roles[path] for path in list(roles)[::3]}
    assert_law(model.apply, variables, adapted(variables, some), x)


def test_the_fused_lstm_of_nnx_matches_merged_kernels() -> None:
    cell = nnx.OptimizedLSTMCell(4, 6, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.RNN(cell))
    x = normal(3, 5, 4)
    apply = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    found = lj.kernels(apply, state, x)
    roles = {path: kernel.axes for path, kernel in found.items() if path.endswith("kernel")}
    assert set(roles.values()) == {"io"}
    assert_law(apply, state, adapted(state, roles), x)
