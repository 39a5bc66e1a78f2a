"""Optimizers that treat `a` and `b` as factors of one product: LoRA+, LoRA-FA, Riemannian preconditioning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from .._core.adapter import Adapter, check_adapter
from .._core.linalg import diagonal_of, factor_matrices, has_factors, identity_like, product, scale_of
from .._core.paths import Patterns
from .._core.placement import sharded_as
from .._errors import AdapterError
from ._masks import ONLY_ADAPTER, label_arrays, select


def lora_plus(ratio: float, *, paths: Patterns = "**", exclude: Patterns = ()) -> optax.GradientTransformationExtraArgs:
    """Multiplies the learning rate of every `b` by `ratio` (LoRA+, Hayou et al. 2024, arXiv:2402.12354).

    Use it last in a chain, after the learning rate. It multiplies the updates of `b`, including their weight decay, as
    a parameter group with a separate learning rate would. All other arrays, such as those of `Full` leaves, keep the
    learning rate of `a`; the paper does not cover them. (PEFT also applies the ratio to vectors, and a fixed rate of
    1e-6 to factors of embeddings.) Factors of embeddings are treated like others, because they are initialized in the
    same way; `exclude="**/embedding"` leaves them out.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> adapter = {"kernel": lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=jnp.ones((2, 1)), b=jnp.zeros((1, 2)))}
    >>> tx = optax.chain(optax.sgd(0.5), lj.optim.lora_plus(16))
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, adapter), tx.init(adapter), adapter)
    >>> updates["kernel"].a.tolist(), updates["kernel"].b.tolist()
    ([[-0.5], [-0.5]], [[-8.0, -8.0]])

    Args:
      ratio: λ, at least 1 in the paper, which recommends about 16.
      paths: patterns for the leaves whose `b` it applies to.
      exclude: patterns for leaves that it does not apply to.

    Returns:
      A transformation of an adapter's updates, without state.

    Raises:
      AdapterError: from `init` and `update`, if a pattern matches nothing or no leaf has a `b`.
    """
    return optax.masked(optax.scale(ratio), select("b", paths=paths, exclude=exclude))


def lora_fa(tx: optax.GradientTransformation, *, damping: float = 1e-8) -> optax.GradientTransformationExtraArgs:
    """Trains `b` and keeps `a` at its initial value (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303).

        g_b ← (aᵀ·a + δ·1)⁻¹·g_b / s²

    With this gradient, a step changes `s·a·b` as closely as possible to a step of full fine-tuning. The optimizer
    receives all arrays except `a`, and keeps no state for `a`. Under `jit` the compiler removes the gradients of `a`,
    so the activations that `a` is multiplied with are not stored. `tx` trains `Full` leaves unchanged.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> adapter = {"kernel": lj.Adapter(lj.LoRA(rank=1, alpha=2), "io", a=jnp.ones((2, 1)), b=jnp.zeros((1, 2)))}
    >>> tx = lj.optim.lora_fa(optax.sgd(1.0))
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, adapter), tx.init(adapter), adapter)
    >>> updates["kernel"].a.tolist(), updates["kernel"].b.tolist()
    ([[0.0], [0.0]], [[-0.125, -0.125]])

    Args:
      tx: any optax optimizer, such as `optax.adamw(1e-3)`.
      damping: δ.

    Returns:
      A transformation of an adapter's gradients; `update` needs the adapter as `params`. Its state is that of `tx` for
      the trained arrays.

    Raises:
      AdapterError: from `update`, if `params` is missing, not an adapter, or in a stack (`many`); if a scale is 0.
    """

    def precondition(gradient: Adapter, part: Adapter) -> dict[str, Array]:
        gram, scale = _grams(part)[0], scale_of(part)
        if not scale:
            raise AdapterError(
                f"Expected a nonzero scale, by whose square the gradient of `b` is divided; got {part.variant}.\n"
                "  Choose another `alpha`, or leave this kernel out of the spec."
            )
        return {"b": product(_inverse(gram, damping), factor_matrices(gradient)[1]) / scale**2}

    def labels(adapter: Any) -> Any:
        return label_arrays(adapter, lambda path, name: "frozen" if name == "a" else "trained")

    transforms = {"frozen": optax.set_to_zero(), "trained": tx}
    return optax.chain(_preconditioned(precondition), optax.partition(transforms, labels))


def riemannian(*, damping: float = 1e-2) -> optax.GradientTransformation:
    """Preconditions the gradient of each factor with the other factor (Zhang and Pilanci 2024, arXiv:2402.02347).

        g_a ← g_a·(b·bᵀ + δ·1)⁻¹        g_b ← (aᵀ·a + δ·1)⁻¹·g_b

    For small δ, the change of `s·a·b` in a step does not depend on how the product is split into `a` and `b`. Use it
    first in a chain: `optax.chain(riemannian(), optax.adamw(1e-3))`. Gradients of other arrays pass unchanged.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> adapter = {"kernel": lj.Adapter(lj.LoRA(rank=1, alpha=2), "io", a=jnp.ones((2, 1)), b=jnp.ones((1, 2)))}
    >>> tx = lj.optim.riemannian(damping=2.0)
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, adapter), tx.init(adapter), adapter)
    >>> updates["kernel"].a.tolist(), updates["kernel"].b.tolist()
    ([[0.25], [0.25]], [[0.25, 0.25]])

    Args:
      damping: δ, which keeps the inverses finite while `b` is zero or close to it.

    Returns:
      A transformation of an adapter's gradients, without state; `update` needs the adapter as `params`.

    Raises:
      AdapterError: from `update`, if `params` is missing, not an adapter, or in a stack (`many`).
    """

    def precondition(gradient: Adapter, part: Adapter) -> dict[str, Array]:
        (gram_a, gram_b), (g_a, g_b) = _grams(part), factor_matrices(gradient)
        # δ may be smaller than the rounding error that `pinv` assumes by default, and counts in spite of that.
        of_a, of_b = (_inverse(gram, damping, float(jnp.finfo(gram.dtype).eps)) for gram in (gram_a, gram_b))
        return {"a": product(g_a, of_b), "b": product(of_a, g_b)}

    return _preconditioned(precondition)


Precondition = Callable[[Adapter, Adapter], dict[str, Array]]


def _preconditioned(precondition: Precondition) -> optax.GradientTransformation:
    """Replaces the gradients of factors by those that `precondition` returns, as matrices."""

    def update_part(gradient: Adapter, part: Adapter) -> Adapter:
        if not has_factors(part):
            if {"a", "b"} <= set(part.arrays):  # a leaf of a stack, whose scale and rank are not static
                raise AdapterError(
                    f"Expected an adapter that is not in a stack; got {part.variant}.\n"
                    "  Precondition the gradients of adapters from many.unstack, one by one; or use another optimizer."
                )
            return gradient
        new = {name: _like(gradient.arrays[name], matrix) for name, matrix in precondition(gradient, part).items()}
        return Adapter(gradient.variant, gradient.axes, **{**gradient.arrays, **new})

    def update(gradients: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        if params is None:
            raise AdapterError("Expected `params`, the adapter; got None.\n  Call tx.update(gradient, state, adapter).")
        check_adapter(params, ONLY_ADAPTER)
        return jax.tree.map(update_part, gradients, params, is_leaf=lambda node: isinstance(node, Adapter)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _grams(part: Adapter) -> tuple[Array, Array]:
    """Returns `aᵀ·a` and `b·bᵀ`; if the product is `a·diag(e)·b`, those of `a·diag(e)` and `diag(e)·b`."""
    a, b = factor_matrices(part)
    grams, diagonal = (product(a.mT, a), product(b, b.mT)), diagonal_of(part)
    if diagonal is None:
        return grams
    outer = diagonal[..., :, None] * diagonal[..., None, :]
    return grams[0] * outer, grams[1] * outer


def _like(gradient: Array, matrix: Array) -> Array:
    return sharded_as(matrix.reshape(gradient.shape).astype(gradient.dtype), gradient)


def _inverse(gram: Array, damping: float, rtol: float | None = None) -> Array:
    """Inverts a stack of symmetric matrices after adding `damping` to the diagonal; pseudo-inverse if singular."""
    return jnp.linalg.pinv(gram + damping * identity_like(gram), rtol, hermitian=True)
