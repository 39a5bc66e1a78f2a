"""OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models (Büyükakyüz 2024, arXiv:2406.01775)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapters
from ._leaf import Leaf, Start, initialize


def olora(params: Any, adapter: Adapters) -> Start:
    """Initializes the factors from a QR decomposition of the kernel, and subtracts them from the base.

        W0ᵀ = Q·R,   B = Q_rᵀ,   A = R_rᵀ,   W = W0 - s·A·B

    (Büyükakyüz 2024, arXiv:2406.01775; transposed, because Flax computes `x @ W`). The rows of `B` are orthonormal.
    The factors are not divided by s, as in the paper and in PEFT.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import starts
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (4, 3))}
    >>> adapter = lj.init(jax.random.key(1), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> residual, adapter = starts.olora(params, adapter)
    >>> jnp.abs(jnp.round(adapter["kernel"].b @ adapter["kernel"].b.T, 4))
    Array([[1., 0.],
           [0., 1.]], dtype=float32)

    Args:
      params: the parameter tree that the adapter was initialized for; not modified.
      adapter: from `init`; its factors are replaced.

    Returns:
      The changed base `W0 - s·A·B`, rounded as in `pissa`, and the adapter.

    Raises:
      AdapterError: if the adapter does not fit `params` or adapts only some layers of a stack, or an adapted kernel is
        quantized.
    """

    def method(leaf: Leaf) -> tuple[Array, Array]:
        w = leaf.matrices
        # Q_r depends only on the first r columns of W0ᵀ, and A = W0·Q_r.
        q = jnp.linalg.qr(w[:, : leaf.variant.rank].mT)[0]
        return w @ q, q.mT

    return initialize(params, adapter, method, changes_base=True)
