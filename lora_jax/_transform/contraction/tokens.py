"""Kernels whose factors act on some tokens alone (aLoRA): which axes are those of tokens, and what the others have."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from ..._core.contract import Labels
from ..._core.kernel import AdaptedKernel
from ..._core.sizes import may_exceed

NO_TOKENS = "it acts on some tokens alone, and here it is not multiplied with activations of each token"


def of_active(kernel: AdaptedKernel, term: Array, labels: Labels) -> Array:
    """What active tokens have of a low-rank term; the others have zero, whatever the term is."""
    others = set(range(term.ndim)) - set(_token_axes(kernel, labels))
    return jnp.where(lax.expand_dims(kernel.active, sorted(others)), term, jnp.zeros_like(term))


def misfit(kernel: AdaptedKernel, labels: Labels, shape: Sequence[int]) -> str | None:
    """Why the axes of tokens of a contraction's result are not sure to be those of `active_tokens`, or None."""
    expected, got = tuple(kernel.active.shape), tuple(shape[at] for at in _token_axes(kernel, labels))
    if got != expected:
        return f"it acts on some tokens alone, `active_tokens` have the shape {expected}, and here is {got}"
    wide = [size for size in expected if may_exceed(size, 1)]
    if len(set(wide)) < len(wide):
        return (
            f"it acts on some tokens alone, and `active_tokens` of the shape {expected} would fit either way round; "
            "pad the tokens to another length"
        )
    return None


def _token_axes(kernel: AdaptedKernel, labels: Labels) -> list[int]:
    """The axes of a result that are not the kernel's, in the order in which `x` has them."""
    return [at for at, label in enumerate(labels) if label >= kernel.w.ndim]
