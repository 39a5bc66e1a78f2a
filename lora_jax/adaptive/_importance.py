"""What each direction of an adapter matters to the loss, which of them are kept, and how the others go."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapter, Adapters
from .._core.contract import widest
from .._core.placement import replicated, sharded_as
from ._leaves import adaptive


class Importance(NamedTuple):
    """How much the loss depends on each number of AdaLoRA's leaves, smoothed over steps.

    Attributes:
      sensitivity: Ī, the mean of |w·g|: an adapter of numbers, in float32 or what is wider.
      uncertainty: Ū, the mean of |I - Ī|, likewise.
    """

    sensitivity: dict[str, Adapter]
    uncertainty: dict[str, Adapter]


def unmeasured(adapter: Adapters) -> Importance:
    """The importance before the first step: zeros.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> spec = {"**/kernel": lj.AdaLoRA(rank=2, alpha=2), "**/bias": lj.Full()}
    >>> adapter = lj.init(jax.random.key(0), {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, spec)
    >>> unmeasured(adapter).sensitivity
    {'kernel': Adapter(AdaLoRA(rank=2, alpha=2), 'io', a=float32[4, 2], b=float32[2, 3], e=float32[2])}

    Args:
      adapter: from `init`; leaves of other variants have no importance.

    Returns:
      Zeros in the shape of AdaLoRA's leaves.

    Raises:
      AdapterError: if there is none.
    """
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=widest(x.dtype, jnp.float32)), adaptive(adapter))
    return Importance(zeros, jax.tree.map(jnp.copy, zeros))  # two, as each may be donated


def measure(
    importance: Importance, gradient: Any, adapter: Adapters, *, beta1: float = 0.85, beta2: float = 0.85
) -> Importance:
    """Takes one step's gradient into the importance (Zhang et al. 2023, arXiv:2303.10512).

        I = |w·g|        Ī ← β₁·Ī + (1 - β₁)·I        Ū ← β₂·Ū + (1 - β₂)·|I - Ī|

    `w` is what `g` is the gradient at, as in the paper. In the loop of the authors' code, and of PEFT's example, the
    optimizer has moved `w` before.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> variant = lj.AdaLoRA(rank=1, alpha=1)
    >>> adapter = {"kernel": lj.Adapter(variant, "io", a=jnp.ones((2, 1)), e=jnp.ones(1), b=jnp.ones((1, 2)))}
    >>> gradient = jax.tree.map(lambda x: -4 * x, adapter)
    >>> measure(unmeasured(adapter), gradient, adapter, beta1=0.5, beta2=0.5).uncertainty["kernel"].e
    Array([1.], dtype=float32)

    Args:
      importance: before the step.
      gradient: of the loss, at the adapter.
      adapter: before the step.
      beta1: β₁, of the sensitivity.
      beta2: β₂, of the uncertainty.

    Returns:
      That after the step.
    """

    def now(mean: Array, w: Array, g: Array) -> Array:
        return jnp.abs(w.astype(mean.dtype) * g.astype(mean.dtype))

    def smoothed(beta: float, old: Array, new: Array) -> Array:
        return beta * old + (1 - beta) * new

    here = jax.tree.map(now, importance.sensitivity, adaptive(adapter), adaptive(gradient))
    sensitivity = jax.tree.map(lambda *its: smoothed(beta1, *its), importance.sensitivity, here)
    distance = jax.tree.map(lambda one, other: jnp.abs(one - other), here, sensitivity)
    uncertainty = jax.tree.map(lambda *its: smoothed(beta2, *its), importance.uncertainty, distance)
    return Importance(sensitivity, uncertainty)


def scores(importance: Importance) -> dict[str, Array]:
    """The score of each direction: that of its `e`, and the means of those of its column of `a` and its row of `b`.

        S_k = s(e_k) + mean_i s(a_ik) + mean_j s(b_kj),      s = Ī·Ū

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> adapter = lj.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, {"kernel": lj.AdaLoRA(rank=2, alpha=2)})
    >>> scores(unmeasured(adapter))
    {'kernel': Array([0., 0.], dtype=float32)}

    Args:
      importance: from `measure`.

    Returns:
      `{path: (batch…, rank)}`.
    """
    parts = jax.tree.map(jnp.multiply, importance.sensitivity, importance.uncertainty)
    return {path: _of_directions(part) for path, part in parts.items()}


def _of_directions(part: Adapter) -> Array:
    batch = part.e.ndim - 1
    of_a = part.a.mean(range(batch, part.a.ndim - 1))
    of_b = part.b.mean(range(batch + 1, part.b.ndim))
    return part.e + of_a + of_b


def keep(scores: Mapping[str, Array], budget: Any) -> dict[str, Array]:
    """Picks the directions of the highest scores over all kernels and layers, and never more than the budget.

    Of equal scores the first ones are kept, in the order of paths; PEFT drops all that equal the last one dropped.

    >>> import jax.numpy as jnp
    >>> kept = keep({"up": jnp.array([3.0, 1.0]), "down": jnp.array([2.0, 1.0])}, 3)
    >>> kept["up"].tolist(), kept["down"].tolist()
    ([True, False], [True, True])

    Args:
      scores: from `scores`.
      budget: how many, over all; may be traced.

    Returns:
      `{path: (batch…, rank)}`, True for those that are kept.
    """
    each = {path: replicated(scores[path]) for path in sorted(scores)}
    order = jnp.argsort(jnp.concatenate([its.ravel() for its in each.values()]), descending=True)
    kept = jnp.argsort(order) < budget
    ends = itertools.accumulate(its.size for its in each.values())
    return {
        path: kept[end - its.size : end].reshape(its.shape) for (path, its), end in zip(each.items(), ends, strict=True)
    }


def prune(adapter: Adapters, kept: Mapping[str, Array]) -> dict[str, Adapter]:
    """Sets `e` to zero where a direction is not kept; all else stays.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> part = lj.Adapter(lj.AdaLoRA(rank=2, alpha=2), "io", a=jnp.ones((4, 2)), e=jnp.ones(2), b=jnp.ones((2, 3)))
    >>> prune({"kernel": part}, {"kernel": jnp.array([False, True])})["kernel"].e.tolist()
    [0.0, 1.0]

    Args:
      adapter: from training.
      kept: from `keep`.

    Returns:
      The adapter, of the same shapes; `compact` makes them smaller.
    """
    pruned = {path: jnp.where(sharded_as(its, adapter[path].e), adapter[path].e, 0) for path, its in kept.items()}
    return dict(adapter) | {path: with_e(adapter[path], e) for path, e in pruned.items()}


def with_e(part: Adapter, e: Array) -> Adapter:
    """The part with another `e`."""
    return Adapter(part.variant, part.axes, **{**part.arrays, "e": e})
