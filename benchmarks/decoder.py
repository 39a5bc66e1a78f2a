"""A decoder whose adapted layers can be replaced, and the training step.

It imports no LoRA library, so that it runs on the JAX version that each of them needs.
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
    """`nn.DenseGeneral` with LoRA; A and B are variables of a separate collection.

    x·W + ((x·A)·s)·B + bias, or, as when a finished layer is wrapped, x·W + bias + ((x·A)·s)·B. The compiler may fuse
    them differently.
    """

    features: int | tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    rank: int = 8
    bias_first: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        contracted = 1 if isinstance(self.axis, int) else len(self.axis)
        kernel, bias = (self.get_variable("params", name).astype(self.dtype) for name in ("kernel", "bias"))
        a, b = (self.get_variable("adapter", name).astype(self.dtype) for name in ("a", "b"))
        x = x.astype(self.dtype)
        y = _contract(x, kernel, contracted)
        low_rank = _contract(_contract(x, a, contracted) * (ALPHA / self.rank), b, 1)
        return y + bias + low_rank if self.bias_first else y + low_rank + bias


def _contract(x: Array, w: Array, axes: int) -> Array:
    """Contracts the last axes of x with the first axes of w."""
    return lax.dot_general(x, w, ((range(x.ndim - axes, x.ndim), range(axes)), ((), ())))


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
    """Attention and an MLP, each after a norm; also the body of a scan."""

    size: Size
    dense: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        x = x + Attention(self.size, self.dense, name="attention")(self.norm(name="norm_1")(x))
        h = nn.gelu(self.dense(self.size.hidden, name="up")(self.norm(name="norm_2")(x)))
        return x + self.dense(self.size.width, name="down")(h), None


class Decoder(nn.Module):
    """A GPT-2-like decoder with unrolled layers, or with scanned and rematerialized ones.

    Attributes:
      size: the sizes of the model and the batch.
      scanned: whether the layers are scanned.
      tied: whether the head is the embedding.
      dtype: the dtype of the parameters and of the computation.
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
            # In a scan, common subexpressions of forward and backward pass cannot be merged anyway.
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
    """Returns layers whose kernel is a matrix, as in GPT-2: input axes are flattened to one, and so are output axes."""

    def make(features: int | tuple[int, ...], axis: int | tuple[int, ...] = -1, **options: Any) -> Any:
        contracted = 1 if isinstance(axis, int) else len(axis)
        out = (features,) if isinstance(features, int) else features

        def call(x: Array) -> Array:
            y = layer(math.prod(out), **options)(x.reshape(*x.shape[: x.ndim - contracted], -1))
            return y.reshape(*y.shape[:-1], *out)

        return call

    return make


Loss = Callable[[Any, Any, Array], Array]  # (trained, frozen, tokens)


class Method(NamedTuple):
    """A training method: a loss, the trained arrays, and the frozen arrays."""

    loss: Loss
    trained: Any
    frozen: Any

    def initial_args(self) -> tuple[Any, Any, optax.OptState]:
        """Returns the arguments of the first `step`."""
        return self.frozen, self.trained, optimizer().init(self.trained)

    def step(
        self, frozen: Any, trained: Any, state: optax.OptState, tokens: Array
    ) -> tuple[Any, optax.OptState, Array]:
        """One step of AdamW."""
        loss, gradient = jax.value_and_grad(self.loss)(trained, frozen, tokens)
        updates, state = optimizer().update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, loss


def optimizer() -> optax.GradientTransformation:
    """Returns the optimizer of all methods."""
    return optax.adamw(1e-3)


def plain(model: nn.Module) -> Callable[[Any, Array], Array]:
    """Returns `apply(params, tokens)` of a model."""
    return lambda params, tokens: model.apply({"params": params}, tokens)


def cross_entropy(logits: Array, tokens: Array) -> Array:
    """Returns the mean loss of predicting each next token."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), tokens[:, 1:]).mean()
