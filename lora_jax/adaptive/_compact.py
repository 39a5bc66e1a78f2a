"""Converts adaptive leaves to plain ones of a lower rank."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .._core.adapter import Adapter, Adapters
from .._core.placement import replicated, sharded_as
from .._core.values import is_concrete, on_host
from .._errors import AdapterError
from .._variants import AdaLoRA, LoRA
from ._leaves import adaptive


def compact(adapter: Adapters) -> dict[str, Adapter]:
    """Converts leaves of `AdaLoRA` to plain `LoRA`, each of its remaining rank.

    Directions whose `e` is zero are removed. For the others, `e` is multiplied into `a`. The adapted function is the
    same, up to rounding in the adapter's dtype, and so is the scale, because α changes with the rank. Kernels with no
    directions are removed from the adapter. The layers of a stack share the largest rank among them; layers with fewer
    directions are padded with zeros in both factors, which training does not change. Other leaves are unchanged. Does
    not work under `jit`, because the ranks depend on values.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> variant, e = lj.AdaLoRA(rank=3, alpha=6), jnp.array([0.0, 5.0, 0.0])
    >>> part = lj.Adapter(variant, "io", a=jnp.ones((4, 3)), e=e, b=jnp.ones((3, 3)))
    >>> small = compact({"kernel": part})
    >>> small, small["kernel"].variant.scale
    ({'kernel': Adapter(LoRA(rank=1, alpha=2.0), 'io', a=float32[4, 1], b=float32[1, 3])}, 2.0)

    Args:
      adapter: from training with `ada_lora`, or from `prune`.

    Returns:
      The adapter, which can be trained further, saved, merged or compressed like any other.

    Raises:
      AdapterError: if no leaf is of `AdaLoRA`, if no directions are left, or under `jit`.
    """
    parts = adaptive(adapter)
    if not all(isinstance(x, Array | np.ndarray) and is_concrete(x) for x in jax.tree.leaves(parts)):
        raise AdapterError(
            "Expected arrays with values, which determine the remaining ranks; got traced arrays or shapes.\n"
            "  Call compact outside `jit`; inside, use `prune`, which keeps the shapes."
        )
    ranks = {path: _is_left(part).sum(-1).max() for path, part in parts.items()}
    small = {
        path: _compacted(part, int(ranks[path])) if path in ranks else part
        for path, part in adapter.items()
        if ranks.get(path, 1)
    }
    if not small:
        raise AdapterError(
            f"Expected at least one direction with a nonzero `e`; `e` is zero in all {len(parts)} leaves.\n"
            "  Train the adapter first: `e` is initialized to zero, and the model is then the base."
        )
    return small


def _is_left(part: Adapter) -> np.ndarray:
    return on_host(part.e) != 0


def _compacted(part: Adapter, rank: int) -> Adapter:
    variant = part.variant
    assert isinstance(variant, AdaLoRA)
    left, batch = _is_left(part), part.e.ndim - 1
    indices = np.argsort(~left, axis=-1, kind="stable")[..., :rank]  # remaining directions first, then padding
    is_left = np.take_along_axis(left, indices, -1)

    def select(factor: Array, axis: int) -> Array:
        new_axes = tuple(other for other in range(batch, factor.ndim) if other != axis)
        small = jnp.take_along_axis(replicated(factor), np.expand_dims(indices, new_axes), axis)
        return sharded_as(jnp.where(np.expand_dims(is_left, new_axes), small, jnp.zeros_like(small)), factor)

    a, b = variant.factors(part.arrays, part.axes)
    plain = LoRA(rank=variant.rank, alpha=variant.alpha, dropout=variant.dropout).at_rank(rank)
    return Adapter(plain, part.axes, a=select(a, a.ndim - 1), b=select(b, batch))
