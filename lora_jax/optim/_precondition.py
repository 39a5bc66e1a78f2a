"""Optimizers that know that `a` and `b` are one product: LoRA+, LoRA-FA, Riemannian preconditioning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from .._core.adapter import Adapter, check_adapter
from .._core.linalg import diagonal_of, factor_matrices, has_factors, identity_like, product, scale_of
from .._core.placement import sharded_as
from .._errors import AdapterError
from ._masks import ONLY_ADAPTER, Patterns, labelled, select


def lora_plus(ratio: float, *, paths: Patterns = "**", exclude: Patterns = ()) -> optax.GradientTransformationExtraArgs:
    """Gives every `b` a learning rate `ratio` times that of all else (LoRA+, Hayou et al. 2024, arXiv:2402.12354).

    Stands last in a chain, behind the learning rate: it multiplies the updates of `b`, and the weight decay in them,
    which is what a parameter group with a learning rate of its own does. Only factors are told apart: `Full` leaves,
    biases among them, keep the rate of `a`, as the paper says nothing of them; so do all other arrays of a variant.
    (PEFT gives the ratio to every vector too, and to factors of embeddings a fixed rate of 1e-6.) An embedding's
    factors are treated as any kernel's, as they start in the same way; `exclude="**/embedding"` leaves them out.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> adapter = {"kernel": lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=jnp.ones((2, 1)), b=jnp.zeros((1, 2)))}
    >>> tx = optax.chain(optax.sgd(0.5), lj.optim.lora_plus(16))
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, adapter), tx.init(adapter), adapter)
    >>> updates["kernel"].a.tolist(), updates["kernel"].b.tolist()
    ([[-0.5], [-0.5]], [[-8.0, -8.0]])

    Args:
      ratio: λ, at least 1 in the paper, which recommends about 16.
      paths: patterns of the leaves whose `b` it is for.
      exclude: patterns of leaves that it is not for.

    Returns:
      A transformation of an adapter's updates, without a state of its own.

    Raises:
      AdapterError: from `init` and `update`, if a pattern matches nothing or no leaf has a `b`.
    """
    return optax.masked(optax.scale(ratio), select("b", paths=paths, exclude=exclude))


def lora_fa(tx: optax.GradientTransformation, *, damping: float = 1e-8) -> optax.GradientTransformationExtraArgs:
    """Trains `b` and leaves `a` as it started (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303).

        g_b ← (aᵀ·a + δ·1)⁻¹·g_b / s²

    That is the gradient whose step changes `s·a·b` as nearly as it can as full fine-tuning would. The optimizer gets
    all but the `a`s: it keeps no state for them, and under `jit` the compiler drops their gradients, and with those the
    need to keep the activations that meet `a`. `Full` leaves are trained by `tx` as they are.

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
      the arrays that are trained.

    Raises:
      AdapterError: from `update`, if `params` are missing or not an adapter.
    """

    def inside(gradient: Adapter, part: Adapter) -> dict[str, Array]:
        gram, _ = _grams(part)
        return {"b": product(_inverse(gram, damping), factor_matrices(gradient)[1]) / scale_of(part) ** 2}

    def role(adapter: Any) -> Any:
        return labelled(adapter, lambda path, name: "frozen" if name == "a" else "trained")

    return optax.chain(_preconditioned(inside), optax.partition({"frozen": optax.set_to_zero(), "trained": tx}, role))


def riemannian(*, damping: float = 1e-2) -> optax.GradientTransformation:
    """Preconditions both factors' gradients with the other factor (Zhang and Pilanci 2024, arXiv:2402.02347).

        g_a ← g_a·(b·bᵀ + δ·1)⁻¹        g_b ← (aᵀ·a + δ·1)⁻¹·g_b

    So, with a small δ, a step changes `s·a·b` in the same way however the product is split into `a` and `b`. Stands
    first in a chain, before the optimizer: `optax.chain(riemannian(), optax.adamw(1e-3))`. What is no factor passes.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> adapter = {"kernel": lj.Adapter(lj.LoRA(rank=1, alpha=2), "io", a=jnp.ones((2, 1)), b=jnp.ones((1, 2)))}
    >>> tx = lj.optim.riemannian(damping=2.0)
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, adapter), tx.init(adapter), adapter)
    >>> updates["kernel"].a.tolist(), updates["kernel"].b.tolist()
    ([[0.25], [0.25]], [[0.25, 0.25]])

    Args:
      damping: δ, which keeps the inverses finite while `b` is zero or nearly so.

    Returns:
      A transformation of an adapter's gradients, without a state; `update` needs the adapter as `params`.

    Raises:
      AdapterError: from `update`, if `params` are missing or not an adapter.
    """

    def inside(gradient: Adapter, part: Adapter) -> dict[str, Array]:
        (gram_a, gram_b), (g_a, g_b) = _grams(part), factor_matrices(gradient)
        return {"a": product(g_a, _inverse(gram_b, damping)), "b": product(_inverse(gram_a, damping), g_b)}

    return _preconditioned(inside)


Precondition = Callable[[Adapter, Adapter], dict[str, Array]]


def _preconditioned(precondition: Precondition) -> optax.GradientTransformation:
    """Replaces the gradients of factors, which `precondition` is given and returns as matrices."""

    def of_part(gradient: Adapter, part: Adapter) -> Adapter:
        if not has_factors(part):
            return gradient
        new = {name: _as(gradient.arrays[name], matrix) for name, matrix in precondition(gradient, part).items()}
        return Adapter(gradient.variant, gradient.axes, **{**gradient.arrays, **new})

    def update(gradients: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        if params is None:
            raise AdapterError("Expected the adapter with its gradient.\n  Call tx.update(gradient, state, adapter).")
        check_adapter(params, ONLY_ADAPTER)
        return jax.tree.map(of_part, gradients, params, is_leaf=lambda node: isinstance(node, Adapter)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _grams(part: Adapter) -> tuple[Array, Array]:
    """`aᵀ·a` and `b·bᵀ`, each factor with what stands between the two, as the other meets it."""
    a, b = factor_matrices(part)
    grams, between = (product(a.mT, a), product(b, b.mT)), diagonal_of(part)
    if between is None:
        return grams
    both_sides = between[..., :, None] * between[..., None, :]
    return grams[0] * both_sides, grams[1] * both_sides


def _as(gradient: Array, matrix: Array) -> Array:
    return sharded_as(matrix.reshape(gradient.shape).astype(gradient.dtype), gradient)


def _inverse(gram: Array, damping: float) -> Array:
    """The inverse of a stack of symmetric matrices with `damping` on the diagonal; the pseudo-inverse, if singular."""
    return jnp.linalg.pinv(gram + damping * identity_like(gram), hermitian=True)
