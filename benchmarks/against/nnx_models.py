"""The programs of `cases.py` as NNX modules with replaceable layers and the paths of the Linen models."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from decoder import Decoder as LinenDecoder
from decoder import Method
from flax import nnx
from jax import Array
from sizes import Size

from . import cases

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layers:
    """Constructors of the layers that LoRA may adapt: `(in_features, out_features, rngs=…, dtypes…)`."""

    dense: Callable[..., nnx.Module] = nnx.Linear
    dense_general: Callable[..., nnx.Module] = nnx.LinearGeneral
    embed: Callable[..., nnx.Module] = nnx.Embed
    conv: Callable[..., nnx.Module] = nnx.Conv


class Attention(nnx.Module):
    """Causal self-attention, with matrices or rank-3 kernels."""

    def __init__(self, size: Size, dense: Callable[..., Any], *, matrices: bool) -> None:
        heads = (size.heads, size.width // size.heads)
        self.heads = heads
        self.joined = (size.width,) if matrices else heads
        inside = size.width if matrices else heads
        self.query, self.key, self.value = (dense(size.width, inside) for _ in range(3))
        self.out = dense(inside, size.width) if matrices else dense(inside, size.width, axis=(-2, -1))

    def __call__(self, x: Array) -> Array:
        query, key, value = (
            layer(x).reshape(*x.shape[:2], *self.heads) for layer in (self.query, self.key, self.value)
        )
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        y = nnx.dot_product_attention(query, key, value, mask=mask)
        return self.out(y.reshape(*x.shape[:2], *self.joined))


class Block(nnx.Module):
    """Attention and an MLP, each after a norm."""

    def __init__(self, size: Size, layers: Layers, *, matrices: bool, dtypes: Any, rngs: nnx.Rngs) -> None:
        options = {"rngs": rngs, **dtypes}
        dense = functools.partial(layers.dense, **options)
        general = dense if matrices else functools.partial(layers.dense_general, **options)
        self.norm_1, self.norm_2 = (nnx.LayerNorm(size.width, **options) for _ in range(2))
        self.attention = Attention(size, general, matrices=matrices)
        self.up, self.down = dense(size.width, size.hidden), dense(size.hidden, size.width)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.norm_1(x))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class Decoder(nnx.Module):
    """The counterpart of `decoder.Decoder`."""

    def __init__(self, like: LinenDecoder, layers: Layers, *, matrices: bool, rngs: nnx.Rngs) -> None:
        size, self.scanned, self.tied = like.size, like.scanned, like.tied
        self.length = size.layers
        dtypes = {"dtype": like.dtype, "param_dtype": like.dtype}
        block = functools.partial(Block, size, layers, matrices=matrices, dtypes=dtypes)
        self.embedding = layers.embed(size.vocabulary, size.width, rngs=rngs, **dtypes)
        self.position = nnx.Embed(size.length, size.width, rngs=rngs, **dtypes)
        if self.scanned:
            self.blocks = nnx.vmap(lambda rngs: block(rngs=rngs))(rngs.split(size.layers))
        else:
            for number in range(size.layers):
                setattr(self, f"block_{number}", block(rngs=rngs))
        self.norm = nnx.LayerNorm(size.width, rngs=rngs, **dtypes)
        if not self.tied:
            self.head = nnx.Linear(size.width, size.vocabulary, use_bias=False, rngs=rngs, **dtypes)

    def __call__(self, tokens: Array) -> Array:
        x = self.embedding(tokens) + self.position(jnp.arange(tokens.shape[1]))
        if self.scanned:
            step = nnx.remat(lambda x, block: block(x))
            x = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        else:
            for number in range(self.length):
                x = getattr(self, f"block_{number}")(x)
        x = self.norm(x)
        return self.embedding.attend(x) if self.tied else self.head(x)


class Experts(nnx.Module):
    """A linear layer for each group of rows, in one einsum."""

    def __init__(self, layers: Layers, rngs: nnx.Rngs) -> None:
        del layers  # the kernel is a parameter, not a layer
        self.kernel = nnx.Param(nnx.initializers.normal()(rngs.params(), (3, 8, 6)))

    def __call__(self, x: Array) -> Array:
        return jnp.einsum("etd,edf->etf", x, self.kernel[...])


class MappedExperts(nnx.Module):
    """The same layers as one layer under `nnx.vmap`."""

    def __init__(self, layers: Layers, rngs: nnx.Rngs) -> None:
        self.dense = nnx.vmap(lambda rngs: layers.dense(8, 6, use_bias=False, rngs=rngs))(rngs.split(3))

    def __call__(self, x: Array) -> Array:
        return nnx.vmap(lambda dense, x: dense(x))(self.dense, x)


class Images(nnx.Module):
    """A convolution and a nonlinearity."""

    def __init__(self, layers: Layers, rngs: nnx.Rngs) -> None:
        self.conv = layers.conv(3, 6, (3, 3), strides=2, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return jnp.tanh(self.conv(x))


def model_of(case: cases.Case, layers: Layers = Layers()) -> nnx.Module:
    """Returns the NNX counterpart of a case's model, with its weights; factors of LoRA are still shapes."""
    if isinstance(case.model, LinenDecoder):
        make = functools.partial(Decoder, case.model, layers, matrices=case.model.dense is not nn.DenseGeneral)
    else:
        counterparts = {cases.Experts: Experts, cases.MappedExperts: MappedExperts, cases.Images: Images}
        make = functools.partial(counterparts[type(case.model)], layers)
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    # The path of a wrapped layer has one more name than that of the layer.
    paths = {path.replace("/base_module/", "/"): path for path, _ in leaves_of(model)}
    return with_values(model, {paths[path]: value for path, value in case.kernels().items()})


def with_values(model: nnx.Module, values: dict[str, Array]) -> nnx.Module:
    """Returns the model with new values at some paths."""
    graph, state = nnx.split(model)
    new = [
        (path, leaf.replace(values["/".join(map(str, path))]) if "/".join(map(str, path)) in values else leaf)
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(new))


def leaves_of(model: nnx.Module, *kinds: Any) -> list[tuple[str, Any]]:
    """Returns the variables of some types, or all, with their paths."""
    flat = nnx.to_flat_state(nnx.state(model, *kinds))
    return [("/".join(map(str, path)), leaf.get_value()) for path, leaf in flat]


def trainable(model: nnx.Module) -> list[tuple[str, Any]]:
    """Returns the variables that LoRA added, with their paths."""
    return leaves_of(model, nnx.LoRAParam)


def method(case: cases.Case, model: nnx.Module) -> Method:
    """Trains only the `nnx.LoRAParam`s of a model."""
    graph, trained, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def loss(trained: Any, frozen: Any, inputs: Array) -> Array:
        frozen = jax.tree.map(lambda x: x, frozen)
        return case.loss(nnx.merge(graph, trained, frozen)(inputs), inputs)

    return Method(loss, trained, frozen)
