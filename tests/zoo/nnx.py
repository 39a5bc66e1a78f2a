"""NNX models, which are split; the state of the parameters is adapted."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from .model import LORA, Model


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


class Layer(nnx.Module):
    """A layer with running statistics and a stream of keys for dropout."""

    def __init__(self, dtype: Any, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(6, 6, rngs=rngs, dtype=dtype, param_dtype=dtype)
        self.norm = nnx.BatchNorm(6, rngs=rngs, dtype=dtype, param_dtype=dtype)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.dropout(nnx.gelu(self.norm(self.linear(x))))


def stateful(net: nnx.Module, x: jax.Array, spec: Any) -> Model:
    """A network whose other state is an argument and a result."""
    graph, params, state = nnx.split(net, nnx.Param, ...)

    def apply(params: Any, x: jax.Array, state: Any) -> Any:
        net = nnx.merge(graph, params, state)
        return net(x), nnx.split(net, nnx.Param, ...)[2]

    return Model(apply, params, (x, state), spec)


def nnx_stateful(key: jax.Array, dtype: Any) -> Model:
    class Heads(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs) -> None:
            self.layer = Layer(dtype, rngs=rngs)
            self.heads = nnx.split_rngs(splits=3)(nnx.vmap(self.head))(rngs)

        @staticmethod
        def head(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(6, 4, rngs=rngs, dtype=dtype, param_dtype=dtype)

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.vmap(lambda head, x: head(x), in_axes=(0, None))(self.heads, self.layer(x))

    net = Heads(rngs=nnx.Rngs(params=key, dropout=1))
    return stateful(net, jax.random.normal(key, (8, 6), dtype), {"**/kernel": LORA})


def nnx_scanned(key: jax.Array, dtype: Any) -> Model:
    class Stack(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs) -> None:
            self.layers = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: Layer(dtype, rngs=rngs)))(rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)

    net = Stack(rngs=nnx.Rngs(params=key, dropout=1))
    return stateful(net, jax.random.normal(key, (8, 6), dtype), {"**/kernel": LORA})
