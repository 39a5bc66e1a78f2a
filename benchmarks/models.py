"""One decoder, and four ways to train it: through `lora()`, with LoRA by hand in the model, merged in each step, whole.

The weights and the values of the adapter are the same in all of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array, lax

import lora_jax as lj

ALPHA = 16.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """The sizes of a model and of its batch."""

    layers: int
    width: int
    heads: int
    hidden: int
    vocabulary: int
    batch: int
    length: int
    rank: int


SMALL = Size(layers=2, width=256, heads=4, hidden=1024, vocabulary=2048, batch=4, length=128, rank=8)
BASE = Size(layers=12, width=768, heads=12, hidden=3072, vocabulary=8192, batch=1, length=128, rank=8)


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
    """A decoder as of GPT-2: its layers written out one by one, or one layer scanned and rematerialised.

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


class Case(NamedTuple):
    """A model with its weights, an adapter for it, and tokens."""

    model: Decoder
    params: Any
    adapter: dict[str, lj.Adapter]
    tokens: Array


def optimizer() -> optax.GradientTransformation:
    """The optimiser of all the methods."""
    return optax.adamw(1e-3)


def case(size: Size, *, scanned: bool, tied: bool = True, dtype: Any = jnp.float32) -> Case:
    """Makes a model, and an adapter in float32 for all the kernels of its layers; `b` is not zero, so that it acts."""
    model = Decoder(size, scanned=scanned, tied=tied, dtype=dtype)
    for_params, for_tokens, for_adapter, for_b = jax.random.split(jax.random.key(0), 4)
    tokens = jax.random.randint(for_tokens, (size.batch, size.length), 0, size.vocabulary)
    params = jax.jit(model.init)(for_params, tokens)["params"]
    spec = {"**/{query,key,value,out,up,down}/kernel": lj.LoRA(rank=size.rank, alpha=ALPHA)}
    found = lj.kernels(plain(model), params, tokens)
    adapter = lj.init(for_adapter, params, spec, kernels=found)
    leaves, treedef = jax.tree_util.tree_flatten(adapter)
    noise = [
        0.02 * jax.random.normal(key, x.shape)
        for key, x in zip(jax.random.split(for_b, len(leaves)), leaves, strict=True)
    ]
    return Case(model, params, jax.tree_util.tree_unflatten(treedef, map(jnp.add, leaves, noise)), tokens)


def plain(model: nn.Module) -> Callable[[Any, Array], Array]:
    """`apply(params, tokens)` of a model."""
    return lambda params, tokens: model.apply({"params": params}, tokens)


def cross_entropy(logits: Array, tokens: Array) -> Array:
    """The loss of predicting each next token."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), tokens[:, 1:]).mean()


def through_lora(case: Case, *, form: Any = None) -> Method:
    """The model as it stands, through `lora()`."""
    adapted = lj.lora(plain(case.model), form=form)

    def loss(adapter: Any, params: Any, tokens: Array) -> Array:
        return cross_entropy(adapted(params, adapter, tokens), tokens)

    return Method(loss, case.adapter, case.params)


def by_hand(case: Case, *, bias_first: bool = False) -> Method:
    """The model with LoRA written into its layers."""
    model = case.model.clone(dense=functools.partial(ByHand, rank=case.model.size.rank, bias_first=bias_first))

    def loss(adapter: Any, params: Any, tokens: Array) -> Array:
        return cross_entropy(model.apply({"params": params, "adapter": adapter}, tokens), tokens)

    return Method(loss, as_collection(case.adapter), case.params)


def merged(case: Case) -> Method:
    """The model as it stands, of kernels `W0 + s·A·B` that are formed in each step."""
    apply = plain(case.model)

    def loss(adapter: Any, params: Any, tokens: Array) -> Array:
        return cross_entropy(apply(formed(params, adapter), tokens), tokens)

    return Method(loss, case.adapter, case.params)


def whole(case: Case) -> Method:
    """Full fine-tuning: no adapter, every parameter trained."""
    apply = plain(case.model)

    def loss(params: Any, frozen: None, tokens: Array) -> Array:
        del frozen  # nothing is
        return cross_entropy(apply(params, tokens), tokens)

    return Method(loss, case.params, None)


def formed(params: Any, adapter: Mapping[str, lj.Adapter]) -> Any:
    """The parameters with `W0 + s·A·B` in place of each adapted kernel, as one would write it."""
    kernels = flatten_dict(params, sep="/")
    its = {path: kernels[path] + _delta(part).astype(kernels[path].dtype) for path, part in adapter.items()}
    return unflatten_dict(kernels | its, sep="/")


def _delta(part: lj.Adapter) -> Array:
    letters = "wxyzuv"[: len(part.axes)]
    batch, summed, out = (
        "".join(x for x, role in zip(letters, part.axes, strict=True) if role == its) for its in "bio"
    )
    return jnp.einsum(f"{batch}{summed}r,{batch}r{out}->{letters}", part.a * part.variant.scale, part.b)


def as_collection(adapter: Mapping[str, lj.Adapter]) -> Any:
    """The arrays of an adapter as the collection of variables that the layers by hand read."""
    flat = {
        f"{path.removesuffix('kernel')}{name}": x for path, part in adapter.items() for name, x in part.arrays.items()
    }
    return unflatten_dict(flat, sep="/")


METHODS: dict[str, Callable[[Case], Method]] = {
    "LoRA by hand": by_hand,
    "by hand, bias first": functools.partial(by_hand, bias_first=True),
    "lora()": through_lora,
    "W0 + s·A·B each step": merged,
    "full fine-tuning": whole,
}
