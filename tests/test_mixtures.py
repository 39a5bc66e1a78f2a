"""Mixtures: several adapters as one, weighted at each token by a router, by the caller, or equally for all tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluate import without_compiling
from helpers import GRADIENT, assert_close, assert_few_ulp, bits, trained
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from law import normal, total

import lora_jax as lj
from lora_jax import many, testing

NAMES = ("code", "math", "chat")
X = normal(3, 5, 4, seed=1)
PARAMS = {"w": normal(4, 6)}


def linear(params: Any, x: Any) -> Any:
    return x @ params["w"]


def expert(seed: int, params: Any = PARAMS, axes: str = "io", **variant: Any) -> dict[str, lj.Adapter]:
    spec = {"**": lj.LoRA(**({"rank": 2, "alpha": 3} | variant), axes=axes)}
    shapes = jax.eval_shape(lambda key: lj.init(key, params, spec), jax.random.key(0))
    return trained(jax.random.key(seed), shapes)


def three(params: Any = PARAMS, axes: str = "io") -> dict[str, Any]:
    """Experts of other ranks and scales."""
    settings = [dict(rank=2, alpha=3), dict(rank=1, alpha=2), dict(rank=2, alpha=-1)]
    return {
        name: expert(seed, params, axes, **one) for seed, (name, one) in enumerate(zip(NAMES, settings, strict=True))
    }


EXPERTS = three()


def with_gate(adapter: Any, seed: int = 9) -> Any:
    """The mixture with a random gate at each path."""
    return {
        path: lj.Adapter(part.variant, part.axes, **part.arrays | {"gate": normal(*part.gate.shape, seed=seed + at)})
        for at, (path, part) in enumerate(sorted(adapter.items()))
    }


def deltas(experts: Mapping[str, Any] = EXPERTS, path: str = "w") -> np.ndarray[Any, Any]:
    """The dense update of each expert, (experts, in, out), for kernels with the axes `io`."""
    return np.stack(
        [ad[path].variant.scale * np.asarray(ad[path].a) @ np.asarray(ad[path].b) for ad in experts.values()]
    )


def mixed_by_hand(x: Any, w: Any, weights: Any, updates: Any) -> Any:
    return x @ w + jnp.einsum("...e,...d,edf->...f", weights, x, updates)


def softmax_of_top(logits: Any, top_k: int) -> Any:
    weights = np.zeros_like(logits)
    for at in np.ndindex(logits.shape[:-1]):
        chosen = np.argsort(-logits[at], kind="stable")[:top_k]
        exponentials = np.exp(logits[at][chosen] - logits[at][chosen].max())
        weights[at][chosen] = exponentials / exponentials.sum()
    return weights


# Laws


@pytest.mark.parametrize("name", NAMES)
def test_one_hot_weights_select_one_expert(name: str) -> None:
    mixed, one_hot = many.mixture(EXPERTS, many.Given()), np.eye(3, dtype=np.float32)[NAMES.index(name)]
    weights = np.broadcast_to(one_hot, (3, 5, 3))
    got = lj.lora(linear)(PARAMS, mixed, X, token_weights=weights)
    assert_close(got, lj.lora(linear, form="factored")(PARAMS, EXPERTS[name], X))


def test_each_token_has_its_own_expert() -> None:
    which = np.arange(15).reshape(3, 5) % 3
    got = lj.lora(linear)(PARAMS, many.mixture(EXPERTS, many.Given()), X, token_weights=np.eye(3, dtype=bool)[which])
    each = np.stack([lj.lora(linear)(PARAMS, adapter, X) for adapter in EXPERTS.values()])
    assert_close(got, jnp.asarray(np.take_along_axis(each, which[None, ..., None], 0)[0]))


def test_constant_weights_are_the_merged_sum_of_updates() -> None:
    weights = {"code": 0.5, "math": -2.0, "chat": 0.25}
    mixed = many.mixture(EXPERTS, many.Constant(), weights=weights)
    merged = PARAMS["w"] + np.einsum("e,edf->df", [*weights.values()], deltas())
    assert_close(lj.merge(PARAMS, mixed)["w"], jnp.asarray(merged, jnp.float32))
    assert_close(lj.lora(linear)(PARAMS, mixed, X), X @ jnp.asarray(merged, jnp.float32))
    restored = lj.unmerge(lj.merge(PARAMS, mixed), mixed, base=PARAMS)
    assert_close(restored, PARAMS)
    equal = many.mixture(EXPERTS, many.Constant())
    np.testing.assert_allclose(equal["w"].weights, 1 / 3, rtol=1e-6)


def test_experts_with_an_alpha_of_zero_add_nothing() -> None:
    # Was the sum of the products of their factors, with the scale 1.
    spec, key = {"w": lj.LoRA(rank=2, alpha=0)}, jax.random.key(0)
    experts = {name: trained(key, lj.init(key, PARAMS, spec)) for name in ("one", "other")}
    weights = np.ones((3, 5, 2), np.float32)
    got = lj.lora(linear)(PARAMS, many.mixture(experts, many.Given()), X, token_weights=weights)
    assert_close(got, linear(PARAMS, X))


def test_constant_weights_are_trained_and_replaced_without_compiling() -> None:
    mixed = many.mixture(EXPERTS, many.Constant())
    gradient = jax.grad(lambda ad: jnp.sum(lj.lora(linear)(PARAMS, ad, X)))(mixed)["w"]
    assert_close(gradient.weights, jnp.einsum("btd,edf->e", X, jnp.asarray(deltas())), GRADIENT)
    assert not gradient.a.any()
    assert not gradient.b.any()
    run = jax.jit(lj.lora(linear))
    run(PARAMS, mixed, X)
    run(PARAMS, jax.tree.map(lambda array: 2 * array, mixed), X)
    assert run._cache_size() == 1


def test_alora_is_a_mixture_of_one_expert_with_booleans() -> None:
    active = np.array([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]], bool)
    part = EXPERTS["code"]["w"]
    alora = {"w": lj.Adapter(lj.ALoRA(rank=2, alpha=3, invocation=(7,)), "io", **part.arrays)}
    one = many.mixture({"code": EXPERTS["code"]}, many.Given(), train_experts=True)

    def gradient(adapter: Any, weights: Any) -> Any:
        def loss(adapter: Any) -> Any:
            out = lj.lora(linear)(PARAMS, adapter, X, token_weights=weights)
            return total(out), out

        return jax.grad(loss, has_aux=True)(adapter)

    got, expected = gradient(one, active[..., None]), gradient(alora, active)
    assert bits(got[1]) == bits(expected[1])
    assert bits(got[0]["w"].arrays) == bits(expected[0]["w"].arrays)


# Routers against their closed forms


def check_router(router: Any, weights: Any, gate: Any = None, x: Any = X) -> None:
    mixed = with_gate(many.mixture(EXPERTS, router))
    assert_close(lj.lora(linear)(PARAMS, mixed, x), jnp.asarray(mixed_by_hand(x, PARAMS["w"], weights, deltas())))


def logits() -> np.ndarray[Any, Any]:
    return np.asarray(X, np.float64) @ np.asarray(with_gate(many.mixture(EXPERTS, many.Gate()))["w"].gate, np.float64)


@pytest.mark.parametrize("top_k", [None, 1, 2, 3])
def test_a_gate_is_a_softmax_over_the_largest_logits(top_k: int | None) -> None:
    check_router(many.Gate(top_k=top_k, temperature=0.5), softmax_of_top(logits() / 0.5, top_k or 3))


def test_a_gate_that_is_not_renormalized_keeps_the_probabilities() -> None:
    probabilities = softmax_of_top(logits(), 3)
    kept = softmax_of_top(logits(), 1) > 0
    check_router(many.Gate(top_k=1, renormalize=False), probabilities * kept)


def test_a_sigmoid_gate() -> None:
    check_router(many.SigmoidGate(), 1 / (1 + np.exp(-logits())))


def test_the_first_of_equal_logits_are_chosen() -> None:
    mixed = many.mixture(EXPERTS, many.Gate(top_k=2))  # the gate is zero
    expected = mixed_by_hand(X, PARAMS["w"], np.broadcast_to([0.5, 0.5, 0], (3, 5, 3)), deltas())
    assert_close(lj.lora(linear)(PARAMS, mixed, X), expected)


def test_phatgoose_trains_one_gate_per_expert_and_routes_by_all() -> None:
    gates = [normal(4, 1, seed=20 + at) + 3.0 for at in range(3)]
    gated = {}
    for gate, (name, adapter) in zip(gates, EXPERTS.items(), strict=True):
        part = many.mixture({name: adapter}, many.SigmoidGate())["w"]
        gated[name] = {"w": lj.Adapter(part.variant, part.axes, **part.arrays | {"gate": gate})}
        one = np.asarray(1 / (1 + np.exp(-np.asarray(X) @ np.asarray(gate))))
        expected = mixed_by_hand(X, PARAMS["w"], one, deltas({name: adapter}))
        assert_close(lj.lora(linear)(PARAMS, gated[name], X), expected)
        gradient = jax.grad(lambda ad: total(lj.lora(linear)(PARAMS, ad, X)))(gated[name])["w"]
        assert not gradient.a.any()
        assert gradient.gate.any()
    standard = lambda v, axis: (v - v.mean(axis, keepdims=True)) / v.std(axis, keepdims=True)  # noqa: E731
    x, v = np.asarray(X, np.float64), np.concatenate(gates, 1).astype(np.float64)
    weights = softmax_of_top(standard(x, -1) @ standard(v, 0) / np.sqrt(4), 2)
    mixed = many.mixture(gated, many.PHATGOOSE(top_k=2))
    assert_close(lj.lora(linear)(PARAMS, mixed, X), jnp.asarray(mixed_by_hand(X, PARAMS["w"], weights, deltas())))


def arrow_weights(updates: Any, top_k: int, temperature: float) -> Any:
    prototypes = np.linalg.svd(updates.astype(np.float64))[0][:, :, 0]  # (experts, in)
    return softmax_of_top(np.abs(np.asarray(X, np.float64) @ prototypes.T) / temperature, top_k)


@pytest.mark.parametrize("top_k", [1, 2])
def test_arrow_routes_by_the_first_singular_vectors(top_k: int) -> None:
    mixed = many.mixture(EXPERTS, many.Arrow(top_k=top_k, temperature=0.3))
    expected = mixed_by_hand(X, PARAMS["w"], arrow_weights(deltas(), top_k, 0.3), deltas())
    assert_close(lj.lora(linear)(PARAMS, mixed, X), jnp.asarray(expected))
    gradient = jax.grad(lambda ad: total(lj.lora(linear)(PARAMS, ad, X)))(mixed)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_arrow_subtracts_the_mean_update_of_general_adapters() -> None:
    general = {"one": expert(5), "two": expert(6, rank=1, alpha=4)}
    mixed = many.mixture(EXPERTS, many.Arrow(top_k=2), general=general)
    updates = deltas() - deltas(general).mean(0)
    expected = mixed_by_hand(X, PARAMS["w"], arrow_weights(updates, 2, 1.0), updates)
    assert_close(lj.lora(linear)(PARAMS, mixed, X), jnp.asarray(expected, jnp.float32))
    assert mixed["w"].variant.ranks == (2, 1, 2, 2, 1)


def test_a_leaf_that_only_general_adapters_have_is_subtracted() -> None:
    params = {"w": PARAMS["w"], "v": normal(6, 5, seed=3)}
    apply = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    general = expert(4, params)
    mixed = many.mixture({name: {"w": ad["w"]} for name, ad in EXPERTS.items()}, many.Arrow(), general={"g": general})
    v = lj.merge(params, many.combine({"g": ({"v": general["v"]}, -1.0)}, "concat"))["v"]
    expected = lj.lora(apply)({"w": params["w"], "v": v}, {"w": mixed["w"]}, X)
    assert_close(lj.lora(apply)(params, mixed, X), expected)


def test_an_expert_without_a_leaf_adds_nothing_there() -> None:
    params = {"w": PARAMS["w"], "v": normal(6, 5, seed=3)}
    apply = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    both, only_w = expert(0, params), {"w": expert(1, params)["w"]}
    weights = np.full((3, 5, 2), 0.5, np.float32)
    mixed = many.mixture({"both": both, "only_w": only_w}, many.Given())
    assert mixed["v"].variant.ranks == (2, 0)
    constant = many.mixture({"both": both, "only_w": only_w}, many.Constant())
    got = lj.lora(apply)(params, mixed, X, token_weights=weights)
    assert_close(got, apply(lj.merge(params, constant), X))
    arrow = many.mixture({"both": both, "only_w": only_w}, many.Arrow(top_k=1))
    assert not arrow["v"].gate[:, 1].any()


# Gradients


def test_gradients_match_a_dense_reference() -> None:
    mixed = with_gate(many.mixture(EXPERTS, many.Gate(top_k=2), train_experts=True))
    starts, scales = np.cumsum([0, *mixed["w"].variant.ranks]), mixed["w"].variant.scales

    def by_hand(adapter: Any, x: Any) -> Any:
        part = adapter["w"]
        logits = x @ part.gate
        chosen = jnp.argsort(-logits, axis=-1).argsort(-1) < 2
        exponentials = jnp.where(chosen, jnp.exp(logits), 0)
        weights = exponentials / exponentials.sum(-1, keepdims=True)
        updates = jnp.stack(
            [
                s * part.a[:, first:last] @ part.b[first:last]
                for s, first, last in zip(scales, starts, starts[1:], strict=False)
            ]
        )
        return mixed_by_hand(x, PARAMS["w"], weights, updates)

    def gradients(function: Any) -> Any:
        return jax.jit(jax.grad(lambda ad, x: total(function(ad, x)), (0, 1)))(mixed, X)

    got = gradients(lambda ad, x: lj.lora(linear)(PARAMS, ad, x))
    assert_close(got, gradients(by_hand), GRADIENT)
    assert all(leaf.any() for leaf in jax.tree.leaves(got))


def test_weights_from_the_caller_have_a_gradient_also_where_they_are_zero() -> None:
    mixed, weights = many.mixture(EXPERTS, many.Given()), jnp.zeros((3, 5, 3))

    def gradient(function: Any) -> Any:
        return jax.grad(lambda weights: total(function(weights)))(weights)

    got = gradient(lambda weights: lj.lora(linear)(PARAMS, mixed, X, token_weights=weights))
    expected = gradient(lambda weights: mixed_by_hand(X, PARAMS["w"], weights, jnp.asarray(deltas())))
    assert_close(got, expected, GRADIENT)
    assert float(jnp.abs(got).min()) > 0


def test_only_the_gate_is_trained_and_has_optimizer_state() -> None:
    mixed = many.mixture(EXPERTS, many.Gate(), key=jax.random.key(0))
    tx = optax.masked(optax.adamw(0.1, weight_decay=0.5), lj.optim.select("gate"))
    state = tx.init(mixed)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * mixed["w"].gate.size + 1
    gradient = jax.grad(lambda ad: total(lj.lora(linear)(PARAMS, ad, X)))(mixed)
    updates, _ = tx.update(gradient, state, mixed)
    new = optax.apply_updates(mixed, updates)
    assert bits((new["w"].a, new["w"].b)) == bits((mixed["w"].a, mixed["w"].b))
    assert (new["w"].gate != mixed["w"].gate).all()


def test_the_gradient_of_the_load_balancing_term_is_added() -> None:
    balanced = with_gate(many.mixture(EXPERTS, many.Gate(top_k=1, renormalize=False, balance=0.3)))
    plain = many.Gate(top_k=1, renormalize=False)
    unbalanced = {"w": dataclasses.replace(balanced["w"].variant, router=plain)}
    unbalanced = {"w": lj.Adapter(unbalanced["w"], "io", **balanced["w"].arrays)}

    def term(adapter: Any) -> Any:
        probabilities = jax.nn.softmax(X @ adapter["w"].gate)
        return many.load_balance(probabilities, probabilities == probabilities.max(-1, keepdims=True))

    def loss(adapter: Any) -> Any:
        return total(lj.lora(linear)(PARAMS, adapter, X))

    got = jax.value_and_grad(loss)(balanced)
    expected = jax.grad(lambda adapter: loss(adapter) + 0.3 * term(adapter))(unbalanced)
    assert_close(got[1]["w"].gate, expected["w"].gate, GRADIENT)
    assert_close(got[0], loss(unbalanced))
    probabilities = np.asarray(jax.nn.softmax(X @ balanced["w"].gate)).reshape(15, 3)
    share = np.bincount(probabilities.argmax(1), minlength=3) / 15
    np.testing.assert_allclose(term(balanced), 3 * (share * probabilities.mean(0)).sum(), rtol=1e-5)


# Kernels of any axes, moved through a model


def contracted(w: Any, x: Any) -> Any:
    return jnp.einsum("htk,hkd->td", x, w)


def layers(w: Any, x: Any) -> Any:
    return lax.scan(jax.checkpoint(lambda x, layer: (jnp.tanh(x @ layer), None)), x, w)[0]


def convolution(w: Any, x: Any) -> Any:
    return lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


USES: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...], str]] = {
    "a query": (lambda w, x: jnp.einsum("td,dhk->htk", x, w), (4, 2, 3), (5, 4), "ioo"),
    "the output of attention": (contracted, (2, 3, 4), (2, 5, 3), "iio"),
    "experts of the model": (lambda w, x: jnp.einsum("etd,edf->etf", x, w), (2, 4, 5), (2, 3, 4), "bio"),
    "a convolution": (convolution, (3, 2, 4, 6), (2, 5, 6, 4), "iiio"),
    "a transposed, reversed kernel": (lambda w, x: w[:, ::-1].T @ x, (4, 6), (4, 3), "io"),
    "one layer of a stack": (lambda w, x: x @ w[1], (3, 4, 5), (6, 4), "bio"),
    "an expert per token": (
        lambda w, x: jnp.einsum("td,tdf->tf", x, w[jnp.array([1, 0, 1])]),
        (2, 4, 5),
        (3, 4),
        "bio",
    ),
    "a mapped kernel": (jax.vmap(lambda w, x: x @ w, (None, 0)), (4, 5), (2, 3, 4), "io"),
}


@pytest.mark.parametrize("name", USES)
def test_a_gate_follows_its_kernel(name: str) -> None:
    """In the oracle, the logits are the result of the same call with the gate in place of the kernel's outputs."""
    call, shape, x_shape, axes = USES[name]
    params, x = {"w": normal(*shape, size=0.5)}, normal(*x_shape, seed=1)
    outputs = [at for at, role in enumerate(axes) if role == "o"]
    experts = {name: expert(at, params, axes) for at, name in enumerate(NAMES)}
    mixed = with_gate(many.mixture(experts, many.SigmoidGate(), train_experts=True))

    def oracle(params: Any, adapter: Any, x: Any) -> Any:
        part = adapter["w"]
        y = call(params["w"], x)
        for at in range(3):
            gate = jnp.broadcast_to(jnp.expand_dims(part.gate[..., at], outputs), shape)
            a = part.a[..., 2 * at : 2 * at + 2]
            b = lax.slice_in_dim(part.b, 2 * at, 2 * at + 2, axis=axes.count("b"))
            one = {"w": lj.Adapter(lj.LoRA(rank=2, alpha=3), axes, a=a, b=b)}
            y += jax.nn.sigmoid(call(gate, x)) * call(lj.merge({"w": jnp.zeros(shape)}, one)["w"], x)
        return y

    def gradient(function: Any, params: Any, adapter: Any, x: Any) -> Any:
        def loss(adapter: Any, x: Any) -> Any:
            out = function(params, adapter, x)
            return total(out), out

        return jax.grad(loss, (0, 1), has_aux=True)(adapter, x)

    def compute(*call_of: Any) -> Any:
        adapted = lj.lora(lambda p, x: call(p["w"], x))
        return gradient(adapted, *call_of), gradient(oracle, *call_of)

    got, expected = without_compiling(compute)(params, mixed, x)
    assert_close(got, expected, GRADIENT)


def test_the_activation_decides_also_for_a_scaled_kernel() -> None:
    mixed = with_gate(many.mixture(EXPERTS, many.Gate(top_k=2)))
    scaled = lj.lora(lambda p, x: x @ (3 * p["w"]))(PARAMS, mixed, X)
    assert_close(scaled, 3 * lj.lora(linear)(PARAMS, mixed, X))


def test_a_router_reads_the_activation_of_each_layer() -> None:
    """The oracle is the mixture of each layer by itself, with its own gate, in a Python loop."""
    params = {"w": normal(3, 4, 4, size=0.5)}
    experts = {name: expert(at, params, "bio") for at, name in enumerate(NAMES)}
    mixed, x = with_gate(many.mixture(experts, many.Gate(top_k=2), train_experts=True)), normal(2, 5, 4, seed=1)

    def by_layer(adapter: Any, x: Any) -> Any:
        for layer in range(3):
            part = jax.tree.map(lambda array, layer=layer: array[layer], adapter["w"])
            one = {"w": lj.Adapter(part.variant, "io", **part.arrays)}
            x = jnp.tanh(lj.lora(linear)({"w": params["w"][layer]}, one, x))
        return x

    def gradient(function: Any) -> Any:
        return jax.grad(lambda ad: total(function(ad, x)))

    def compute(adapter: Any) -> Any:
        adapted = lj.lora(lambda p, x: layers(p["w"], x))
        return gradient(lambda ad, x: adapted(params, ad, x))(adapter), gradient(by_layer)(adapter)

    assert_close(*jax.jit(compute)(mixed), GRADIENT)


def test_weights_from_the_caller_differ_between_scanned_layers() -> None:
    params, x = {"w": normal(3, 4, 4, size=0.5)}, normal(2, 5, 4, seed=1)
    experts = {name: expert(at, params, "bio") for at, name in enumerate(NAMES)}
    mixed = many.mixture(experts, many.Given(per_layer=True))
    weights = normal(3, 2, 5, 3, seed=2)
    adapted = lj.lora(lambda p, x: layers(p["w"], x))
    got = jax.jit(lambda weights: adapted(params, mixed, x, token_weights=weights))(weights)
    for layer in range(3):
        updates = np.stack([ad["w"].variant.scale * ad["w"].a[layer] @ ad["w"].b[layer] for ad in experts.values()])
        x = jnp.tanh(mixed_by_hand(x, params["w"][layer], weights[layer], updates))
    assert_close(got, x)
    with pytest.raises(lj.AdapterError, match=r"shape \(3, tokens…, 3\) for 'w'.*; got \(2, 5, 3\)"):
        adapted(params, mixed, x, token_weights=weights[0])


def test_fused_kernels_keep_their_routers() -> None:
    """A gate, weights from the caller and an adapter without either meet in one concatenated kernel."""
    params = {"q": normal(4, 6), "k": normal(4, 3, seed=2), "v": normal(4, 5, seed=3)}
    fused = lambda p, x: x @ jnp.concatenate([p["q"], p["k"], p["v"]], 1)  # noqa: E731
    apart = lambda p, x: jnp.concatenate([x @ p["q"], x @ p["k"], x @ p["v"]], -1)  # noqa: E731
    experts = {name: expert(at, params) for at, name in enumerate(NAMES)}
    gated, given = (many.mixture(experts, router) for router in (many.Gate(top_k=2), many.Given()))
    adapter = {"q": with_gate(gated)["q"], "k": given["k"], "v": experts["math"]["v"]}
    weights = normal(3, 5, 3, seed=4)
    got, expected = (lj.lora(one)(params, adapter, X, token_weights=weights) for one in (fused, apart))
    assert_close(got, expected)


@jax.numpy_dtype_promotion("strict")
def test_weights_of_any_dtype_are_promoted_explicitly() -> None:
    # Each was a TypePromotionError of JAX.
    def fused(params: Any, x: jax.Array) -> jax.Array:
        return x @ jnp.concatenate([params["w"], params["v"]], 1)

    params, given = {**PARAMS, "v": PARAMS["w"]}, many.mixture(EXPERTS, many.Given())
    half, flags = (jax.ShapeDtypeStruct((3, 5, 3), dtype) for dtype in (jnp.bfloat16, bool))
    for other, weights in [(EXPERTS["code"], half), (given, {"w": half, "v": flags})]:
        adapter = {"w": given["w"], "v": other["w"]}
        run = functools.partial(lj.lora(fused), params, adapter, X)
        assert jax.eval_shape(lambda weights, run=run: run(token_weights=weights), weights).shape == (3, 5, 12)
    general = {"general": EXPERTS["chat"]}
    arrow = many.mixture({name: EXPERTS[name] for name in ("code", "math")}, many.Arrow(top_k=1), general=general)
    with jax.enable_x64(True):
        assert jax.eval_shape(lambda x: lj.lora(linear)(PARAMS, arrow, x), X).dtype == jnp.float32


def test_weights_for_paths() -> None:
    params = {"up": normal(4, 6), "down": normal(6, 4, seed=2)}
    apply = lambda p, x: jnp.tanh(x @ p["up"]).swapaxes(0, 1) @ p["down"]  # noqa: E731
    experts = {name: expert(at, params) for at, name in enumerate(NAMES)}
    mixed, weights = many.mixture(experts, many.Given()), normal(3, 5, 3, seed=4)
    given = {"up": weights, "**": weights.swapaxes(0, 1)}
    got = lj.lora(apply)(params, mixed, X, token_weights=given)
    up = jnp.tanh(mixed_by_hand(X, params["up"], weights, deltas(experts, "up")))
    assert_close(got, mixed_by_hand(up, params["down"], weights, deltas(experts, "down")).swapaxes(0, 1))
    with pytest.raises(lj.UnsupportedError, match=r"'down'.*expected token axes of shape \(3, 5\)"):
        lj.lora(apply)(params, mixed, X, token_weights=weights)


@pytest.mark.parametrize("shape", [(3, 1), (1, 5), (1, 1)])
def test_weights_of_size_one_are_repeated(shape: tuple[int, int]) -> None:
    weights = normal(*shape, 3, seed=4)
    got = lj.lora(linear)(PARAMS, many.mixture(EXPERTS, many.Given()), X, token_weights=weights)
    assert_close(got, mixed_by_hand(X, PARAMS["w"], jnp.broadcast_to(weights, (3, 5, 3)), deltas()))


def test_tokens_may_be_merged_into_one_axis() -> None:
    flat = lambda p, x: (x.reshape(15, 4) @ p["w"]).reshape(3, 5, 6)  # noqa: E731
    mixed, weights = many.mixture(EXPERTS, many.Given()), normal(3, 5, 3, seed=4)
    got, expected = (lj.lora(one)(PARAMS, mixed, X, token_weights=weights) for one in (flat, linear))
    assert_close(got, expected)


def test_sizes_that_coincide_are_taken_in_order() -> None:
    x, weights = normal(5, 5, 4, seed=1), normal(5, 5, 3, seed=4)
    got = lj.lora(linear)(PARAMS, many.mixture(EXPERTS, many.Given()), x, token_weights=weights)
    assert_close(got, mixed_by_hand(x, PARAMS["w"], weights, deltas()))


# Transformations, devices, costs


def model(params: Any, x: Any) -> Any:
    x = jnp.tanh(x @ params["up"] + params["bias"])
    return layers(params["layers"], x)


@functools.cache
def model_case() -> tuple[Any, Any]:
    params = {"up": normal(4, 6), "bias": normal(6, seed=7), "layers": normal(3, 6, 6, seed=2, size=0.5)}
    factored = {path: leaf for path, leaf in params.items() if path != "bias"}
    spec = {"up": lj.LoRA(rank=2, alpha=3, axes="io"), "layers": lj.LoRA(rank=2, alpha=3, axes="bio")}
    make = lambda seed: trained(jax.random.key(seed), lj.init(jax.random.key(0), factored, spec))  # noqa: E731
    experts = {name: make(at) for at, name in enumerate(NAMES)}
    return params, with_gate(many.mixture(experts, many.Gate(top_k=2), train_experts=True))


MANY_TOKENS = normal(4, 5, 4, seed=1)


def model_gradient(params: Any, adapter: Any, x: Any) -> Any:
    adapted = lj.lora(model)
    return jax.jit(lambda *args: jax.grad(lambda ad: total(adapted(args[0], ad, args[2])))(args[1]))(params, adapter, x)


@functools.cache
def on_one_device() -> Any:
    return jax.device_get(model_gradient(*model_case(), MANY_TOKENS))


def test_transformations_commute() -> None:
    params, mixed = model_case()
    adapted = lj.lora(model)

    def compute(mixed: Any, x: Any) -> Any:
        """Pairs of equal results, in one program, because compilation takes most of the time."""
        half, ones = (jax.tree.map(function, mixed) for function in (lambda leaf: leaf / 2, jnp.ones_like))
        loss = lambda ad: total(adapted(params, ad, x))  # noqa: E731
        gradient, out = jax.grad(loss)(mixed), adapted(params, mixed, x)
        two = jax.tree.map(lambda *leaves: jnp.stack(leaves), mixed, half)
        slope = sum(jnp.vdot(*leaves) for leaves in zip(*map(jax.tree.leaves, (gradient, ones)), strict=True))
        return [
            (jax.grad(jax.checkpoint(loss))(mixed), gradient),
            (jax.vmap(adapted, (None, None, 0))(params, mixed, x), out),
            (jax.vmap(adapted, (None, 0, None))(params, two, x)[1], adapted(params, half, x)),
            (jax.jvp(loss, (mixed,), (ones,))[1], slope),
        ]

    for got, expected in jax.jit(compute)(mixed, X):
        assert_close(got, expected, GRADIENT)


def two_devices(axis: str, kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((2,), (axis,), axis_types=(kind,), devices=jax.devices()[:2])


SPLIT = {"up": PartitionSpec(None, "x"), "bias": PartitionSpec(), "layers": PartitionSpec(None, "x", None)}
PLACES = {
    "tokens": (AxisType.Auto, PartitionSpec("x"), dict.fromkeys(SPLIT, PartitionSpec())),
    "kernels": (AxisType.Auto, PartitionSpec(None, None, "x"), SPLIT),
    "tokens, in types": (AxisType.Explicit, PartitionSpec("x"), dict.fromkeys(SPLIT, PartitionSpec())),
}


@pytest.mark.parametrize("name", PLACES)
def test_two_devices_compute_the_same(name: str) -> None:
    kind, spec, split = PLACES[name]
    (params, mixed), mesh = model_case(), two_devices("x", kind)
    shardings = {path: NamedSharding(mesh, one) for path, one in split.items()}
    placed = jax.device_put((params, mixed), (shardings, lj.sharding.like_base(mixed, shardings)))
    got = model_gradient(*placed, jax.device_put(MANY_TOKENS, NamedSharding(mesh, spec)))
    assert_close(jax.device_get(got), on_one_device(), GRADIENT)


def test_a_gate_is_sharded_as_the_inputs_of_its_kernel() -> None:
    _, mixed = model_case()
    assert lj.sharding.like_base(mixed, SPLIT)["layers"].gate == PartitionSpec(None, "x", None)


def test_a_router_in_a_shard_map_needs_all_inputs() -> None:
    mesh = two_devices("model")
    mixed = with_gate(many.mixture(EXPERTS, many.Gate(top_k=2)))

    def mapped(rows: Any, out: Any, gather: bool = False) -> Any:
        def body(w: Any, x: Any) -> Any:
            if gather:
                return x @ lax.all_gather(w, "model", axis=0, tiled=True)
            y = x @ w
            return lax.psum(y, "model") if rows[0] else y

        specs = (PartitionSpec(*rows), PartitionSpec(None, None, rows[0] if not gather else None))
        return lambda p, x: jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out, check_vma=not gather)(
            p["w"], x
        )

    columns = mapped((None, "model"), PartitionSpec(None, None, "model"))
    gathered = mapped(("model", None), PartitionSpec(), gather=True)
    expected = lj.lora(linear)(PARAMS, mixed, X)
    for call in (columns, gathered):
        assert_close(jax.device_get(jax.jit(lj.lora(call))(PARAMS, mixed, X)), jax.device_get(expected))
    with pytest.raises(lj.UnsupportedError, match=r"reads the whole activation, .* sharded over \['model'\]"):
        lj.lora(mapped(("model", None), PartitionSpec()))(PARAMS, mixed, X)


def wide_case() -> tuple[Any, Any, Any]:
    params, x = {"w": normal(24, 40)}, normal(3, 5, 24, seed=1)
    experts = {name: expert(at, params) for at, name in enumerate(NAMES)}
    return params, with_gate(many.mixture(experts, many.Gate(), train_experts=True)), x


def by_hand(params: Any, adapter: Any, x: Any) -> Any:
    part = adapter["w"]
    weights = jax.nn.softmax(x @ part.gate)
    thin = (x @ part.a) * part.variant.scales[0]
    thin = (thin.reshape(*thin.shape[:-1], 3, 2) * weights[..., None]).reshape(thin.shape)
    return x @ params["w"] + thin @ part.b


def test_a_step_takes_no_more_flops_than_by_hand_and_makes_no_kernel() -> None:
    params, mixed, x = wide_case()

    def step(function: Any) -> Any:
        return lambda params, adapter, x: jax.grad(lambda ad: total(function(params, ad, x)))(adapter)

    adapted = lj.lora(linear)
    assert_close(adapted(params, mixed, x), by_hand(params, mixed, x))
    assert testing.flops(step(adapted), params, mixed, x) <= testing.flops(step(by_hand), params, mixed, x)
    assert (24, 40) not in testing.shapes_made(step(adapted), params, mixed, x)
    assert not {(3, 5, 3, 40), (3, 5, 120)} & testing.shapes_made(step(adapted), params, mixed, x)
    frozen = {"w": lj.Adapter(dataclasses.replace(mixed["w"].variant, train_experts=False), "io", **mixed["w"].arrays)}
    assert testing.compiled_flops(step(adapted), params, frozen, x) < testing.compiled_flops(
        step(adapted), params, mixed, x
    )


def test_explain_counts_the_flops_of_the_router() -> None:
    params, mixed, x = wide_case()
    (row,) = lj.explain(linear, params, mixed, x).rows
    assert (row.variant, row.rank, row.parameters) == ("Mixture", 6, 24 * 6 + 6 * 40 + 24 * 3)
    # x·a, x·gate, the weights, ·b, the scale and the sum
    assert row.flops == 15 * (2 * 24 * 6 + 2 * 24 * 3 + 6 + 2 * 6 * 40 + 6 + 40)


def test_a_quantized_base() -> None:
    params, mixed, x = wide_case()
    stored = lj.quant.quantize(params, {"w": lj.quant.Int8()})
    assert_close(lj.lora(linear)(stored, mixed, x), lj.lora(linear)(lj.quant.dequantize(stored), mixed, x))


def test_bfloat16() -> None:
    params, mixed, x = wide_case()
    low = jax.tree.map(lambda array: array.astype(jnp.bfloat16), (params, mixed, x))
    got = lj.lora(linear)(*low)
    assert got.dtype == jnp.bfloat16
    assert_close(got.astype(jnp.float32), lj.lora(linear)(params, mixed, x), dtype="bfloat16")


# What mixtures refuse


def test_merging_a_routed_mixture_is_an_error() -> None:
    for router in (many.Given(), many.Gate(), many.Arrow()):
        with pytest.raises(
            lj.MergeError, match=r"1 have another one for each, which no kernel can\.\n  'w': Mixture\("
        ):
            lj.merge(PARAMS, many.mixture(EXPERTS, router))


REFUSED = {
    "a lookup": (lambda p, x: p["w"][jnp.zeros((3, 5), jnp.int32)], "not multiplied with one activation per token"),
    "two kernels": (lambda p, x: x @ (p["w"] @ p["w"].T), "not multiplied with one activation per token"),
    "a tied head": (lambda p, x: jnp.ones((3, 6)) @ p["w"].T, "which are not what is contracted here"),
    "a sum": (lambda p, x: jnp.sum(p["w"]), "no low-rank rule"),
    "groups": (
        lambda p, x: lax.ragged_dot(x.reshape(15, 4), p["w"][None], jnp.array([15], jnp.int32)),
        "not multiplied with one activation per token",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_uses_without_one_activation_per_token_are_errors_and_never_materialize(name: str) -> None:
    call, reason = REFUSED[name]
    mixed = many.mixture(EXPERTS, many.Gate())
    for allowed in ([], ["w"]):
        with pytest.raises(lj.UnsupportedError, match=reason) as error:
            lj.lora(call, materialize=allowed)(PARAMS, mixed, X)
        assert "materialize=" not in str(error.value)


def test_a_head_may_be_tied_if_the_caller_gives_the_weights() -> None:
    weights, y = normal(3, 3, seed=4), normal(3, 6, seed=5)
    mixed = many.mixture(EXPERTS, many.Given())
    got = lj.lora(lambda p, y: y @ p["w"].T)(PARAMS, mixed, y, token_weights=weights)
    assert_close(got, y @ PARAMS["w"].T + jnp.einsum("te,tf,edf->td", weights, y, deltas()))


def test_leaves_that_cannot_be_mixed_are_in_one_error() -> None:
    params = {"w": PARAMS["w"], "head": normal(6, 2), "norm": normal(6)}
    spec = {"w": lj.DoRA(rank=1, alpha=1, axes="io"), "head": lj.Full(), "norm": lj.Full()}
    with pytest.raises(lj.AdapterError, match="got 3 that cannot") as error:
        many.mixture({"a": lj.init(jax.random.key(0), params, spec)}, many.Gate())
    assert "'w' of 'a': DoRA(rank=1, alpha=1) cannot be mixed" in str(error.value)
    assert "mixture(…) | {path: leaf}" in str(error.value)
    other = {"w": normal(3, 6)}
    with pytest.raises(lj.AdapterError, match=r"for a kernel of shape \(3, 6\), and 'code' for \(4, 6\)"):
        many.mixture({"code": EXPERTS["code"], "b": expert(0, other)}, many.Gate())
    with pytest.raises(lj.AdapterError, match="the axes are 'oi', and 'io' in 'code'"):
        many.mixture({"code": EXPERTS["code"], "b": expert(0, {"w": normal(6, 4)}, "oi")}, many.Gate())
    with pytest.raises(lj.AdapterError, match=r"has no gate; train one first, with mixture\(\{name: adapter\}"):
        many.mixture(EXPERTS, many.PHATGOOSE())


def test_arguments_that_do_not_fit_are_errors() -> None:
    with pytest.raises(lj.SpecError, match=r"`top_k` of at most the 3 experts; got Arrow\(top_k=4\)"):
        many.mixture(EXPERTS, many.Arrow(top_k=4))
    with pytest.raises(lj.SpecError, match="Expected no `weights` for Gate"):
        many.mixture(EXPERTS, many.Gate(), weights={"code": 1.0, "math": 0.0, "chat": 0.0})
    with pytest.raises(lj.SpecError, match="Expected no `general` for Gate"):
        many.mixture(EXPERTS, many.Gate(), general={"g": EXPERTS["code"]})
    with pytest.raises(lj.SpecError, match="Expected no `key` for Arrow"):
        many.mixture(EXPERTS, many.Arrow(), key=jax.random.key(0))
    with pytest.raises(lj.SpecError, match=r"a weight for each of \['chat', 'code', 'math'\]; got \['code'\]"):
        many.mixture(EXPERTS, many.Constant(), weights={"code": 1.0})
    with pytest.raises(lj.SpecError, match="Expected other names for `general`"):
        many.mixture(EXPERTS, many.Arrow(), general={"code": EXPERTS["code"]})
    with pytest.raises(lj.SpecError, match="Expected a router, such as"):
        many.mixture(EXPERTS, "gate")
    with pytest.raises(lj.AdapterError, match="Expected adapters by name"):
        many.mixture({}, many.Gate())
    with pytest.raises(lj.AdapterError, match="Expected at least one adapter with a leaf"):
        many.mixture({"a": {}}, many.Gate())
    with pytest.raises(lj.SpecError, match="Expected a positive temperature"):
        many.Gate(temperature=0)
    with pytest.raises(lj.SpecError, match="Expected an integer of at least 1 for `top_k`"):
        many.Arrow(top_k=0)
    with pytest.raises(lj.SpecError, match=r"is not for a spec; `many\.mixture` makes it"):
        lj.init(jax.random.key(0), PARAMS, {"w": many.mixture(EXPERTS, many.Gate())["w"].variant})
    with pytest.raises(lj.AdapterError, match=r"shape \(tokens…, 3\) for 'w', which has 3 experts; got \(3, 5, 2\)"):
        lj.lora(linear)(PARAMS, many.mixture(EXPERTS, many.Given()), X, token_weights=np.ones((3, 5, 2), np.float32))
    with pytest.raises(lj.AdapterError, match="boolean or floating-point array; got int32 for 'w'"):
        lj.lora(linear)(PARAMS, many.mixture(EXPERTS, many.Given()), X, token_weights=np.ones((3, 5, 3), np.int32))
    with pytest.raises(lj.AdapterError, match="matches none of 1"):
        lj.lora(linear)(PARAMS, many.mixture(EXPERTS, many.Given()), X, token_weights={"v": np.ones((3, 5, 3))})
    with pytest.raises(lj.AdapterError, match="Expected no `token_weights`"):
        lj.lora(linear)(PARAMS, many.mixture(EXPERTS, many.Gate()), X, token_weights=np.ones((3, 5, 3)))
    with pytest.raises(lj.AdapterError, match="cannot be stacked"):
        many.stack({"a": many.mixture(EXPERTS, many.Gate())})


ROUTERS = [
    many.Constant(),
    many.Given(),
    many.Gate(top_k=2, temperature=2, balance=0.1),
    many.SigmoidGate(),
    many.Arrow(top_k=1),
]


def test_a_checkpoint_contains_the_router(tmp_path: Any) -> None:
    for at, router in enumerate(ROUTERS):
        mixed = many.mixture(EXPERTS, router, train_experts=at == 2)
        lj.save(tmp_path / str(at), mixed, base=PARAMS)
        restored = lj.restore(tmp_path / str(at), base=PARAMS)
        assert restored["w"].variant == mixed["w"].variant
        assert bits(restored) == bits(mixed)


def test_mixing_under_jit_and_the_initial_gate() -> None:
    make = lambda experts: many.mixture(experts, many.Arrow(top_k=2))  # noqa: E731
    got, expected = (lj.lora(linear)(PARAMS, mixed, X) for mixed in (jax.jit(make)(EXPERTS), make(EXPERTS)))
    assert_few_ulp(got, expected, ulp=32)
    gate = many.mixture(EXPERTS, many.Gate(), key=jax.random.key(0))["w"].gate
    assert 0.25 < float(jnp.abs(gate).max()) <= 0.5  # ±1/√4
    assert not many.mixture(EXPERTS, many.Gate())["w"].gate.any()
