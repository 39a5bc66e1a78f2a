"""Bases that are not arrays: a leaf in a packed format is dequantized in each use, and the result is not kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluate import without_compiling
from helpers import FORWARD, GRADIENT, assert_close, bits, sweep
from law import Case, normal, total
from uses import USES

import lora_jax as lj
from lora_jax._core.stored import StoredLeaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Split(StoredLeaf):
    """A float32 array stored as two integer arrays; their weighted sum is the array, rounded to 2⁻¹⁶."""

    high: Any
    low: Any

    @classmethod
    def of(cls, w: Any) -> Split:
        codes = jnp.round(w * 2**16).astype(jnp.int32)
        return cls(codes >> 8, codes & 255)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.high.shape)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(jnp.float32)

    @property
    def sliceable(self) -> bool:
        return True

    def dequantize(self) -> jax.Array:
        return (self.high * 256 + self.low).astype(jnp.float32) / 2**16


def pack(tree: Any, *paths: str) -> Any:
    """Packs the named leaves of a tree, or all leaves."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: Split.of(leaf) if not paths or keys[-1].key in paths else leaf, tree
    )


def dense(tree: Any) -> Any:
    """Dequantizes all leaves of a tree."""
    is_packed = lambda leaf: isinstance(leaf, Split)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_packed(leaf) else leaf, tree, is_leaf=is_packed)


def random_adapter(params: Any, spec: Any, kernels: Any = None) -> Any:
    adapter = lj.init(jax.random.key(0), params, spec, kernels=kernels)
    leaves, treedef = jax.tree.flatten(adapter)
    return treedef.unflatten([normal(*leaf.shape, seed=100 + at, size=0.2) for at, leaf in enumerate(leaves)])


def assert_packed_law(apply: Callable[..., Any], params: Any, adapter: Any, *args: Any) -> None:
    """Compares result and gradient on a packed base with merged kernels of the dequantized base."""

    def gradient(run: Callable[[Any], Any], adapter: Any) -> Any:
        def loss(adapter: Any) -> Any:
            out = run(adapter)
            return total(out), out

        return jax.grad(loss, has_aux=True)(adapter)

    def both(adapter: Any, params: Any) -> Any:
        base = dense(params)
        return (
            gradient(lambda adapter: lj.lora(apply)(params, adapter, *args), adapter),
            gradient(lambda adapter: apply(lj.merge(base, adapter), *args), adapter),
        )

    (got, out), (expected_gradient, expected) = without_compiling(both)(adapter, params)
    assert_close(out, expected, FORWARD)
    assert_close(got, expected_gradient, GRADIENT)


def residuals(apply: Callable[..., Any], params: Any, adapter: Any, *args: Any) -> list[Any]:
    """The arrays that the forward pass saves for the gradient of the adapter."""
    _, backward = jax.vjp(lambda adapter: total(lj.lora(apply)(params, adapter, *args)), adapter)
    return jax.tree.leaves(backward)


def is_dense(array: Any, shape: tuple[int, ...]) -> bool:
    return array.dtype == jnp.float32 and sorted(s for s in array.shape if s > 1) == sorted(s for s in shape if s > 1)


@pytest.mark.parametrize("variant", [sweep(lj.LoRA), lj.DoRA])
@pytest.mark.parametrize("use", USES)
def test_uses_of_a_packed_kernel_match_the_dequantized_array(use: str, variant: Any) -> None:
    case = USES[use]
    params = pack(case.params)
    adapter = random_adapter(params, {"w": variant(rank=2, alpha=3, axes=case.axes or case.roles)})
    assert_packed_law(case.apply, params, adapter, *case.arrays)


@pytest.mark.parametrize("use", USES)
def test_roles_of_a_packed_kernel_match_the_dequantized_array(use: str) -> None:
    case = USES[use]
    found, expected = (lj.kernels(case.apply, params, *case.arrays)["w"] for params in (pack(case.params), case.params))
    assert (found.axes, found.shape, found.dtype) == (expected.axes, expected.shape, expected.dtype)


@pytest.mark.parametrize("use", USES)
def test_a_packed_leaf_that_is_not_adapted_is_dequantized(use: str) -> None:
    case = USES[use]
    params = {"w": Split.of(case.params["w"]), "other": jnp.ones(())}
    adapter = {"other": lj.Adapter(lj.Full(), "", value=jnp.float32(2))}
    run = lambda params, *args: (case.call(params["w"], *args), params["other"])  # noqa: E731
    got = jax.jit(lj.lora(run))(params, adapter, *case.arrays)
    expected = jax.jit(run)(dense(params) | {"other": jnp.float32(2)}, *case.arrays)
    assert_close(got, expected)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(12, name="down")(nn.gelu(nn.Dense(20, name="up")(x))), None


class Model(nn.Module):
    """A decoder with a tied head and layers that are scanned with remat, or unrolled."""

    scanned: bool

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        table = nn.Embed(17, 12, name="embed")
        x = table(tokens)
        if self.scanned:
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
            x = nn.scan(nn.remat(Block), **axes)(name="layers")(x, None)[0]
        else:
            for layer in range(2):
                x = Block(name=f"layer_{layer}")(x, None)[0]
        return table.attend(x)


def model(*, scanned: bool) -> tuple[Callable[..., Any], Any, jax.Array]:
    tokens = jnp.arange(10).reshape(2, 5)
    net = Model(scanned)
    params = jax.jit(net.init)(jax.random.key(0), tokens)["params"]
    return lambda params, tokens: net.apply({"params": params}, tokens), params, tokens


@pytest.mark.parametrize("adapted", ["**/{kernel,embedding}", sweep("**/query/kernel")])
@pytest.mark.parametrize("scanned", [False, True])
def test_a_model_with_packed_kernels_matches_merged_kernels(scanned: bool, adapted: str) -> None:
    apply, plain, tokens = model(scanned=scanned)
    params = pack(plain, "kernel", "embedding")
    kernels = lj.kernels(apply, params, tokens)
    adapter = random_adapter(params, {adapted: lj.LoRA(rank=2, alpha=3)}, kernels)
    assert_packed_law(apply, params, adapter, tokens)


@pytest.mark.parametrize("scanned", [False, True])
def test_no_dense_kernel_is_saved_for_the_backward_pass(scanned: bool) -> None:
    apply, plain, tokens = model(scanned=scanned)
    params = pack(plain, "kernel", "embedding")
    adapter = random_adapter(params, {"**/kernel": lj.LoRA(rank=2, alpha=3)}, lj.kernels(apply, params, tokens))
    shapes = {
        leaf.shape
        for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Split))
        if isinstance(leaf, Split)
    }
    kept = residuals(apply, params, adapter, tokens)
    assert not [array.shape for array in kept if any(is_dense(array, shape) for shape in shapes)]
    of_arrays = residuals(apply, dense(params), adapter, tokens)
    assert [array.shape for array in of_arrays if any(is_dense(array, shape) for shape in shapes)]


def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
    return jnp.tanh(x @ w.astype(jnp.float16).astype(x.dtype).T), None


AGAIN = {
    "a loop": Case(lambda w, x: jax.lax.scan(layer, x, w)[0], (3, 4, 4), [(5, 4)], "boi"),
    "a cast loop": Case(lambda w, x: jax.lax.scan(layer, x, 2 * w.astype(jnp.float32))[0], (3, 4, 4), [(5, 4)], "boi"),
    **{name: USES[name] for name in ("transposed, scaled, reversed", "one expert per token")},
}


def loop(w: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


LOOPS = {
    "transposed": Case(lambda w, x: loop(w.transpose(0, 2, 1), x), (3, 4, 4), [(5, 4)], "boi"),
    "reshaped": Case(lambda w, x: loop(w.reshape(4, 4, 4), x), (2, 2, 4, 4), [(5, 4)], "bbio"),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_over_a_packed_kernel_that_was_moved_matches_the_dequantized_array(name: str) -> None:
    case = LOOPS[name]
    params = pack(case.params)
    adapter = random_adapter(params, {"w": lj.LoRA(rank=2, alpha=3, axes=case.roles)})
    assert_packed_law(case.apply, params, adapter, *case.arrays)


@pytest.mark.parametrize("use", AGAIN)
def test_a_second_call_outside_jit_compiles_nothing(use: str, caplog: pytest.LogCaptureFixture) -> None:
    case = AGAIN[use]
    params = pack(case.params)
    adapter = random_adapter(params, {"w": lj.LoRA(rank=2, alpha=3, axes=case.roles)})
    run = lj.lora(case.apply)
    first = run(params, adapter, *case.arrays)
    with jax.log_compiles():
        again = run(params, adapter, *case.arrays)
    assert bits(again) == bits(first)
    assert not [record for record in caplog.records if "Compiling" in record.message]


def test_explain_shows_a_packed_kernel_like_a_dense_one() -> None:
    apply, plain, tokens = model(scanned=False)
    params = pack(plain, "kernel")
    adapter = random_adapter(plain, {"**/query/kernel": lj.LoRA(rank=2, alpha=3)}, lj.kernels(apply, plain, tokens))
    found, expected = (lj.explain(apply, base, adapter, tokens, form="factored") for base in (params, plain))
    assert str(found) == str(expected)


def test_concatenated_kernels_stay_packed() -> None:
    params = {name: normal(6, 4, seed=at) for at, name in enumerate("qkv")}
    apply = lambda p, x: jnp.tanh(x @ jnp.concatenate([p["q"], p["k"], p["v"]], 1))  # noqa: E731
    x = normal(3, 6, seed=9)
    packed = pack(params, "q", "v")
    adapter = random_adapter(packed, {"{q,v}": lj.LoRA(rank=2, alpha=3)})
    assert_packed_law(apply, packed, adapter, x)
    assert not [array for array in residuals(apply, packed, adapter, x) if is_dense(array, (6, 12))]


def test_a_product_of_two_packed_kernels_matches_dense_ones() -> None:
    params = {"one": normal(6, 5), "other": normal(5, 4, seed=1)}
    apply = lambda p, x: x @ (p["one"] @ p["other"])  # noqa: E731
    packed = pack(params)
    adapter = random_adapter(packed, {"*": lj.LoRA(rank=2, alpha=3)})
    assert_packed_law(apply, packed, adapter, normal(3, 6, seed=2))


def test_a_packed_leaf_is_one_leaf_of_the_tree() -> None:
    params = {"dense": {"kernel": Split.of(normal(6, 4)), "bias": jnp.ones(4)}}
    adapter = lj.init(jax.random.key(0), params, {"**/kernel": lj.LoRA(rank=2, alpha=3), "**/bias": lj.Full()})
    assert list(adapter) == ["dense/bias", "dense/kernel"]
    assert np.all(adapter["dense/kernel"].a.shape == np.array((6, 2)))
