"""Starts that look at shapes only: drawn factors whose product is zero. The base stays as it is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapters
from .._core.keys import key_for
from ._leaf import Leaf, Start, start


def gaussian(key: Array, params: Any, adapter: Adapters) -> Start:
    """Draws `A` from N(0, 1/r²), as the paper does from a normal distribution (Hu et al. 2021, arXiv:2106.09685).

    `B` is zero. The paper leaves the deviation open; 1/r is Hugging Face PEFT's `"gaussian"`.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import starts
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> params, adapter = starts.gaussian(jax.random.key(1), params, adapter)
    >>> adapter["kernel"].b.any()
    Array(False, dtype=bool)

    Args:
      key: PRNG key; consumed. Each path folds its name into it.
      params: the parameter tree that the adapter was made for.
      adapter: from `init`; its factors are replaced.

    Returns:
      `params` as they were, and the adapter.

    Raises:
      AdapterError: if the adapter does not fit `params`.
    """

    def method(leaf: Leaf) -> tuple[Array, Array]:
        layers, d_in, d_out = leaf.shape
        rank = leaf.variant.rank
        drawn = jax.random.normal(key_for(key, leaf.path), (layers, d_in, rank))
        return drawn / rank, jnp.zeros((layers, rank, d_out))

    return start(params, adapter, method)


def kaiming(key: Array, params: Any, adapter: Adapters) -> Start:
    """Draws `A` uniform in ±1/√fan_in, as `init` does already: a fresh start of an adapter by another key.

    `B` is zero. The bound is that of Microsoft's loralib and of PEFT, `kaiming_uniform_(a=√5)`; He's own would be √6
    times as wide. The fan-in is that of the input axes alone: layers and experts do not count.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import starts
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> _, again = starts.kaiming(jax.random.key(0), params, adapter)
    >>> jnp.array_equal(again["kernel"].a, adapter["kernel"].a)
    Array(True, dtype=bool)

    Args:
      key: PRNG key; consumed. Each path folds its name into it.
      params: the parameter tree that the adapter was made for.
      adapter: from `init`; its factors are replaced.

    Returns:
      `params` as they were, and the adapter.

    Raises:
      AdapterError: if the adapter does not fit `params`.
    """

    def method(leaf: Leaf) -> tuple[Array, Array]:
        layers, d_in, d_out = leaf.shape
        arrays = leaf.variant.init(key_for(key, leaf.path), leaf.w, leaf.part.axes, leaf.part.a.dtype)
        rank = leaf.variant.rank
        return arrays["a"].reshape(layers, d_in, rank), arrays["b"].reshape(layers, rank, d_out)

    return start(params, adapter, method)


def orthogonal(key: Array, params: Any, adapter: Adapters) -> Start:
    """Draws `A` and `B`, neither zero, in two halves of the rank that are orthogonal to each other, so that A·B = 0.

        A = N₁·Q₁/10,   B = Q₂ᵀ·N₂/10,   [Q₁; Q₂] an orthogonal (r, r),   N₁, N₂ normal

    From the first step both factors get a gradient. Datta's note, datta0.github.io/posts/rethink-lora-init; the tenth
    is that of PEFT's `"orthogonal"`, which takes the odd and the even rows of Q for the halves.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import starts
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> params, adapter = starts.orthogonal(jax.random.key(1), params, adapter)
    >>> bool(abs(adapter["kernel"].a @ adapter["kernel"].b).max() < 1e-7)
    True

    Args:
      key: PRNG key; consumed. Each path folds its name into it.
      params: the parameter tree that the adapter was made for.
      adapter: from `init`; its factors are replaced.

    Returns:
      `params` as they were, and the adapter. In 16 bits, which `param_dtype` may ask for, A·B is zero but for what
      rounding makes of it.

    Raises:
      SpecError: if a rank is odd.
      AdapterError: if the adapter does not fit `params`.
    """

    def method(leaf: Leaf) -> tuple[Array, Array]:
        layers, d_in, d_out = leaf.shape
        rank = leaf.variant.rank
        if rank % 2:
            raise leaf.error(f"expected an even rank, half of it for each factor; got rank={rank}")
        for_a, for_b, for_q = jax.random.split(key_for(key, leaf.path), 3)
        half = rank // 2
        q = jnp.linalg.qr(jax.random.normal(for_q, (layers, rank, rank)))[0]
        a = jax.random.normal(for_a, (layers, d_in, half)) @ q[:, :half]
        b = q[:, half:].mT @ jax.random.normal(for_b, (layers, half, d_out))
        return a / 10, b / 10

    return start(params, adapter, method)
