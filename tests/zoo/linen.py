"""Linen modules."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import minilm
from lora_jax import Full, LoRA, RSLoRA

from .model import LORA, Model


def initialize(model: nn.Module, key: jax.Array, x: jax.Array, dtype: Any) -> Any:
    """The variables of a Linen model, cast from float32, because orthogonal kernels have no bfloat16 routine."""
    variables = jax.jit(model.init)(key, x)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), variables)


def mlp(key: jax.Array, dtype: Any) -> Model:
    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.gelu(nn.Dense(16, dtype=dtype, param_dtype=dtype)(x))
            return nn.Dense(5, dtype=dtype, param_dtype=dtype)(x)

    x = jax.random.normal(key, (8, 12), dtype)
    return Model(
        MLP().apply, initialize(MLP(), key, x, dtype), (x,), {"**/Dense_0/kernel": LORA, "**/Dense_1/*": Full()}
    )


class Block(nn.Module):
    """One layer of a transformer, pre-norm."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        common = {"dtype": self.dtype, "param_dtype": self.dtype}
        y = nn.LayerNorm(**common)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention", **common)(y)
        y = nn.Dense(24, name="up", **common)(nn.LayerNorm(**common)(x))
        return x + nn.Dense(12, name="down", **common)(nn.gelu(y)), None


def transformer(key: jax.Array, dtype: Any) -> Model:
    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for _ in range(2):
                x, _ = Block(dtype)(x)
            return x

    x = jax.random.normal(key, (8, 5, 12), dtype)
    spec = {
        "**/attention/{query,value}/kernel": LORA,
        "**/attention/*/kernel": RSLoRA(rank=3, alpha=2),
        "**/down/*": None,
    }
    return Model(
        Transformer().apply, initialize(Transformer(), key, x, dtype), (x,), spec | {"**/{up,down}/kernel": LORA}
    )


def scanned_transformer(key: jax.Array, dtype: Any) -> Model:
    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            layers = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return layers(dtype, name="layers")(x, None)[0]

    x = jax.random.normal(key, (8, 5, 12), dtype)
    return Model(Transformer().apply, initialize(Transformer(), key, x, dtype), (x,), {"**/kernel": LORA})


def tied_embedding(key: jax.Array, dtype: Any) -> Model:
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            embed = nn.Embed(17, 12, dtype=dtype, param_dtype=dtype)
            return embed.attend(nn.Dense(12, dtype=dtype, param_dtype=dtype)(embed(tokens)))

    tokens = jax.random.randint(key, (8, 4), 0, 17)
    return Model(Tied().apply, initialize(Tied(), key, tokens, dtype), (tokens,), {"**/{embedding,kernel}": LORA})


def conv_net(key: jax.Array, dtype: Any) -> Model:
    class ConvNet(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.Conv(8, (3, 3), strides=2, dtype=dtype, param_dtype=dtype)(x)
            x = nn.gelu(nn.BatchNorm(use_running_average=False, dtype=dtype, param_dtype=dtype)(x))
            x = nn.Conv(6, (3, 3), padding="VALID", use_bias=False, dtype=dtype, param_dtype=dtype)(x)
            return x.mean((1, 2))

    x = jax.random.normal(key, (8, 9, 9, 3), dtype)

    def apply(variables: Any, x: jax.Array) -> Any:
        return ConvNet().apply(variables, x, mutable=["batch_stats"])

    return Model(apply, initialize(ConvNet(), key, x, dtype), (x,), {"params/Conv_*/kernel": LORA})


def lstm(key: jax.Array, dtype: Any) -> Model:
    model = nn.RNN(nn.LSTMCell(6, dtype=dtype))
    x = jax.random.normal(key, (8, 5, 4), dtype)
    return Model(model.apply, initialize(model, key, x, dtype), (x,), {"**/kernel": LORA})


def minilm_encoder(key: jax.Array, dtype: Any) -> Model:
    encoder = minilm.Encoder(vocabulary=31, max_tokens=6, d_model=12, layers=2, heads=2, d_mlp=16)
    ids = jax.random.randint(key, (8, 5), 0, 31)
    params = jax.jit(encoder.init)(key, ids, ids > 2)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    spec = {"**/word/embedding": LORA, "**/layer_*/**/kernel": LORA}
    return Model(lambda params, ids: encoder.apply(params, ids, ids > 2), params, (ids,), spec)


def gru(key: jax.Array, dtype: Any) -> Model:
    start = nn.initializers.lecun_normal()  # the default, orthogonal, has no bfloat16 routine
    common = {"dtype": dtype, "param_dtype": dtype, "recurrent_kernel_init": start}
    model = nn.Bidirectional(nn.RNN(nn.GRUCell(4, **common)), nn.RNN(nn.SimpleCell(4, **common)))
    x = jax.random.normal(key, (8, 5, 4), dtype)
    return Model(model.apply, initialize(model, key, x, dtype), (x,), {"**/kernel": LORA})


def experts(key: jax.Array, dtype: Any) -> Model:
    """A mixture of experts: each token is routed to the expert with the highest score, up to its capacity."""

    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            start, shape = nn.initializers.lecun_normal(batch_axis=(0,)), (3, 6, 8)
            up, down = self.param("up", start, shape, dtype), self.param("down", start, (3, 8, 6), dtype)
            scores = nn.softmax(nn.Dense(3, use_bias=False, name="router", dtype=dtype, param_dtype=dtype)(x))
            chosen = jax.nn.one_hot(scores.argmax(-1), 3, dtype=jnp.int32)
            seats = jax.nn.one_hot((chosen.cumsum(1) - 1) * chosen - (1 - chosen), 4, dtype=dtype)
            tokens = jnp.einsum("btd,btec->becd", x, seats)
            out = jnp.einsum("becf,efd->becd", nn.gelu(jnp.einsum("becd,edf->becf", tokens, up)), down)
            return x + jnp.einsum("becd,btec,bte->btd", out, seats, scores)

    x = jax.random.normal(key, (8, 7, 6), dtype)
    return Model(Experts().apply, initialize(Experts(), key, x, dtype), (x,), {"params/{up,down}": LORA})


def decoding(key: jax.Array, dtype: Any) -> Model:
    """Attention over one token at a time, with a mutable cache of keys and values."""
    attention = nn.MultiHeadDotProductAttention(num_heads=2, decode=True, dtype=dtype, param_dtype=dtype)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        shapes = jax.eval_shape(attention.init, key, x)["cache"]

        def step(cache: Any, token: jax.Array) -> tuple[Any, jax.Array]:
            y, changed = attention.apply({"params": params, "cache": cache}, token[:, None], mutable=["cache"])
            return changed["cache"], y[:, 0]

        empty = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        return jax.lax.scan(step, empty, x.swapaxes(0, 1))[1]

    x = jax.random.normal(key, (8, 5, 6), dtype)
    params = initialize(attention, key, x, dtype)["params"]
    return Model(apply, params, (x,), {"{query,key,value,out}/kernel": LORA})


def optimized_lstm(key: jax.Array, dtype: Any) -> Model:
    """Its four kernels are concatenated for one product."""
    start = nn.initializers.lecun_normal()
    model = nn.RNN(nn.OptimizedLSTMCell(4, dtype=dtype, param_dtype=dtype, recurrent_kernel_init=start))
    x = jax.random.normal(key, (8, 5, 4), dtype)
    return Model(model.apply, initialize(model, key, x, dtype), (x,), {"**/kernel": LORA})


def grouped_conv(key: jax.Array, dtype: Any) -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            common = {"dtype": dtype, "param_dtype": dtype}
            x = nn.gelu(nn.Conv(6, (3,), feature_group_count=6, name="depthwise", **common)(x))
            x = nn.gelu(nn.Conv(8, (3,), feature_group_count=2, strides=2, name="grouped", **common)(x))
            return nn.ConvTranspose(4, (3,), strides=(2,), name="up", **common)(x)

    x = jax.random.normal(key, (8, 7, 6), dtype)
    spec = {"params/depthwise/kernel": LoRA(rank=1, alpha=2), "params/*/kernel": LORA}
    return Model(Net().apply, initialize(Net(), key, x, dtype), (x,), spec)
