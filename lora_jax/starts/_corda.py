"""CorDA: Context-Oriented Decomposition Adaptation of Large Language Models (Yang et al. 2024, arXiv:2406.05223)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapters
from .._core.linalg import SVD, factors_from_svd
from .._core.numbers import chosen, number
from .._core.paths import flatten
from .._errors import SpecError
from ._activations import Activations, check_activations
from ._leaf import Leaf, Start, initialize, low_rank_leaves, positive_scale


def corda(
    params: Any,
    adapter: Adapters,
    activations: Mapping[str, Activations],
    *,
    mode: Literal["ipm", "kpm"] = "ipm",
    damping: float = 0.01,
) -> Start:
    """Initializes the factors with the directions that given inputs use most, or least, and subtracts them.

        C = Σ xᵀx / c + δ·1,   C·W0 = U·S·Vᵀ,   A = C⁻¹·U_r·√(S_r/s),   B = √(S_r/s)·V_rᵀ,   W = W0 - s·A·B

    (Yang et al. 2024, arXiv:2406.05223; transposed, because Flax computes `x @ W`). In the instruction-previewed mode
    (`"ipm"`), U_r, S_r and V_r belong to the r largest singular values: with activations of the new task, they are the
    directions that it uses most. In the knowledge-preserved mode (`"kpm"`), they belong to the r smallest: with
    activations of what should be kept, training changes it least.

    `A·B` does not depend on the scale of C. The number c is such that the mean of the diagonal of C is 1 before δ is
    added, so that `A` and `B` separately do not depend on the scale of the activations either. In the code of the
    authors and in PEFT they depend on it, and on the number of tokens.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import starts
    >>> params = {"kernel": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
    >>> apply = lambda params, x: x @ params["kernel"]
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=1, alpha=1)})
    >>> seen = starts.activations(apply, params, adapter, jnp.array([[0.1, 0.1, 5.0], [0.1, -0.1, 5.0]]))
    >>> residual, adapter = starts.corda(params, adapter, seen)
    >>> jnp.abs(jnp.round(jnp.diag(residual["kernel"]), 1))  # the inputs are close to the third direction
    Array([3., 2., 0.], dtype=float32)

    Args:
      params: the parameter tree that the adapter was initialized for; not modified.
      adapter: from `init`; its factors are replaced.
      activations: by path, from `activations`; of one batch, or summed over several.
      mode: `"ipm"` or `"kpm"`.
      damping: δ, which bounds the inverse for directions in which there are few inputs or none.

    Returns:
      The changed base `W0 - s·A·B`, rounded as in `pissa`, and the adapter.

    Raises:
      SpecError: if `mode` has another value; if `damping` or a scale is not positive.
      AdapterError: if the adapter does not fit `params` or adapts only some layers of a stack; if `activations` does
        not fit the adapter, or has no rows for a layer; if an adapted kernel is quantized.
    """
    smallest = chosen("mode", mode, ("ipm", "kpm")) == "kpm"
    if not number("damping", damping) > 0:
        raise SpecError(f"Expected a positive number for `damping`; got damping={damping}.")
    check_activations(low_rank_leaves(adapter, flatten(params)[0]), activations)

    def method(leaf: Leaf) -> tuple[Array, Array]:
        rank, w = leaf.variant.rank, leaf.matrices
        gram = activations[leaf.path].gram.astype(w.dtype)
        mean = jnp.trace(gram, axis1=1, axis2=2)[:, None, None] / gram.shape[-1]
        c = gram / jnp.maximum(mean, jnp.finfo(w.dtype).tiny) + damping * jnp.eye(gram.shape[-1], dtype=w.dtype)[None]
        u, s, vt = jnp.linalg.svd(c @ w, full_matrices=False)
        if smallest:
            u, s, vt = u[..., -rank:], s[..., -rank:], vt[..., -rank:, :]
        a, b = factors_from_svd(SVD(u, s, vt), rank, positive_scale(leaf))
        return jnp.linalg.solve(c, a), b

    return initialize(params, adapter, method, changes_base=True)
