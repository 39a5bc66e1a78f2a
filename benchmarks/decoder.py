"""One decoder, with a free choice of the layers that LoRA adapts, and the step that trains it.

Knows no library for LoRA, so that it runs on every version of JAX that one of them needs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from sizes import ALPHA, Size


class ByHand(nn.Module):
    """`nn.DenseGeneral` with LoRA written into it; A and B are variables of a collection of their own.

    x·W + ((x·A)·s)·B + bias, or, as where a finished layer is wrapped, x·W + bias + ((x·A)·s)·B: the compiler may
    fuse the two in different ways.
    """

    features: int | tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    rank: int = 8
    bias_first: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        summed = 1 if isinstance(self.axis, int) else len(self.axis)
        kernel, bias = (self.get_variable("params", name).astype(self.dtype) for name in ("kernel", "bias"))
        a, b = (self.get_variable("adapter", name).astype(self.dtype) for name in ("a", "b"))
        x = x.astype(self.dtype)
        y = _times(x, kernel, summed)
        low_rank = _times(_times(x, a, summed) * (ALPHA / self.rank), b, 1)
        return y + bias + low_rank if self.bias_first else y + low_rank + bias


def _times(x: Array, w: Array, summed: int) -> Array:
    """Multiplies the last axes of x with the first of w."""
    return lax.dot_general(x, w, ((range(x.ndim - summed, x.ndim), range(summed)), ((), ())))


class Attention(nn.Module):
    """Causal self-attention, with kernels (width, heads, head width) and (heads, head width, width)."""

    size: Size
    dense: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        heads = (self.size.heads, self.size.width // self.size.heads)
        query, key, value = (self.dense(heads, name=name)(x) for name in ("query", "key", "value"))
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        return self.dense(self.size.width, axis=(-2, -1), name="out")(
            nn.dot_product_attention(query, key, value, mask=mask)
        )


class Block(nn.Module):
    """Attention and a perceptron, each after a norm of its own; a carry of `scan`, too."""

    size: Size
    dense: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        x = x + Attention(self.size, self.dense, name="attention")(self.norm(name="norm_1")(x))
        h = nn.gelu(self.dense(self.size.hidden, name="up")(self.norm(name="norm_2")(x)))
        return x + self.dense(self.size.width, name="down")(h), None


class Decoder(nn.Module):
    """A decoder as of GPT-2: its layers written out one by one, or one layer scanned and rematerialized.

    Attributes:
      size: its sizes.
      scanned: whether it is scanned.
      tied: whether the head is the embedding.
      dtype: of the parameters and of the computation.
      dense: the class of the layers that LoRA adapts.
    """

    size: Size
    scanned: bool = False
    tied: bool = True
    dtype: Any = jnp.float32
    dense: Callable[..., nn.Module] = nn.DenseGeneral

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        size = self.size
        dtypes = {"dtype": self.dtype, "param_dtype": self.dtype}
        embedding = nn.Embed(size.vocabulary, size.width, name="embedding", **dtypes)
        x = embedding(tokens) + nn.Embed(size.length, size.width, name="position", **dtypes)(
            jnp.arange(tokens.shape[1])
        )
        dense, norm = functools.partial(self.dense, **dtypes), functools.partial(nn.LayerNorm, **dtypes)
        if self.scanned:
            # Inside a scan nothing can be merged with the second evaluation, so it need not be prevented.
            axes = {"params": 0, "adapter": 0}
            blocks = nn.scan(nn.remat(Block, prevent_cse=False), axes, split_rngs={"params": True}, length=size.layers)
            x, _ = blocks(size, dense, norm, name="blocks")(x, None)
        else:
            for layer in range(size.layers):
                x, _ = Block(size, dense, norm, name=f"block_{layer}")(x, None)
        x = norm(name="norm")(x)
        if self.tied:
            return embedding.attend(x)
        return nn.Dense(size.vocabulary, use_bias=False, name="head", **dtypes)(x)


def on_matrices(layer: Callable[..., nn.Module]) -> Callable[..., Callable[[Array], Array]]:
    """Makes layers whose kernel is a matrix, as in GPT-2: axes of what they read, and of what they give, are joined."""

    def make(features: int | tuple[int, ...], axis: int | tuple[int, ...] = -1, **options: Any) -> Any:
        summed = 1 if isinstance(axis, int) else len(axis)
        out = (features,) if isinstance(features, int) else features

        def call(x: Array) -> Array:
            y = layer(math.prod(out), **options)(x.reshape(*x.shape[: x.ndim - summed], -1))
            return y.reshape(*y.shape[:-1], *out)

        return call

    return make


Loss = Callable[[Any, Any, Array], Array]  # (what is trained, what is frozen, tokens)


class Method(NamedTuple):
    """A way to train: a loss, what it is differentiated in, and what stays as it is."""

    loss: Loss
    trained: Any
    frozen: Any

    def start(self) -> tuple[Any, Any, optax.OptState]:
        """The first arguments of `step`."""
        return self.frozen, self.trained, optimizer().init(self.trained)

    def step(
        self, frozen: Any, trained: Any, state: optax.OptState, tokens: Array
    ) -> tuple[Any, optax.OptState, Array]:
        """One step of AdamW."""
        loss, gradient = jax.value_and_grad(self.loss)(trained, frozen, tokens)
        updates, state = optimizer().update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, loss


def optimizer() -> optax.GradientTransformation:
    """The optimizer of all the methods."""
    return optax.adamw(1e-3)


def plain(model: nn.Module) -> Callable[[Any, Array], Array]:
    """`apply(params, tokens)` of a model."""
    return lambda params, tokens: model.apply({"params": params}, tokens)


def cross_entropy(logits: Array, tokens: Array) -> Array:
    """The loss of predicting each next token."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), tokens[:, 1:]).mean()
