"""Measures of one kernel and its update, batched over a stack of kernels."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._core.adapter import Adapter
from .._core.contract import widest
from .._core.kernel import materialize
from .._core.linalg import (
    SVD,
    delta_matrices,
    factors_from_svd,
    frobenius,
    kernel_matrix,
    product,
    scale_of,
    svd_of_delta,
    svd_of_product,
    truncation_error,
)


class Amplification(NamedTuple):
    """How much an update amplifies directions that the kernel has but does not emphasize. Each field is (batch…).

    Attributes:
      delta: ‖ΔW‖.
      kernel: ‖W0‖.
      along_delta: ‖Uᵀ·W0·V‖, where U and V are the singular vectors of ΔW.
      along_kernel: the same with the first singular vectors of W0, which is the maximum.
      along_random: the same with random orthonormal vectors, as root mean square.
      factor: ‖ΔW‖ / ‖Uᵀ·W0·V‖.
    """

    delta: Array
    kernel: Array
    along_delta: Array
    along_kernel: Array
    along_random: Array
    factor: Array


class Intruders(NamedTuple):
    """The first singular vectors of an adapted kernel, compared with those of its base.

    Attributes:
      similarity: (batch…, top), the largest |cos| of each with any singular vector of the base.
      intruder: (batch…, top), True where the similarity is below the threshold.
      singular_values: (batch…, top), of the adapted kernel.
      number: (batch…), the number of intruders.
    """

    similarity: Array
    intruder: Array
    singular_values: Array
    number: Array


@jax.jit
def singular_values(part: Adapter) -> Array:
    """Returns the singular values of `s·a·b`: (batch…, rank)."""
    return svd_of_delta(part).s


def directions(part: Adapter, of: str) -> Array:
    """Returns the singular vectors of a factor, largest singular value first: (batch…, d, rank)."""
    a, b = delta_matrices(part)
    return jnp.linalg.svd(a if of == "a" else b.mT, full_matrices=False)[0]


@jax.jit
def similarity(one: Array, other: Array) -> Array:
    """Returns φ(i, j) = ‖U_iᵀ·U'_j‖² / min(i, j) of two stacks of matrices with orthonormal columns."""
    overlap = jnp.cumsum(jnp.cumsum(product(one.mT, other) ** 2, axis=-1), axis=-2)
    i, j = (jnp.arange(1, size + 1) for size in overlap.shape[-2:])
    smaller = jnp.minimum(i[:, None], j[None]).astype(overlap.dtype)
    return overlap / lax.expand_dims(smaller, range(overlap.ndim - 2))


@jax.jit
def relative_norm(w: Array, part: Adapter) -> Array:
    """Returns ‖s·a·b‖ / ‖w‖."""
    return jnp.linalg.norm(svd_of_delta(part).s, axis=-1) / frobenius(kernel_matrix(w, part.axes))


@jax.jit
def amplification(w: Array, part: Adapter) -> Amplification:
    """Projects `w` onto the directions of `s·a·b`, onto the first singular vectors of `w`, and onto random ones."""
    u, s, vt = svd_of_delta(part)
    matrix = kernel_matrix(w, part.axes)
    (d_in, d_out), rank = matrix.shape[-2:], s.shape[-1]
    delta, kernel = jnp.linalg.norm(s, axis=-1), frobenius(matrix)
    along_delta = frobenius(product(product(u.mT, matrix), vt.mT))
    largest = jnp.linalg.svd(matrix, compute_uv=False)[..., :rank]
    return Amplification(
        delta=delta,
        kernel=kernel,
        along_delta=along_delta,
        along_kernel=jnp.linalg.norm(largest, axis=-1),
        along_random=kernel * rank / math.sqrt(d_in * d_out),
        factor=delta / along_delta,
    )


@jax.jit(static_argnames="top")
def intruders(w: Array, part: Adapter, top: int, threshold: float) -> Intruders:
    """Compares the singular vectors of the adapted kernel, on its output side, with those of `w`."""
    similarity, svd = compare(w, part, top)
    intruder = similarity < threshold
    return Intruders(similarity, intruder, svd.s, intruder.sum(axis=-1))


def compare(w: Array, part: Adapter, top: int) -> tuple[Array, SVD]:
    """Returns the first singular vectors of the adapted kernel, and the largest |cos| of each with any of `w`'s."""
    wide = w.astype(widest(jnp.float32, w.dtype, *(array.dtype for array in part.arrays.values())))
    adapted: Any = part.variant.apply(wide, part.arrays, part.axes, "")
    matrices = [kernel_matrix(kernel, part.axes) for kernel in (wide, materialize(adapted))]
    batch = matrices[0].shape[:-2]

    def compare_layer(layer: tuple[Array, Array]) -> tuple[Array, SVD]:
        base, tuned = layer
        (_, _, base_vt), (u, s, vt) = (jnp.linalg.svd(x, full_matrices=False) for x in (base, tuned))
        return jnp.max(jnp.abs(product(vt[:top], base_vt.mT)), axis=-1), SVD(u[:, :top], s[:top], vt[:top])

    layers = tuple(x.reshape(-1, *x.shape[-2:]) for x in matrices)
    found: tuple[Array, SVD] = jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), lax.map(compare_layer, layers))
    return found


class Reduced(NamedTuple):
    """Factors of an update with scaled intruders.

    Attributes:
      a: (batch…, in, rank).
      b: (batch…, rank, out).
      changed: (batch…), whether there were intruders; the factors are new in any case.
      error: (batch…), the relative error of the update in the Frobenius norm from keeping the rank.
    """

    a: Array
    b: Array
    changed: Array
    error: Array


@jax.jit(static_argnames="top")
def reduce_intruders(w: Array, part: Adapter, top: int, threshold: float, scale: float) -> Reduced:
    """Multiplies the intruders of the adapted kernel by `scale`, and truncates the update to its rank."""
    similarity, svd = compare(w, part, top)
    intruder = similarity < threshold
    weights = jnp.where(intruder, (scale - 1) * svd.s, jnp.zeros_like(svd.s))
    a, b = delta_matrices(part)
    factors = jnp.concatenate([scale_of(part) * a, svd.u * weights[..., None, :]], -1), jnp.concatenate([b, svd.vt], -2)
    reduced, rank = svd_of_product(*factors), a.shape[-1]
    error = truncation_error(reduced.s, rank)
    return Reduced(*factors_from_svd(reduced, rank, scale_of(part)), intruder.any(-1), error)
