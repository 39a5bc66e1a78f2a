"""A convolutional net, trained with `lora()`, with LoRA by hand, with merged kernels, and by full fine-tuning.

The kernel is small relative to the activations, so at a high rank factors need more FLOPs than a materialized kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from decoder import Loss, Method
from jax import Array, lax
from models import as_collection, materialize
from sizes import ALPHA

import lora_jax as lj

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


class ByHand(nn.Module):
    """`nn.Conv` with a 3 × 3 window and LoRA: a convolution with A, then a product with B at each position."""

    features: int
    strides: int = 1
    rank: int = 64

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel, bias = (self.get_variable("params", name) for name in ("kernel", "bias"))
        a, b = (self.get_variable("adapter", name) for name in ("a", "b"))
        convolve = functools.partial(
            lax.conv_general_dilated, window_strides=(self.strides,) * 2, padding="SAME", dimension_numbers=DIMENSIONS
        )
        return convolve(x, kernel) + (convolve(x, a) * (ALPHA / self.rank)) @ b + bias


class ConvNet(nn.Module):
    """Six convolutions, two of them with stride 2, and a head."""

    width: int = 64
    conv: Callable[..., nn.Module] = functools.partial(nn.Conv, kernel_size=(3, 3))

    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = images
        for layer in range(6):
            strides = 2 if layer in (2, 4) else 1
            x = nn.relu(self.conv(features=self.width, strides=strides, name=f"conv_{layer}")(x))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class Case(NamedTuple):
    """The net with its weights, an adapter for all convolutions except the first, and images."""

    model: ConvNet
    params: Any
    adapter: dict[str, lj.Adapter]
    tokens: Array  # named as in the decoder's case
    rank: int


def case(*, rank: int = 64, images: int = 16, size: int = 32) -> Case:
    """Returns the net with a nonzero adapter."""
    model, batch = ConvNet(), jax.random.normal(jax.random.key(0), (images, size, size, 3))
    params = jax.jit(model.init)(jax.random.key(1), batch)["params"]
    spec = {"conv_{1,2,3,4,5}/kernel": lj.LoRA(rank=rank, alpha=ALPHA, axes="iiio")}
    adapter = lj.init(jax.random.key(2), params, spec)
    noise = lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    return Case(model, params, jax.tree_util.tree_map(noise, adapter), batch, rank)


def loss_of(logits: Array) -> Array:
    """Returns a loss with arbitrary labels, which do not affect FLOPs or time."""
    labels = jnp.arange(logits.shape[0]) % 10
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def through_lora(case: Case, *, form: Any = None) -> Method:
    """The unmodified net, with `lora()`."""
    adapted = lj.lora(_plain(case.model), form=form)
    return Method(lambda adapter, params, x: loss_of(adapted(params, adapter, x)), case.adapter, case.params)


def by_hand(case: Case) -> Method:
    """The net with LoRA in its layers."""
    first = functools.partial(nn.Conv, kernel_size=(3, 3))
    adapted = functools.partial(ByHand, rank=case.rank)
    model = case.model.clone(conv=lambda **options: (first if options["name"] == "conv_0" else adapted)(**options))

    def loss(adapter: Any, params: Any, x: Array) -> Array:
        return loss_of(model.apply({"params": params, "adapter": adapter}, x))

    return Method(loss, as_collection(case.adapter), case.params)


def merged(case: Case) -> Method:
    """The unmodified net, with kernels that are materialized in each step."""
    apply = _plain(case.model)
    return Method(lambda ad, params, x: loss_of(apply(materialize(params, ad), x)), case.adapter, case.params)


def full_fine_tuning(case: Case) -> Method:
    """Full fine-tuning."""
    apply = _plain(case.model)
    loss: Loss = lambda params, frozen, x: loss_of(apply(params, x))  # noqa: E731
    return Method(loss, case.params, None)


def _plain(model: nn.Module) -> Callable[[Any, Array], Array]:
    return lambda params, x: model.apply({"params": params}, x)
