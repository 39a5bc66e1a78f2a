"""Norms of kernels: of the outputs of an adapted one, from the factors, and of the inputs of a base."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from .axes import RANK, axes_of_a, axes_of_b, axes_with
from .base import Base, Recorded, as_array
from .contract import Labeled, contract, widest
from .kernel import AdaptedKernel

_RANK_2 = RANK - 1  # a second label for the rank axis, for the Gram matrix of a factor


def norms(kernel: AdaptedKernel) -> Array:
    """Returns the Euclidean norm over the input axes, `(batch…, out…)`, in at least float32.

        ‖W0 + s·A·B‖² = ‖W0‖² + 2s·⟨W0ᵀA, B⟩ + s²·Bᵀ(AᵀA)B      for each output

    Args:
      kernel: any adapted kernel; its gain is ignored.
    """
    roles = kernel.roles
    if _is_stack_of_stored(kernel.w, roles):
        return lax.map(lambda layer: norms(dataclasses.replace(layer, roles=roles[1:])), kernel)
    dtype = widest(kernel.w.dtype, kernel.a.dtype, kernel.b.dtype, jnp.float32)
    w = Labeled(as_array(kernel.w).astype(dtype), tuple(range(kernel.w.ndim)))
    a = Labeled(kernel.a.astype(dtype) * kernel.scale, axes_of_a(roles))
    b = Labeled(kernel.b.astype(dtype), axes_of_b(roles))
    outputs = (*axes_with(roles, "b"), *axes_with(roles, "o"))
    w_squared = Labeled(jnp.sum(jnp.square(w.array), axes_with(roles, "i")), tuple(sorted(outputs))).in_order(outputs)
    a_2 = a._replace(labels=tuple(_RANK_2 if label == RANK else label for label in a.labels))
    high = lax.Precision.HIGHEST
    wa = contract(w, a, keep={*outputs, RANK}, precision=high).in_order(b.labels)
    gram = contract(a_2, a, keep={*axes_with(roles, "b"), _RANK_2, RANK}, precision=high)
    gram_b = contract(gram, b, keep={*outputs, _RANK_2}, precision=high)
    gram_b = gram_b._replace(labels=tuple(RANK if label == _RANK_2 else label for label in gram_b.labels))
    change = jnp.sum((2 * wa + gram_b.in_order(b.labels)) * b.array, b.labels.index(RANK))
    limits = jnp.finfo(dtype)
    # If the update cancels the kernel, the difference is a rounding error of this size, of either sign.
    return jnp.sqrt(jnp.maximum(w_squared + change, 4 * limits.eps * w_squared + limits.tiny))


def input_norms(w: Base, roles: Sequence[str]) -> Array:
    """Returns the Euclidean norm over the output axes, `(batch…, in…)`, in at least float32."""
    if _is_stack_of_stored(w, roles):
        return lax.map(lambda layer: input_norms(layer, roles[1:]), w)
    wide = as_array(w).astype(widest(w.dtype, jnp.float32))
    kept = sorted((*axes_with(roles, "b"), *axes_with(roles, "i")))
    squared = Labeled(jnp.sum(jnp.square(wide), axes_with(roles, "o")), tuple(kept))
    return jnp.sqrt(squared.in_order(axes_of_a(roles)[:-1]))


def _is_stack_of_stored(w: Base, roles: Sequence[str]) -> bool:
    """Whether to compute one layer at a time, so that only one is dequantized."""
    return isinstance(w, Recorded) and w.is_sliceable and roles[0] == "b"
