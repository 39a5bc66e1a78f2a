"""Reduces intruder dimensions of trained adapters."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from .._core.adapter import Adapter, Adapters
from .._core.attach import as_jax, check
from .._core.base import dense
from .._core.linalg import as_factors, kernel_shape
from .._core.numbers import integer, number
from .._core.paths import flatten
from .._core.placement import sharded_as
from .._errors import AdapterError, listed
from .._variants import LoRA, RSLoRA
from . import _matrix


def reduce_intruders(
    params: Any, adapter: Adapters, *, scale: float = 0.75, top: int = 10, threshold: float = 0.5
) -> tuple[dict[str, Adapter], dict[str, Array]]:
    """Scales down the intruder dimensions of an adapter (Shuttleworth et al. 2024, arXiv:2410.21228).

        W0 + s·A'·B' ≈ W + (λ - 1)·Σ_i σ_i·u_i·v_iᵀ        W = W0 + s·A·B, i over the intruders of W

    Intruders are those that `intruders` finds. The sum adds to the rank of the update, so the result is truncated to
    the rank of the leaf, by a decomposition of the factors. Smaller λ forget less of what the base knows, and keep less
    of what the intruders have learned; λ = 1 keeps all of it, up to rounding. Layers without intruders, and
    leaves of `Full` and `LoRABias`, are unchanged, bit for bit. Works under `jit`.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.diag(jnp.arange(1.0, 17))}
    >>> part = lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=jnp.ones((16, 1)), b=jnp.full((1, 16), 10.0))
    >>> reduced, residual = lj.analysis.reduce_intruders(params, {"kernel": part}, scale=0.5)
    >>> norms = [lj.analysis.relative_norms(params, adapter)["kernel"] for adapter in ({"kernel": part}, reduced)]
    >>> round(float(norms[1] / norms[0]), 1)
    0.5

    Args:
      params: the base that the adapter was trained on.
      adapter: from training or `restore`.
      scale: λ, by which each intruder is multiplied.
      top: as in `intruders`.
      threshold: as in `intruders`.

    Returns:
      The adapter, of the same structure, shapes and dtypes; and for each leaf with factors the relative error of the
      update in the Frobenius norm from keeping the rank, of shape (batch…), 0 where nothing changed.

    Raises:
      AdapterError: if the adapter does not fit `params`; for leaves other than those of LoRA, rsLoRA, `Full` and
        `LoRABias`, whose update cannot be replaced by two factors.
      SpecError: for a `scale` that is not a number, or a `top` below 1.
    """
    leaves = flatten(params)[0]
    check(leaves, adapter)
    scale, top = number("scale", scale), integer("top", top, least=1)
    bad = [
        f"{path!r}: {part.variant}"
        for path, part in adapter.items()
        if part.variant.needs_axes and not isinstance(part.variant, LoRA | RSLoRA)
    ]
    if bad:
        raise AdapterError(
            f"Expected leaves whose update is s·A·B; got {len(bad)} others.\n{listed(bad)}\n"
            "  Merge the adapter, take the change with extract(base, merged, spec), and reduce its intruders."
        )
    reduced, residual = dict(adapter), {}
    for path, part in adapter.items():
        if isinstance(part.variant, LoRA | RSLoRA) and part.variant.scale:
            kernel = dense(as_jax(leaves[path]))
            found = _matrix.reduce_intruders(kernel, part, top=top, threshold=threshold, scale=scale)
            reduced[path], residual[path] = _replaced(part, found)
    return reduced, residual


def _replaced(part: Adapter, found: _matrix.Reduced) -> tuple[Adapter, Array]:
    arrays = {}
    for name, new in as_factors(found.a, found.b, part.axes, kernel_shape(part)).items():
        old = jnp.asarray(part.arrays[name])
        changed = lax.expand_dims(found.changed, range(found.changed.ndim, old.ndim))
        arrays[name] = jnp.where(changed, sharded_as(new.astype(old.dtype), old), old)
    return Adapter(part.variant, part.axes, **arrays), jnp.where(found.changed, found.error, 0)
