"""PiSSA: Principal Singular Values and Singular Vectors Adaptation (Meng et al. 2024, arXiv:2404.02948)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapters
from .._core.keys import key_for
from .._core.linalg import SVD, factors_from_svd
from .._errors import SpecError
from ._leaf import Leaf, Start, positive_scale, start

_OVERSAMPLED = 10  # columns beyond the rank: with them the first r directions are nearly the exact ones (Halko et al.)


def pissa(params: Any, adapter: Adapters, *, niter: int | None = None, key: Array | None = None) -> Start:
    """Takes the kernel's r largest singular values for the factors, and leaves the rest in the base.

        W0 = U·S·Vᵀ,   A = U_r·√(S_r/s),   B = √(S_r/s)·V_rᵀ,   W = W0 - s·A·B

    (Meng et al. 2024, arXiv:2404.02948). What is trained is the principal part, what is frozen the residue. The model
    computes what it did.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import starts
    >>> params = {"kernel": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=1, alpha=1)})
    >>> residual, adapter = starts.pissa(params, adapter)
    >>> jnp.round(jnp.diag(residual["kernel"]))
    Array([0., 2., 1.], dtype=float32)

    Args:
      params: the parameter tree that the adapter was made for. Not changed.
      adapter: from `init`; its factors are replaced.
      niter: None for an exact decomposition; otherwise the number of power iterations of a randomized one (Halko et
        al. 2011, arXiv:0909.4061): the more, the nearer to the exact one, and far quicker than it on large kernels.
      key: PRNG key for the randomized one; consumed.

    Returns:
      The base without the adapter, and the adapter. Each moved kernel is computed in float32 and rounded once to its
      own dtype: a base in bfloat16 starts off by as much as one rounding of the residue, at most 2⁻⁸ of each of its
      elements. Cast the base to float32 before, if that matters.

    Raises:
      SpecError: if there is `niter` without `key` or `key` without `niter`; if a scale is not positive.
      AdapterError: if the adapter does not fit `params`.
    """
    if (niter is None) != (key is None):
        raise SpecError(
            f"Expected both `niter` and `key`, for a randomized decomposition, or neither; got niter={niter!r} and "
            f"{'no key' if key is None else 'a key'}."
        )

    def method(leaf: Leaf) -> tuple[Array, Array]:
        rank, scale, w = leaf.variant.rank, positive_scale(leaf), leaf.matrices
        if niter is None or key is None:
            svd = SVD(*jnp.linalg.svd(w, full_matrices=False))
        else:
            svd = randomized_svd(key_for(key, leaf.path), w, rank, niter)
        return factors_from_svd(svd, rank, scale)

    return start(params, adapter, method, moves=True)


def randomized_svd(key: Array, w: Array, rank: int, niter: int) -> SVD:
    """The singular values and vectors of matrices, the first `rank` of them nearly exact, by subspace iteration."""
    columns = min(rank + _OVERSAMPLED, *w.shape[-2:])
    q = _orthonormal(w @ jax.random.normal(key, (w.shape[-1], columns), w.dtype))
    for _ in range(niter):
        q = _orthonormal(w @ _orthonormal(w.mT @ q))
    u, s, vt = jnp.linalg.svd(q.mT @ w, full_matrices=False)
    return SVD(q @ u, s, vt)


def _orthonormal(x: Array) -> Array:
    return jnp.linalg.qr(x)[0]
