"""aLoRA: the base computes the tokens before the invocation, LoRA computes the rest."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_few_ulp, bits, trained
from jax import lax
from law import assert_close, normal, total

import lora_jax as lj

INVOCATION = (7, 8)
IDS = jnp.array([[1, 7, 8, 5, 3], [7, 8, 2, 7, 8], [7, 1, 8, 7, 3]])
ACTIVE = np.array([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]], bool)
ALORA = lj.ALoRA(rank=2, alpha=3, invocation=INVOCATION)


class Decoder(nn.Module):
    """Two scanned layers of causal attention and an MLP, with remat."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(9, 8, name="embed")(ids)
        layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return layers(name="layers")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        causal = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x, mask=causal)
        return x + nn.Dense(8, name="down")(jnp.tanh(nn.Dense(12, name="up")(x))), None


def decoder(variant: Any) -> tuple[Any, Any, Any]:
    model = Decoder()
    params = model.init(jax.random.key(0), IDS)
    kernels = lj.kernels(model.apply, params, IDS)
    adapter = lj.init(jax.random.key(1), params, {"**/kernel": variant}, kernels=kernels)
    return model.apply, params, trained(jax.random.key(2), adapter)


def as_lora(adapter: Any) -> Any:
    return {path: lj.Adapter(lj.LoRA(rank=2, alpha=3), part.axes, **part.arrays) for path, part in adapter.items()}


def test_tokens_from_the_last_invocation_on_are_active() -> None:
    _, _, adapter = decoder(ALORA)
    np.testing.assert_array_equal(lj.active_tokens(adapter, IDS), ACTIVE)
    np.testing.assert_array_equal(jax.jit(lj.active_tokens)(adapter, IDS), ACTIVE)
    np.testing.assert_array_equal(lj.active_tokens(adapter, IDS[0]), ACTIVE[0])
    assert not lj.active_tokens(adapter, IDS[:, :1]).any()
    # Was refused under these settings of JAX.
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for dtype in (np.uint8, np.int64):
            np.testing.assert_array_equal(lj.active_tokens(adapter, np.asarray(IDS, dtype)), ACTIVE)


@pytest.mark.parametrize("jit", [False, True])
def test_inactive_tokens_match_the_base_and_active_tokens_match_lora(jit: bool) -> None:
    apply, params, adapter = decoder(ALORA)
    adapted = jax.jit(lj.lora(apply)) if jit else lj.lora(apply)
    out, base = adapted(params, adapter, IDS, token_weights=ACTIVE), (jax.jit(apply) if jit else apply)(params, IDS)
    assert_few_ulp(out[~ACTIVE], base[~ACTIVE])
    assert float(jnp.abs(out - base)[ACTIVE].min(0).max()) > 1e-3
    every = adapted(params, adapter, IDS, token_weights=jnp.ones_like(ACTIVE))
    assert_close(every, lj.lora(apply, form="factored")(params, as_lora(adapter), IDS))


def test_the_update_before_the_invocation_is_exactly_zero() -> None:
    params, x = {"w": normal(4, 6)}, normal(3, 5, 4, seed=1)
    adapter = trained(jax.random.key(0), lj.init(jax.random.key(0), params, {"w": ALORA}))
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    with jax.disable_jit():  # not compiled, because two programs may be compiled differently
        out, base = lj.lora(apply)(params, adapter, x, token_weights=ACTIVE), apply(params, x)
    assert bits(out[~ACTIVE]) == bits(base[~ACTIVE])


def test_each_token_uses_the_base_or_lora_and_attends_to_both() -> None:
    params = {"w": normal(4, 6)}
    adapter = trained(jax.random.key(0), lj.init(jax.random.key(0), params, {"w": ALORA}))
    x, apply = normal(3, 5, 4, seed=1), lambda p, x: jnp.cumsum(x @ p["w"], axis=1)
    by_token = jnp.where(ACTIVE[..., None], x @ lj.merge(params, as_lora(adapter))["w"], x @ params["w"])

    def loss(adapter: Any) -> jax.Array:
        return total(lj.lora(apply)(params, adapter, x, token_weights=ACTIVE))

    def expected(adapter: Any) -> jax.Array:
        merged = lj.merge(params, as_lora(adapter))["w"]
        return total(jnp.cumsum(jnp.where(ACTIVE[..., None], x @ merged, x @ params["w"]), axis=1))

    assert_close(lj.lora(apply)(params, adapter, x, token_weights=ACTIVE), jnp.cumsum(by_token, axis=1))
    assert_close(jax.grad(loss)(adapter), jax.grad(expected)(adapter), {"float32": 1e-4})


def test_gradients_under_scan_and_remat_match_lora_if_all_tokens_are_active() -> None:
    apply, params, adapter = decoder(ALORA)
    every = jnp.ones_like(ACTIVE)
    got = jax.jit(jax.grad(lambda ad: total(lj.lora(apply)(params, ad, IDS, token_weights=every))))(adapter)
    expected = jax.jit(jax.grad(lambda ad: total(lj.lora(apply)(params, ad, IDS))))(as_lora(adapter))
    assert_close(as_lora(got), expected, {"float32": 1e-4})
    some = jax.jit(jax.grad(lambda ad: total(lj.lora(apply)(params, ad, IDS, token_weights=ACTIVE))))(adapter)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(some))


def test_one_cache_serves_the_base_and_the_adapter() -> None:
    """The base fills the cache for the tokens before the invocation; the adapter decodes the others one by one."""
    apply, params, adapter = decoder(ALORA)
    uncached = lj.lora(apply)(params, adapter, IDS[:1], token_weights=ACTIVE[:1])
    prefix = apply(params, IDS[:1, :1])
    assert_close(uncached[:, :1], prefix)


def test_dropout_applies_only_to_active_tokens() -> None:
    params, x = {"w": normal(4, 6)}, normal(3, 5, 4, seed=1)
    variant = lj.ALoRA(rank=2, alpha=3, invocation=INVOCATION, dropout=0.5)
    adapter = trained(jax.random.key(0), lj.init(jax.random.key(0), params, {"w": variant}))
    apply = lj.lora(lambda p, x: x @ p["w"])
    out = apply(params, adapter, x, token_weights=ACTIVE)
    dropped = apply(params, adapter, x, token_weights=ACTIVE, dropout_key=jax.random.key(1))
    assert bits(out[~ACTIVE]) == bits(dropped[~ACTIVE])
    assert float(jnp.abs(out - dropped)[ACTIVE].max()) > 1e-2


REFUSED = {
    "a lookup": (lambda p, x: p["w"][jnp.zeros((3, 5), jnp.int32)], "not multiplied with one activation per token"),
    "a sum": (lambda p, x: x + jnp.sum(p["w"]), "no low-rank rule"),
    "two kernels": (lambda p, x: x @ (p["w"] @ p["w"]), "not multiplied with one activation per token"),
    "only the last token": (lambda p, x: x[:, -1] @ p["w"], r"expected token axes of shape \(3, 5\), .*; got \(3,\)"),
    "tokens first": (lambda p, x: jnp.swapaxes(x, 0, 1) @ p["w"], r"got \(5, 3\)"),
    "experts by group": (
        lambda p, x: lax.ragged_dot(x.reshape(15, 4), p["w"][None], jnp.array([15], jnp.int32)),
        "not multiplied with one activation per token",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_uses_without_a_token_axis_are_errors_and_never_materialize(name: str) -> None:
    call, reason = REFUSED[name]
    params, x = {"w": normal(4, 4)}, normal(3, 5, 4, seed=1)
    adapter = trained(jax.random.key(0), lj.init(jax.random.key(0), params, {"w": ALORA}))
    for dense in ([], ["w"]):
        with pytest.raises(lj.UnsupportedError, match=reason) as error:
            lj.lora(call, materialize=dense)(params, adapter, x, token_weights=ACTIVE)
        assert "materialize=" not in str(error.value)


def test_merge_raises_for_alora() -> None:
    params = {"w": normal(4, 4)}
    adapter = lj.init(jax.random.key(0), params, {"w": ALORA})
    with pytest.raises(lj.MergeError, match="1 have another one for each, which no kernel can"):
        lj.merge(params, adapter)
    with pytest.raises(lj.LoRAError):
        lj.unmerge(params, adapter, base=params)


def test_initializations_that_change_the_base_are_errors() -> None:
    params = {"w": normal(4, 4)}
    adapter = lj.init(jax.random.key(0), params, {"w": ALORA})
    with pytest.raises(lj.SpecError, match="At 'w': expected a variant that adapts all tokens"):
        lj.starts.pissa(params, adapter)


def test_missing_or_needless_weights_are_errors() -> None:
    params, x = {"w": normal(4, 4)}, normal(3, 4, seed=1)
    apply = lj.lora(lambda p, x: x @ p["w"])
    adapter = lj.init(jax.random.key(0), params, {"w": ALORA})
    with pytest.raises(lj.AdapterError, match="Expected `token_weights`: 'w' has ALoRA"):
        apply(params, adapter, x)
    for wrong, got in ((jnp.ones(3, int), "int32"), ([True] * 3, "list")):
        with pytest.raises(lj.AdapterError, match=f"a boolean or floating-point array; got {got}"):
            apply(params, adapter, x, token_weights=wrong)
    with pytest.raises(lj.AdapterError, match="Expected no `token_weights`"):
        apply(params, as_lora(adapter), x, token_weights=jnp.ones(3, bool))
    with pytest.raises(lj.AdapterError, match="one invocation; got none"):
        lj.active_tokens(as_lora(adapter), IDS)
    with pytest.raises(lj.SpecError, match="Expected at least one integer for `invocation`"):
        lj.ALoRA(rank=2, alpha=3, invocation=())


def test_a_checkpoint_contains_the_invocation(tmp_path: Any) -> None:
    params = {"w": normal(4, 4)}
    adapter = lj.init(jax.random.key(0), params, {"w": lj.ALoRA(rank=2, alpha=3, invocation=[7, 8])})
    lj.save(tmp_path / "adapter", adapter, base=params)
    restored = lj.restore(tmp_path / "adapter", base=params)
    assert restored["w"].variant == adapter["w"].variant
    assert restored["w"].variant.invocation == INVOCATION
