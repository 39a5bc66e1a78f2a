"""Plain adapters of what is left of adaptive ones."""

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
    """Makes plain `LoRA` adapters of AdaLoRA's, of the rank that each has left.

    Directions whose `e` is zero go; of the others `e` goes into `a`, which is how the adapted function has used it, so
    that the function is the same, up to rounding in the adapter's dtype, and so is the scale: α follows the rank.
    Kernels without a direction leave the adapter. The layers of a stack share a rank, the most that one of them has
    left, and the others have zeros there, in both factors, which training does not move. Other leaves stay as they are.
    Outside `jit`, as the ranks are values.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> variant, e = lj.AdaLoRA(rank=3, alpha=6), jnp.array([0.0, 5.0, 0.0])
    >>> part = lj.Adapter(variant, "io", a=jnp.ones((4, 3)), e=e, b=jnp.ones((3, 3)))
    >>> small = compact({"kernel": part})
    >>> small, small["kernel"].variant.scale
    ({'kernel': Adapter(LoRA(rank=1, alpha=2.0), 'io', a=float32[4, 1], b=float32[1, 3])}, 2.0)

    Args:
      adapter: from training with `ada_lora`, or from `prune`.

    Returns:
      The adapter, to be trained on, saved, merged or compressed as any other.

    Raises:
      AdapterError: if no leaf is AdaLoRA's, if no direction is left at all, or under `jit`.
    """
    parts = adaptive(adapter)
    if not all(isinstance(x, Array | np.ndarray) and is_concrete(x) for x in jax.tree.leaves(parts)):
        raise AdapterError(
            "Expected values, which say what is left of each rank; got a trace, or shapes alone.\n"
            "  Call compact outside `jit`; within it, `prune` keeps the shapes."
        )
    ranks = {path: _left(part).sum(-1).max() for path, part in parts.items()}
    small = {
        path: _compacted(part, int(ranks[path])) if path in ranks else part
        for path, part in adapter.items()
        if ranks.get(path, 1)
    }
    if not small:
        raise AdapterError(
            f"Expected a direction that is left; `e` is zero everywhere in {len(parts)} leaves.\n"
            "  It is at the start, before the first update: the model is then the base."
        )
    return small


def _left(part: Adapter) -> np.ndarray:
    return on_host(part.e) != 0


def _compacted(part: Adapter, rank: int) -> Adapter:
    variant = part.variant
    assert isinstance(variant, AdaLoRA)
    left, batch = _left(part), part.e.ndim - 1
    first = np.argsort(~left, axis=-1, kind="stable")[..., :rank]  # those that are left, then as many others as needed
    there = np.take_along_axis(left, first, -1)

    def chosen(factor: Array, axis: int) -> Array:
        others = tuple(at for at in range(batch, factor.ndim) if at != axis)
        places, its = np.expand_dims(first, others), np.expand_dims(there, others)
        small = jnp.take_along_axis(replicated(factor), places, axis)
        return sharded_as(jnp.where(its, small, jnp.zeros_like(small)), factor)

    a, b = variant.factors(part.arrays, part.axes)
    plain = LoRA(rank=variant.rank, alpha=variant.alpha, dropout=variant.dropout).at_rank(rank)
    return Adapter(plain, part.axes, a=chosen(a, a.ndim - 1), b=chosen(b, batch))
