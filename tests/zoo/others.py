"""Models of other frameworks, and a plain function."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import LoRA

from .model import LORA, Model, Spec, framework


def cast(tree: Any, dtype: Any) -> Any:
    """Casts the floating-point leaves of a tree."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def haiku_net(key: jax.Array, dtype: Any) -> Model:
    hk = framework("haiku")

    @hk.transform_with_state
    def net(x: jax.Array) -> jax.Array:
        x = hk.Conv2D(5, 3, stride=2, name="conv")(x)
        x = jax.nn.gelu(hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, is_training=True))
        x = hk.dropout(hk.next_rng_key(), 0.2, hk.Flatten()(x))
        return hk.Linear(3, name="head")(x)

    x = jax.random.normal(key, (8, 5, 5, 3), dtype)
    params, state = cast(jax.jit(net.init)(key, x), dtype)

    def apply(params: Any, x: jax.Array, state: Any, key: jax.Array) -> Any:
        return net.apply(params, state, key, x)

    return Model(apply, params, (x, state, key), {"{conv,head}/w": LORA})


def haiku_stack(key: jax.Array, dtype: Any) -> Model:
    hk = framework("haiku")

    def layer(x: jax.Array) -> jax.Array:
        start = hk.initializers.VarianceScaling()
        attention = hk.MultiHeadAttention(num_heads=2, key_size=3, model_size=6, w_init=start, name="attention")
        x = hk.LayerNorm(-1, True, True)(x + attention(x, x, x))
        return x + hk.nets.MLP([8, 6], name="mlp")(x)

    @hk.without_apply_rng
    @hk.transform
    def net(tokens: jax.Array) -> jax.Array:
        return hk.experimental.layer_stack(2, name="layers")(layer)(hk.Embed(11, 6, name="embed")(tokens))

    tokens = jax.random.randint(key, (8, 4), 0, 11)
    params = cast(jax.jit(net.init)(key, tokens), dtype)
    return Model(net.apply, params, (tokens,), {"embed/embeddings": LORA, "**/{query,value,linear_0}/w": LORA})


def equinox(model: Any, args: Any, dtype: Any, spec: Spec) -> Model:
    """An Equinox model of one example; its arrays are the parameters, and the call combines them with the rest."""
    eqx = framework("equinox")
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return Model(lambda params, x: jax.vmap(eqx.combine(params, static))(x), cast(params, dtype), args, spec)


def equinox_net(key: jax.Array, dtype: Any) -> Model:
    eqx = framework("equinox")

    class Net(eqx.Module):
        embedding: eqx.nn.Embedding
        cell: eqx.nn.GRUCell
        head: eqx.nn.MLP

        def __call__(self, tokens: jax.Array) -> jax.Array:
            xs = jax.vmap(self.embedding)(tokens)
            h, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(4, xs.dtype), xs)
            return self.head(h)

    keys = jax.random.split(key, 3)
    net = Net(
        eqx.nn.Embedding(11, 6, key=keys[0]), eqx.nn.GRUCell(6, 4, key=keys[1]), eqx.nn.MLP(4, 3, 8, 1, key=keys[2])
    )
    spec = {"embedding/weight": LORA, "cell/weight_{ih,hh}": LORA, "head/layers/*/weight": LORA}
    return equinox(net, (jax.random.randint(key, (8, 4), 0, 11),), dtype, spec)


def equinox_stack(key: jax.Array, dtype: Any) -> Model:
    eqx = framework("equinox")

    class Layer(eqx.Module):
        norm: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention

        def __call__(self, x: jax.Array) -> jax.Array:
            y = jax.vmap(self.norm)(x)
            return x + self.attention(y, y, y)

    class Net(eqx.Module):
        patches: eqx.nn.Conv2d
        layers: Layer

        def __call__(self, image: jax.Array) -> jax.Array:
            x = self.patches(image).reshape(6, -1).T
            arrays, static = eqx.partition(self.layers, eqx.is_array)
            return jax.lax.scan(lambda x, layer: (eqx.combine(layer, static)(x), None), x, arrays)[0]

    def layer(key: jax.Array) -> Layer:
        return Layer(eqx.nn.LayerNorm(6), eqx.nn.MultiheadAttention(2, 6, key=key))

    net = Net(eqx.nn.Conv2d(3, 6, 2, stride=2, key=key), eqx.filter_vmap(layer)(jax.random.split(key, 2)))
    spec = {"patches/weight": LORA, "layers/attention/*/weight": LORA}
    return equinox(net, (jax.random.normal(key, (8, 3, 4, 4), dtype),), dtype, spec)


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
