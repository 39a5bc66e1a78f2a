"""Initializations that depend only on shapes: random factors with A·B = 0. The base is unchanged."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapters
from .._core.keys import key_for
from ._leaf import Leaf, Start, initialize


def gaussian(key: Array, params: Any, adapter: Adapters) -> Start:
    """Draws `A` from N(0, 1/r²) and sets `B` to zero (Hu et al. 2021, arXiv:2106.09685).

    The paper does not specify the standard deviation; 1/r is that of PEFT's `"gaussian"`.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import starts
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> params, adapter = starts.gaussian(jax.random.key(1), params, adapter)
    >>> adapter["kernel"].b.any()
    Array(False, dtype=bool)

    Args:
      key: PRNG key; consumed. Folded with each path.
      params: the parameter tree that the adapter was initialized for.
      adapter: from `init`; its factors are replaced.

    Returns:
      `params` unchanged, and the adapter.

    Raises:
      AdapterError: if the adapter does not fit `params` or adapts only some layers of a stack.
    """

    def method(leaf: Leaf) -> tuple[Array, Array]:
        layers, d_in, d_out = leaf.shape
        rank = leaf.variant.rank
        normal = jax.random.normal(key_for(key, leaf.path), (layers, d_in, rank))
        return normal / rank, jnp.zeros((layers, rank, d_out))

    return initialize(params, adapter, method)


def kaiming(key: Array, params: Any, adapter: Adapters) -> Start:
    """Draws `A` from U(±1/√fan_in) and sets `B` to zero, as `init` does.

    The bound is that of Microsoft's loralib and of PEFT, `kaiming_uniform_(a=√5)`; that of He et al. is √6 times as
    large. The fan-in is the size of the input axes, without layers and experts.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import starts
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> _, again = starts.kaiming(jax.random.key(0), params, adapter)
    >>> jnp.array_equal(again["kernel"].a, adapter["kernel"].a)
    Array(True, dtype=bool)

    Args:
      key: PRNG key; consumed. Folded with each path.
      params: the parameter tree that the adapter was initialized for.
      adapter: from `init`; its factors are replaced.

    Returns:
      `params` unchanged, and the adapter.

    Raises:
      AdapterError: if the adapter does not fit `params` or adapts only some layers of a stack.
    """

    def method(leaf: Leaf) -> tuple[Array, Array]:
        layers, d_in, d_out = leaf.shape
        arrays = leaf.variant.init(key_for(key, leaf.path), leaf.w, leaf.part.axes, leaf.part.a.dtype)
        rank = leaf.variant.rank
        return arrays["a"].reshape(layers, d_in, rank), arrays["b"].reshape(layers, rank, d_out)

    return initialize(params, adapter, method)


def orthogonal(key: Array, params: Any, adapter: Adapters) -> Start:
    """Draws nonzero `A` and `B` in orthogonal halves of the rank, so that A·B = 0.

        A = N₁·Q₁/10,   B = Q₂ᵀ·N₂/10,   [Q₁; Q₂] an orthogonal (r, r),   N₁, N₂ normal

    (Datta, datta0.github.io/posts/rethink-lora-init). Both factors have a nonzero gradient from the first step. The
    factor 1/10 is that of PEFT's `"orthogonal"`, which uses the odd and the even rows of Q as halves.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import starts
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> params, adapter = starts.orthogonal(jax.random.key(1), params, adapter)
    >>> bool(abs(adapter["kernel"].a @ adapter["kernel"].b).max() < 1e-7)
    True

    Args:
      key: PRNG key; consumed. Folded with each path.
      params: the parameter tree that the adapter was initialized for.
      adapter: from `init`; its factors are replaced.

    Returns:
      `params` unchanged, and the adapter. With a `param_dtype` of 16 bits, A·B is zero only up to rounding.

    Raises:
      SpecError: if a rank is odd.
      AdapterError: if the adapter does not fit `params` or adapts only some layers of a stack.
    """

    def method(leaf: Leaf) -> tuple[Array, Array]:
        layers, d_in, d_out = leaf.shape
        rank = leaf.variant.rank
        if rank % 2:
            raise leaf.error(f"expected an even rank, because each factor uses one half; got rank={rank}")
        for_a, for_b, for_q = jax.random.split(key_for(key, leaf.path), 3)
        half = rank // 2
        q = jnp.linalg.qr(jax.random.normal(for_q, (layers, rank, rank)))[0]
        a = jax.random.normal(for_a, (layers, d_in, half)) @ q[:, :half]
        b = q[:, half:].mT @ jax.random.normal(for_b, (layers, half, d_out))
        return a / 10, b / 10

    return initialize(params, adapter, method)
