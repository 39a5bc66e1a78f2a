"""MiCA: Minor Component Adaptation (arXiv:2604.01694)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapters
from .._core.paths import flatten
from ._leaf import Leaf, Start, check_arrays, initialize, low_rank_leaves


def mica(params: Any, adapter: Adapters) -> Start:
    """Sets `A` to zero and `B` to the output directions to which the kernel contributes least.

        W0 = U·S·Vᵀ,   A = 0,   B = V_rᵀ, of the r smallest singular values

    (arXiv:2604.01694; V instead of U, because Flax computes `x @ W`). The base is unchanged. `B` has orthonormal rows
    and stays frozen; only `A` is trained:

        tx = optax.transforms.selective_transform(tx, freeze_mask=optim.select("b")(adapter))

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import starts
    >>> params = {"kernel": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=1, alpha=1)})
    >>> params, adapter = starts.mica(params, adapter)
    >>> jnp.abs(adapter["kernel"].b)
    Array([[0., 0., 1.]], dtype=float32)

    Args:
      params: the parameter tree that the adapter was initialized for.
      adapter: from `init`; its factors are replaced.

    Returns:
      `params` unchanged, and the adapter.

    Raises:
      SpecError: if a variant has a diagonal in addition to the factors.
      AdapterError: if the adapter does not fit `params` or adapts only some layers of a stack, or an adapted kernel is
        quantized.
    """
    check_arrays(low_rank_leaves(adapter, flatten(params)[0]))

    def method(leaf: Leaf) -> tuple[Array, Array]:
        w, rank = leaf.matrices, leaf.variant.rank
        b = jnp.linalg.svd(w, full_matrices=False)[2][:, -rank:]
        return jnp.zeros((*w.shape[:2], rank), w.dtype), b

    return initialize(params, adapter, method)
