"""A Llama-3-like decoder as a function of a tree of shapes: scanned, rematerialized and sharded, without any LoRA.

Grouped-query attention with rotary positions, SwiGLU, RMSNorm. The loss is computed in chunks of the sequence, because
the logits of a large vocabulary are larger than all other arrays.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

CHUNKS = 4  # of a sequence, in the loss


@dataclasses.dataclass(frozen=True)
class Llama:
    """The sizes of a model."""

    layers: int
    width: int
    heads: int
    hidden: int
    kv_heads: int = 8
    vocabulary: int = 128256

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def shapes(self, mesh: Mesh, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
        """Returns the parameters, sharded over `data` along the width (FSDP) and over `model` along another axis."""

        def leaf(*axes: tuple[int, str | None]) -> jax.ShapeDtypeStruct:
            sizes, names = zip(*axes, strict=True)
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P(*names)))

        layers, width, narrow = (self.layers, None), (self.width, "data"), (self.head_width, None)
        heads, kv_heads, hidden = ((size, "model") for size in (self.heads, self.kv_heads, self.hidden))
        vocabulary, scale = (self.vocabulary, "model"), (self.width, None)
        blocks = {
            "norm_1": leaf(layers, scale),
            "query": leaf(layers, width, heads, narrow),
            "key": leaf(layers, width, kv_heads, narrow),
            "value": leaf(layers, width, kv_heads, narrow),
            "out": leaf(layers, heads, narrow, width),
            "norm_2": leaf(layers, scale),
            "gate": leaf(layers, width, hidden),
            "up": leaf(layers, width, hidden),
            "down": leaf(layers, hidden, width),
        }
        return {
            "embedding": leaf(vocabulary, width),
            "blocks": blocks,
            "norm": leaf(scale),
            "head": leaf(width, vocabulary),
        }


def tokens(mesh: Mesh, batch: int, length: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of a batch, sharded over `data`."""
    return jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=NamedSharding(mesh, P("data")))


def loss(params: Any, tokens: Array) -> Array:
    """Returns the mean loss of predicting each next token."""
    x = _shard(params["embedding"][tokens], "data")
    x, _ = lax.scan(jax.checkpoint(_block, prevent_cse=False), x, params["blocks"])
    x = _norm(x, params["norm"])
    head = _shard(params["head"], None, "model")  # gathered once, not once per chunk

    def chunk_loss(_: None, chunk: tuple[Array, Array]) -> tuple[None, Array]:
        x, targets = chunk
        logits = _shard((x @ head).astype(jnp.float32), "data", None, "model")
        # A sum over the vocabulary keeps the logits sharded; a lookup would gather them.
        picked = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0), axis=-1)
        return None, jax.nn.logsumexp(logits, axis=-1) - picked

    split = functools.partial(_split, chunks=CHUNKS)
    chunks = (split(x), split(jnp.roll(tokens, -1, 1)))
    _, losses = lax.scan(jax.checkpoint(chunk_loss, prevent_cse=False), None, chunks)
    return losses.mean()


def _block(x: Array, layer: Any) -> tuple[Array, None]:
    h = _norm(x, layer["norm_1"])
    query, key, value = (jnp.einsum("btd,dhk->bthk", h, layer[name]) for name in ("query", "key", "value"))
    h = jax.nn.dot_product_attention(_rotate(query), _rotate(key), value, is_causal=True)
    x = x + _shard(jnp.einsum("bthk,hkd->btd", h, layer["out"]), "data")
    h = _norm(x, layer["norm_2"])
    h = jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])
    return x + _shard(h @ layer["down"], "data"), None


def _norm(x: Array, scale: Array) -> Array:
    y = x.astype(jnp.float32)
    return (y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)).astype(x.dtype) * scale


def _rotate(x: Array, base: float = 500_000.0) -> Array:
    """Applies rotary position embeddings."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None, None] * base ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def _shard(x: Array, *axes: str | None) -> Array:
    return lax.with_sharding_constraint(x, P(*axes))


def _split(x: Array, chunks: int) -> Array:
    """Splits sequences into chunks, along the first axis of the result."""
    batch, length, *rest = x.shape
    return jnp.moveaxis(x.reshape(batch, chunks, length // chunks, *rest), 1, 0)
