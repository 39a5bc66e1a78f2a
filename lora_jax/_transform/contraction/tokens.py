"""Kernels whose factors apply only to some tokens (aLoRA): finds the token axes of a result and masks the rest."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from ..._core.contract import Labels
from ..._core.kernel import AdaptedKernel
from ..._core.sizes import may_exceed

NO_TOKENS = "its adapter applies only to some tokens, and here it is not multiplied with one activation per token"


def mask_inactive(kernel: AdaptedKernel, term: Array, labels: Labels) -> Array:
    """Returns the low-rank term for active tokens, and zero for the others even where the term is not finite."""
    other_axes = set(range(term.ndim)) - set(_token_axes(kernel, labels))
    return jnp.where(lax.expand_dims(kernel.active, sorted(other_axes)), term, jnp.zeros_like(term))


def token_problem(kernel: AdaptedKernel, labels: Labels, shape: Sequence[int]) -> str | None:
    """Returns why `active_tokens` cannot be matched to the token axes of a result, or None."""
    expected, got = tuple(kernel.active.shape), tuple(shape[at] for at in _token_axes(kernel, labels))
    if got != expected:
        return f"expected token axes of shape {expected}, as `active_tokens` has; got {got}"
    wide = [size for size in expected if may_exceed(size, 1)]
    if len(set(wide)) < len(wide):
        return (
            f"`active_tokens` has the shape {expected}, so its axes could be in either order; "
            "pad the tokens to another length"
        )
    return None


def _token_axes(kernel: AdaptedKernel, labels: Labels) -> list[int]:
    """The axes of a result that are not axes of the kernel, in the order of `x`."""
    return [at for at, label in enumerate(labels) if label >= kernel.w.ndim]
