"""AdaLoRA's orthogonality loss."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapters
from .._core.linalg import factor_matrices, identity_like, product
from ._leaves import adaptive


def orthogonality(adapter: Adapters) -> Array:
    """Returns AdaLoRA's orthogonality penalty, to be added to the loss (Zhang et al. 2023, arXiv:2303.10512).

        R = Σ ‖aᵀ·a - 1‖² + ‖b·bᵀ - 1‖²      over all kernels and layers, in the Frobenius norm

    If the directions are orthonormal, `e` holds the singular values, and each direction can be pruned independently.
    This is the paper's term. The authors' code and PEFT use the mean of the norms, not squared, over all factors; their
    default weights, 0.1 and 0.5, are for that term.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> part = lj.Adapter(lj.AdaLoRA(rank=2, alpha=2), "io", a=jnp.eye(4, 2), e=jnp.zeros(2), b=3 * jnp.eye(2, 3))
    >>> float(orthogonality({"kernel": part}))
    128.0

    Args:
      adapter: from `init` or training; leaves of other variants are ignored.

    Returns:
      R, in float32 or wider.

    Raises:
      AdapterError: if no leaf is of `AdaLoRA`.
    """
    pairs = [factor_matrices(part) for part in adaptive(adapter).values()]
    grams = [gram for a, b in pairs for gram in (product(a.mT, a), product(b, b.mT))]
    return jnp.sum(jnp.stack([jnp.sum(jnp.square(gram - identity_like(gram))) for gram in grams]))
