"""Linear algebra of kernels and factors, flattened to stacks of matrices `(batch…, in, out)`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .._errors import SpecError
from .adapter import Adapter
from .axes import axes_of_a, axes_of_b, axes_with, sizes
from .contract import widest
from .placement import replicated
from .values import in_device_memory, is_concrete, on_host
from .variant import LowRank


class SVD(NamedTuple):
    """The singular value decomposition of a stack of matrices: `(u·s) @ vt`, largest singular values first.

    Attributes:
      u: (batch…, in, k), with orthonormal columns.
      s: (batch…, k).
      vt: (batch…, k, out), with orthonormal rows.
    """

    u: Array
    s: Array
    vt: Array


def product(x: Array, y: Array) -> Array:
    """Returns `x @ y` at the highest precision; by default accelerators multiply float32 in bfloat16."""
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def identity_like(x: Array) -> Array:
    """Returns the identity matrix, so that it broadcasts against a stack of square matrices."""
    return lax.expand_dims(jnp.eye(x.shape[-1], dtype=x.dtype), range(x.ndim - 2))


def frobenius(x: Array) -> Array:
    """Returns the Frobenius norm of each matrix of a stack."""
    return jnp.linalg.norm(x, axis=(-2, -1))


def has_factors(part: Adapter) -> bool:
    """Whether the adapter of a kernel has factors `a` and `b`."""
    return isinstance(part.variant, LowRank) and {"a", "b"} <= set(part.arrays)


def scale_of(part: Adapter) -> float:
    """Returns s, by which the product of the factors is multiplied."""
    assert isinstance(part.variant, LowRank)
    return part.variant.scale


def kernel_matrix(w: Any, axes: str) -> Array:
    """Returns a kernel as (batch…, in, out), in at least float32."""
    array = jnp.asarray(in_device_memory(w))  # before the cast, for which JAX has no float64
    wide = replicated(array.astype(widest(array.dtype, jnp.float32)))
    by_role = [axes_with(axes, role) for role in "bio"]
    batch, d_in, d_out = ([wide.shape[axis] for axis in axes_of_role] for axes_of_role in by_role)
    ordered = jnp.transpose(wide, [axis for axes_of_role in by_role for axis in axes_of_role])
    return ordered.reshape(*batch, math.prod(d_in), math.prod(d_out))


def factor_matrices(part: Adapter) -> tuple[Array, Array]:
    """Returns `a` and `b` as (batch…, in, rank) and (batch…, rank, out), in at least float32, without the scale."""
    return _flattened(part.a, part.b, part.axes)


def delta_matrices(part: Adapter) -> tuple[Array, Array]:
    """Returns `factor_matrices` with the diagonal multiplied into the first; their product is the update without s."""
    assert isinstance(part.variant, LowRank)
    return _flattened(*part.variant.factors(part.arrays, part.axes), part.axes)


def diagonal_of(part: Adapter) -> Array | None:
    """Returns the diagonal between the factors, (batch…, rank), in at least float32; None if there is none."""
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
    """Returns the singular value decomposition of `s·a·b` without materializing `s·a·b`."""
    return svd_of_product(*delta_matrices(part), scale_of(part))


def svd_of_product(a: Array, b: Array, scale: float = 1.0) -> SVD:
    """Returns the singular value decomposition of `s·a·b`, for a of (batch…, in, rank) and b of (batch…, rank, out).

    With `a = q_a·r_a` and `bᵀ = q_b·r_b`, it follows from the decomposition of `s·r_a·r_bᵀ`, a rank × rank matrix.
    """
    q_a, r_a = jnp.linalg.qr(a)
    q_b, r_b = jnp.linalg.qr(b.mT)
    u, s, vt = jnp.linalg.svd(scale * product(r_a, r_b.mT), full_matrices=False)
    return SVD(product(q_a, u), s, product(vt, q_b.mT))


def factors_from_svd(svd: SVD, rank: int, scale: float) -> tuple[Array, Array]:
    """Returns factors, (batch…, in, rank) and (batch…, rank, out), each with the square root of the singular values.

    `scale·a·b` is the best approximation of this rank in the Frobenius norm (Eckart and Young, 1936). Beyond the number
    of singular values, the factors are zero.
    """
    root = jnp.sqrt(svd.s[..., :rank] / abs(scale))
    a = math.copysign(1, scale) * svd.u[..., :rank] * root[..., None, :]
    b = root[..., None] * svd.vt[..., :rank, :]
    batch, more = [(0, 0)] * (root.ndim - 1), (0, rank - root.shape[-1])
    return jnp.pad(a, [*batch, (0, 0), more]), jnp.pad(b, [*batch, more, (0, 0)])


def as_factors(a: Array, b: Array, axes: str, shape: Sequence[int]) -> dict[str, Array]:
    """Reshapes (batch…, in, rank) and (batch…, rank, out) to the factors of a kernel of shape `shape`."""
    rank = a.shape[-1]
    return {"a": a.reshape(sizes(axes_of_a(axes), shape, rank)), "b": b.reshape(sizes(axes_of_b(axes), shape, rank))}


def kernel_shape(part: Adapter) -> tuple[int, ...]:
    """Returns the shape of the kernel of an adapter with factors."""
    sizes_of = zip((*axes_of_a(part.axes), *axes_of_b(part.axes)), (*part.a.shape, *part.b.shape), strict=True)
    size = dict(sizes_of)
    return tuple(size[axis] for axis in range(len(part.axes)))


def rank_for_energy(s: Array, energy: float) -> int:
    """Returns the smallest rank that holds a fraction of the sum of the squares; of a stack, the largest among them.

    Raises:
      SpecError: if the singular values are traced.
    """
    if not is_concrete(s):
        raise SpecError(
            "Expected arrays with values, because `energy` determines the ranks from them; got traced arrays.\n"
            "  Call this outside `jit`, or pass a rank."
        )
    squares = np.cumsum(on_host(s).astype(np.float64) ** 2, axis=-1)
    return 1 + int(np.max((squares < energy * squares[..., -1:]).sum(-1), initial=0))


def truncation_error(s: Array, rank: int) -> Array:
    """Returns the relative error, in the Frobenius norm, of the best approximation of the given rank."""
    norm = jnp.linalg.norm(s, axis=-1)
    return jnp.linalg.norm(s[..., rank:], axis=-1) / jnp.where(norm == 0, 1, norm)
