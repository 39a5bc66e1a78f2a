"""The norm of each output of an adapted kernel, from its factors: the sum `W0 + s·A·B` is not formed."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from .axes import RANK, axes_of_a, axes_of_b, axes_with
from .base import as_array
from .contract import Labelled, contract, widest
from .kernel import AdaptedKernel

_OTHER = RANK - 1  # the rank axis of the same factor, once more


def norms(kernel: AdaptedKernel) -> Array:
    """The Euclidean norm over the input axes, `(batch…, out…)`, in float32 or wider.

        ‖W0 + s·A·B‖² = ‖W0‖² + 2s·⟨W0ᵀA, B⟩ + s²·Bᵀ(AᵀA)B      for each output

    Args:
      kernel: any adapted kernel; its own gain does not count.
    """
    roles = kernel.roles
    dtype = widest(kernel.w.dtype, kernel.a.dtype, kernel.b.dtype, jnp.float32)
    w = Labelled(as_array(kernel.w).astype(dtype), tuple(range(kernel.w.ndim)))
    a = Labelled(kernel.a.astype(dtype) * kernel.scale, axes_of_a(roles))
    b = Labelled(kernel.b.astype(dtype), axes_of_b(roles))
    outputs = (*axes_with(roles, "b"), *axes_with(roles, "o"))
    own = Labelled(jnp.sum(jnp.square(w.array), axes_with(roles, "i")), tuple(sorted(outputs))).in_order(outputs)
    again = a._replace(labels=tuple(_OTHER if label == RANK else label for label in a.labels))
    high = lax.Precision.HIGHEST
    met = contract(w, a, keep={*outputs, RANK}, precision=high).in_order(b.labels)
    gram = contract(again, a, keep={*axes_with(roles, "b"), _OTHER, RANK}, precision=high)
    through = contract(gram, b, keep={*outputs, _OTHER}, precision=high)
    through = through._replace(labels=tuple(RANK if label == _OTHER else label for label in through.labels))
    change = jnp.sum((2 * met + through.in_order(b.labels)) * b.array, b.labels.index(RANK))
    return jnp.sqrt(jnp.maximum(own + change, jnp.finfo(dtype).tiny))
