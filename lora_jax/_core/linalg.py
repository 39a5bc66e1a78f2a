"""Kernels and factors as stacks of matrices, `(batch…, in, out)`: what linear algebra knows; and back again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from .adapter import Adapter
from .axes import axes_of_a, axes_of_b, axes_with, sizes
from .contract import widest
from .placement import replicated
from .values import near
from .variant import LowRank


class SVD(NamedTuple):
    """A stack of matrices, `(u·s) @ vt`, the largest singular values first.

    Attributes:
      u: (batch…, in, k), its columns orthonormal.
      s: (batch…, k).
      vt: (batch…, k, out), its rows orthonormal.
    """

    u: Array
    s: Array
    vt: Array


def product(x: Array, y: Array) -> Array:
    """`x @ y` at the highest precision: accelerators would multiply float32 in bfloat16."""
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def identity_like(x: Array) -> Array:
    """The identity for a stack of square matrices, as it broadcasts against it."""
    return lax.expand_dims(jnp.eye(x.shape[-1], dtype=x.dtype), range(x.ndim - 2))


def frobenius(x: Array) -> Array:
    """The Frobenius norm of each matrix of a stack."""
    return jnp.linalg.norm(x, axis=(-2, -1))


def has_factors(part: Adapter) -> bool:
    """Whether the part holds factors `a` and `b`, whose scaled product is added to the kernel."""
    return isinstance(part.variant, LowRank) and {"a", "b"} <= set(part.arrays)


def scale_of(part: Adapter) -> float:
    """s, by which the product of the factors is multiplied."""
    assert isinstance(part.variant, LowRank)
    return part.variant.scale


def kernel_matrix(w: Any, axes: str) -> Array:
    """A kernel in float32 at least, flattened: (batch…, in, out)."""
    wide = replicated(jnp.asarray(near(w), widest(w.dtype, jnp.float32)))
    by_role = [axes_with(axes, role) for role in "bio"]
    batch, d_in, d_out = ([wide.shape[axis] for axis in its] for its in by_role)
    ordered = jnp.transpose(wide, [axis for its in by_role for axis in its])
    return ordered.reshape(*batch, math.prod(d_in), math.prod(d_out))


def factor_matrices(part: Adapter) -> tuple[Array, Array]:
    """`a` and `b` in float32 at least, flattened: (batch…, in, rank) and (batch…, rank, out). The scale is not in."""
    return _flattened(part.a, part.b, part.axes)


def delta_matrices(part: Adapter) -> tuple[Array, Array]:
    """The same with what stands between the factors in the first: their product is the update without its scale."""
    assert isinstance(part.variant, LowRank)
    return _flattened(*part.variant.factors(part.arrays, part.axes), part.axes)


def diagonal_of(part: Adapter) -> Array | None:
    """What stands between the factors, (batch…, rank), in float32 at least; None for nothing."""
    assert isinstance(part.variant, LowRank)
    diagonal = part.variant.diagonal(part.arrays)
    return None if diagonal is None else replicated(diagonal.astype(widest(diagonal.dtype, jnp.float32)))


def _flattened(a: Array, b: Array, axes: str) -> tuple[Array, Array]:
    dtype = widest(a.dtype, b.dtype, jnp.float32)
    batch = a.shape[: len(axes_with(axes, "b"))]
    rank = a.shape[-1]
    a, b = (replicated(factor.astype(dtype)) for factor in (a, b))
    return a.reshape(*batch, -1, rank), b.reshape(*batch, rank, -1)


def svd_of_delta(part: Adapter) -> SVD:
    """The singular value decomposition of `s·a·b`, of which nothing larger than a factor is formed.

    With `a = q_a·r_a` and `bᵀ = q_b·r_b`, that of the small `s·r_a·r_bᵀ` is turned by `q_a` and `q_b`.
    """
    a, b = delta_matrices(part)
    q_a, r_a = jnp.linalg.qr(a)
    q_b, r_b = jnp.linalg.qr(b.mT)
    u, s, vt = jnp.linalg.svd(scale_of(part) * product(r_a, r_b.mT), full_matrices=False)
    return SVD(product(q_a, u), s, product(vt, q_b.mT))


def split(svd: SVD, rank: int, scale: float) -> tuple[Array, Array]:
    """Factors of a rank, (batch…, in, rank) and (batch…, rank, out), each with the root of the singular values.

    Eckart and Young (1936): no `scale·a·b` of this rank is nearer in the Frobenius norm.
    """
    root = jnp.sqrt(svd.s[..., :rank] / abs(scale))
    return math.copysign(1, scale) * svd.u[..., :rank] * root[..., None, :], root[..., None] * svd.vt[..., :rank, :]


def as_factors(a: Array, b: Array, axes: str, shape: Sequence[int]) -> dict[str, Array]:
    """Factors as an adapter keeps them for a kernel of a shape, of (batch…, in, rank) and (batch…, rank, out)."""
    rank = a.shape[-1]
    return {"a": a.reshape(sizes(axes_of_a(axes), shape, rank)), "b": b.reshape(sizes(axes_of_b(axes), shape, rank))}


def share_left(s: Array, rank: int) -> Array:
    """How much of a stack of matrices its best approximation of a rank leaves, as a share of the Frobenius norm."""
    norm = jnp.linalg.norm(s, axis=-1)
    return jnp.linalg.norm(s[..., rank:], axis=-1) / jnp.where(norm == 0, 1, norm)
