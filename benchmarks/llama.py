"""A decoder as Llama 3's, a plain function of a tree of shapes: scanned, rematerialized, sharded; nothing has values.

Grouped-query attention with rotary positions, SwiGLU, RMSNorm; a loss in pieces, as the logits of a long vocabulary are
larger than all else. Written as one would write it without knowing of LoRA.
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

PIECES = 4  # of a sequence, in the loss


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
        """The parameters, cut over `data` along the model's width (FSDP) and over `model` along the other axis."""

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
    """A batch, cut over `data`."""
    return jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=NamedSharding(mesh, P("data")))


def loss(params: Any, tokens: Array) -> Array:
    """The mean cross-entropy of each next token."""
    x = _at(params["embedding"][tokens], "data")
    x, _ = lax.scan(jax.checkpoint(_block, prevent_cse=False), x, params["blocks"])
    x = _norm(x, params["norm"])
    head = _at(params["head"], None, "model")  # gathered once, not once for each piece

    def piece(_: None, its: tuple[Array, Array]) -> tuple[None, Array]:
        x, targets = its
        logits = _at((x @ head).astype(jnp.float32), "data", None, "model")
        # A sum over the vocabulary stays on the devices that have its parts; a lookup would gather the logits.
        picked = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0), axis=-1)
        return None, jax.nn.logsumexp(logits, axis=-1) - picked

    pieces = functools.partial(_pieces, count=PIECES)
    _, losses = lax.scan(jax.checkpoint(piece, prevent_cse=False), None, (pieces(x), pieces(jnp.roll(tokens, -1, 1))))
    return losses.mean()


def _block(x: Array, its: Any) -> tuple[Array, None]:
    h = _norm(x, its["norm_1"])
    query, key, value = (jnp.einsum("btd,dhk->bthk", h, its[name]) for name in ("query", "key", "value"))
    h = jax.nn.dot_product_attention(_rotated(query), _rotated(key), value, is_causal=True)
    x = x + _at(jnp.einsum("bthk,hkd->btd", h, its["out"]), "data")
    h = _norm(x, its["norm_2"])
    h = jax.nn.silu(h @ its["gate"]) * (h @ its["up"])
    return x + _at(h @ its["down"], "data"), None


def _norm(x: Array, scale: Array) -> Array:
    y = x.astype(jnp.float32)
    return (y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)).astype(x.dtype) * scale


def _rotated(x: Array, base: float = 500_000.0) -> Array:
    """Turns pairs of features by an angle that grows with the position."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None, None] * base ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def _at(x: Array, *axes: str | None) -> Array:
    return lax.with_sharding_constraint(x, P(*axes))


def _pieces(x: Array, count: int) -> Array:
    """Cuts the sequences into pieces, the first axis of the result."""
    batch, length, *rest = x.shape
    return jnp.moveaxis(x.reshape(batch, count, length // count, *rest), 1, 0)
