"""PiSSA: Principal Singular Values and Singular Vectors Adaptation (Meng et al. 2024, arXiv:2404.02948)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapters
from .._core.keys import key_for
from .._core.linalg import SVD, factors_from_svd
from .._errors import SpecError
from ._leaf import Leaf, Start, initialize, positive_scale

_OVERSAMPLING = 10  # columns in addition to the rank, for accuracy (Halko et al.)


def pissa(params: Any, adapter: Adapters, *, niter: int | None = None, key: Array | None = None) -> Start:
    """Initializes the factors with the kernel's r largest singular values, and subtracts them from the base.

        W0 = U·S·Vᵀ,   A = U_r·√(S_r/s),   B = √(S_r/s)·V_rᵀ,   W = W0 - s·A·B

    (Meng et al. 2024, arXiv:2404.02948). The principal part is trained, and the residual is frozen.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import starts
    >>> params = {"kernel": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=1, alpha=1)})
    >>> residual, adapter = starts.pissa(params, adapter)
    >>> jnp.round(jnp.diag(residual["kernel"]))
    Array([0., 2., 1.], dtype=float32)

    Args:
      params: the parameter tree that the adapter was initialized for; not modified.
      adapter: from `init`; its factors are replaced.
      niter: the number of power iterations of a randomized decomposition (Halko et al. 2011, arXiv:0909.4061), which is
        much faster on large kernels; more iterations are more accurate. None for the exact decomposition.
      key: PRNG key for the randomized decomposition; consumed.

    Returns:
      The changed base `W0 - s·A·B`, and the adapter. Each changed kernel is computed in float32 and rounded once to its
      dtype. For bfloat16 the initial error is at most 2⁻⁸ of each element of the residual; cast the base to float32
      first where that matters.

    Raises:
      SpecError: if only one of `niter` and `key` is given; if a scale is not positive.
      AdapterError: if the adapter does not fit `params` or adapts only some layers of a stack, or an adapted kernel is
        quantized.
    """
    approximate = approximation(niter, key)
    return initialize(params, adapter, lambda leaf: approximate(leaf, leaf.matrices), changes_base=True)


def approximation(niter: int | None, key: Array | None) -> Callable[[Leaf, Array], tuple[Array, Array]]:
    """Returns a function of a leaf and matrices, `(layers, in, out)`, that approximates them by `s·A·B`.

    Raises:
      SpecError: if only one of `niter` and `key` is given.
    """
    if (niter is None) != (key is None):
        raise SpecError(
            f"Expected both `niter` and `key`, for a randomized decomposition, or neither; got niter={niter!r} and "
            f"{'no key' if key is None else 'a key'}."
        )

    def approximate(leaf: Leaf, matrices: Array) -> tuple[Array, Array]:
        rank, scale = leaf.variant.rank, positive_scale(leaf)
        if niter is None or key is None:
            svd = SVD(*jnp.linalg.svd(matrices, full_matrices=False))
        else:
            svd = randomized_svd(key_for(key, leaf.path), matrices, rank, niter)
        return factors_from_svd(svd, rank, scale)

    return approximate


def randomized_svd(key: Array, w: Array, rank: int, niter: int) -> SVD:
    """Returns an approximate SVD by subspace iteration, accurate for the `rank` largest singular values."""
    columns = min(rank + _OVERSAMPLING, *w.shape[-2:])
    q = _orthonormal(w @ jax.random.normal(key, (w.shape[-1], columns), w.dtype))
    for _ in range(niter):
        q = _orthonormal(w @ _orthonormal(w.mT @ q))
    u, s, vt = jnp.linalg.svd(q.mT @ w, full_matrices=False)
    return SVD(q @ u, s, vt)


def _orthonormal(x: Array) -> Array:
    return jnp.linalg.qr(x)[0]
