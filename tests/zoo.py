"""The models on which the laws are tested: each an apply function that knows nothing of LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import minilm
from lora_jax import Full, LoRA, RSLoRA

Spec = dict[str, Any]
LORA = LoRA(rank=2, alpha=4)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and a call of it.

    Attributes:
      apply: `apply(params, *args)`.
      params: what it is called with.
      args: the rest of the call; a batch first.
      spec: what is adapted.
    """

    apply: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    spec: Spec


Make = Callable[[jax.Array, Any], Model]


def initialised(model: nn.Module, key: jax.Array, x: jax.Array, dtype: Any) -> Any:
    """The variables of a Linen model, drawn in float32 and cast: orthogonal kernels have no bfloat16 routine."""
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
        MLP().apply, initialised(MLP(), key, x, dtype), (x,), {"**/Dense_0/kernel": LORA, "**/Dense_1/*": Full()}
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
        Transformer().apply, initialised(Transformer(), key, x, dtype), (x,), spec | {"**/{up,down}/kernel": LORA}
    )


def scanned_transformer(key: jax.Array, dtype: Any) -> Model:
    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            layers = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return layers(dtype, name="layers")(x, None)[0]

    x = jax.random.normal(key, (8, 5, 12), dtype)
    return Model(Transformer().apply, initialised(Transformer(), key, x, dtype), (x,), {"**/kernel": LORA})


def tied_embedding(key: jax.Array, dtype: Any) -> Model:
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            embed = nn.Embed(17, 12, dtype=dtype, param_dtype=dtype)
            return embed.attend(nn.Dense(12, dtype=dtype, param_dtype=dtype)(embed(tokens)))

    tokens = jax.random.randint(key, (8, 4), 0, 17)
    return Model(Tied().apply, initialised(Tied(), key, tokens, dtype), (tokens,), {"**/{embedding,kernel}": LORA})


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

    return Model(apply, initialised(ConvNet(), key, x, dtype), (x,), {"params/Conv_*/kernel": LORA})


def lstm(key: jax.Array, dtype: Any) -> Model:
    model = nn.RNN(nn.LSTMCell(6, dtype=dtype))
    x = jax.random.normal(key, (8, 5, 4), dtype)
    return Model(model.apply, initialised(model, key, x, dtype), (x,), {"**/kernel": LORA})


def minilm_encoder(key: jax.Array, dtype: Any) -> Model:
    encoder = minilm.Encoder(vocabulary=31, max_tokens=6, d_model=12, layers=2, heads=2, d_mlp=16)
    ids = jax.random.randint(key, (8, 5), 0, 31)
    params = jax.jit(encoder.init)(key, ids, ids > 2)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    spec = {"**/word/embedding": LORA, "**/layer_*/**/kernel": LORA}
    return Model(lambda params, ids: encoder.apply(params, ids, ids > 2), params, (ids,), spec)


def nnx_transformer(key: jax.Array, dtype: Any) -> Model:
    class Layer(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs) -> None:
            common = {"rngs": rngs, "dtype": dtype, "param_dtype": dtype}
            self.norm = nnx.LayerNorm(12, **common)
            self.attention = nnx.MultiHeadAttention(2, 12, decode=False, **common)
            self.up = nnx.Linear(12, 24, **common)
            self.down = nnx.Linear(24, 12, **common)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = x + self.attention(self.norm(x))
            return x + self.down(nnx.gelu(self.up(x)))

    class Transformer(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs) -> None:
            self.layers = nnx.List([Layer(rngs=rngs) for _ in range(2)])

        def __call__(self, x: jax.Array) -> jax.Array:
            for layer in self.layers:
                x = layer(x)
            return x

    graph, state = nnx.split(Transformer(rngs=nnx.Rngs(params=key)))
    x = jax.random.normal(key, (8, 5, 12), dtype)
    return Model(lambda state, x: nnx.merge(graph, state)(x), state, (x,), {"layers/*/{attention/*,up}/kernel": LORA})


def plain_function(key: jax.Array, dtype: Any) -> Model:
    keys = jax.random.split(key, 4)
    params = [
        {"experts": jax.random.normal(keys[0], (3, 12, 8), dtype) / 4},
        (jax.random.normal(keys[1], (8, 2, 4), dtype) / 3, jnp.ones(4, dtype)),
    ]

    def apply(params: Any, x: jax.Array, flag: bool) -> dict[str, Any]:
        (layer, (kernel, bias)) = params
        y = jnp.einsum("eti,eio->eto", x, layer["experts"])
        y = jnp.einsum("hko,eto->ethk", kernel.transpose(1, 2, 0), y) + bias
        return {"y": jnp.tanh(y), "flag": flag, "name": "plain"}

    x = jax.random.normal(keys[2], (3, 8, 12), dtype)
    spec = {"0/experts": LoRA(rank=2, alpha=4, axes="bio"), "1/0": LoRA(rank=2, alpha=1, axes="ioo")}
    return Model(apply, params, (x, True), spec)


ZOO: dict[str, Make] = {
    make.__name__: make
    for make in (
        mlp,
        transformer,
        scanned_transformer,
        tied_embedding,
        conv_net,
        lstm,
        nnx_transformer,
        plain_function,
        minilm_encoder,
    )
}
