"""Importance scores of an adapter's directions, and pruning by them."""

from __future__ import annotations

import functools
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
    """How much the loss depends on each parameter of AdaLoRA's leaves, smoothed over steps.

    Attributes:
      sensitivity: Ī, the moving average of |w·g|, as a tree like the adapter, in float32 or wider.
      uncertainty: Ū, the moving average of |I - Ī|, likewise.
    """

    sensitivity: dict[str, Adapter]
    uncertainty: dict[str, Adapter]


def unmeasured(adapter: Adapters) -> Importance:
    """Returns the importance before the first step, which is zero.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> spec = {"**/kernel": lj.AdaLoRA(rank=2, alpha=2), "**/bias": lj.Full()}
    >>> adapter = lj.init(jax.random.key(0), {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, spec)
    >>> unmeasured(adapter).sensitivity
    {'kernel': Adapter(AdaLoRA(rank=2, alpha=2), 'io', a=float32[4, 2], b=float32[2, 3], e=float32[2])}

    Args:
      adapter: from `init`; leaves of other variants have no importance.

    Returns:
      Zeros in the shapes of AdaLoRA's leaves.

    Raises:
      AdapterError: if no leaf is of `AdaLoRA`.
    """
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=widest(x.dtype, jnp.float32)), adaptive(adapter))
    return Importance(zeros, jax.tree.map(jnp.copy, zeros))  # a copy, because both may be donated


def measure(
    importance: Importance, gradient: Any, adapter: Adapters, *, beta1: float = 0.85, beta2: float = 0.85
) -> Importance:
    """Updates the importance with the gradient of one step (Zhang et al. 2023, arXiv:2303.10512).

        I = |w·g|        Ī ← β₁·Ī + (1 - β₁)·I        Ū ← β₂·Ū + (1 - β₂)·|I - Ī|

    `g` is the gradient at `w`, as in the paper. In the authors' code and in PEFT's example, the optimizer has already
    updated `w`.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> variant = lj.AdaLoRA(rank=1, alpha=1)
    >>> adapter = {"kernel": lj.Adapter(variant, "io", a=jnp.ones((2, 1)), e=jnp.ones(1), b=jnp.ones((1, 2)))}
    >>> gradient = jax.tree.map(lambda x: -4 * x, adapter)
    >>> measure(unmeasured(adapter), gradient, adapter, beta1=0.5, beta2=0.5).uncertainty["kernel"].e
    Array([1.], dtype=float32)

    Args:
      importance: before the step.
      gradient: the gradient of the loss at `adapter`.
      adapter: before the step.
      beta1: β₁, which smooths the sensitivity.
      beta2: β₂, which smooths the uncertainty.

    Returns:
      The importance after the step.
    """

    def current(mean: Array, w: Array, g: Array) -> Array:
        return jnp.abs(w.astype(mean.dtype) * g.astype(mean.dtype))

    def smooth(beta: float, old: Array, new: Array) -> Array:
        return beta * old + (1 - beta) * new

    unsmoothed = jax.tree.map(current, importance.sensitivity, adaptive(adapter), adaptive(gradient))
    sensitivity = jax.tree.map(functools.partial(smooth, beta1), importance.sensitivity, unsmoothed)
    distance = jax.tree.map(lambda one, other: jnp.abs(one - other), unsmoothed, sensitivity)
    uncertainty = jax.tree.map(functools.partial(smooth, beta2), importance.uncertainty, distance)
    return Importance(sensitivity, uncertainty)


def scores(importance: Importance) -> dict[str, Array]:
    """Returns the score of each direction: that of `e`, plus the mean over a column of `a` and over a row of `b`.

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
    return {path: _direction_scores(part) for path, part in parts.items()}


def _direction_scores(part: Adapter) -> Array:
    batch = part.e.ndim - 1
    mean_a = part.a.mean(range(batch, part.a.ndim - 1))
    mean_b = part.b.mean(range(batch + 1, part.b.ndim))
    return part.e + mean_a + mean_b


def keep(scores: Mapping[str, Array], budget: Any) -> dict[str, Array]:
    """Selects the directions with the highest scores over all kernels and layers, at most as many as the budget.

    Ties are broken in the order of paths. PEFT drops all directions whose score equals the highest dropped score.

    >>> import jax.numpy as jnp
    >>> kept = keep({"up": jnp.array([3.0, 1.0]), "down": jnp.array([2.0, 1.0])}, 3)
    >>> kept["up"].tolist(), kept["down"].tolist()
    ([True, False], [True, True])

    Args:
      scores: from `scores`.
      budget: how many to keep in total; may be traced.

    Returns:
      `{path: (batch…, rank)}`, True for the directions that are kept.
    """
    ordered = {path: replicated(scores[path]) for path in sorted(scores)}
    order = jnp.argsort(jnp.concatenate([x.ravel() for x in ordered.values()]), descending=True)
    kept = jnp.argsort(order) < budget
    ends = itertools.accumulate(x.size for x in ordered.values())
    return {
        path: kept[end - x.size : end].reshape(x.shape) for (path, x), end in zip(ordered.items(), ends, strict=True)
    }


def prune(adapter: Adapters, kept: Mapping[str, Array]) -> dict[str, Adapter]:
    """Sets `e` to zero for the directions that are not kept.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> part = lj.Adapter(lj.AdaLoRA(rank=2, alpha=2), "io", a=jnp.ones((4, 2)), e=jnp.ones(2), b=jnp.ones((2, 3)))
    >>> prune({"kernel": part}, {"kernel": jnp.array([False, True])})["kernel"].e.tolist()
    [0.0, 1.0]

    Args:
      adapter: from training.
      kept: from `keep`.

    Returns:
      The adapter with the same shapes; `compact` makes them smaller.
    """
    pruned = {path: jnp.where(sharded_as(mask, adapter[path].e), adapter[path].e, 0) for path, mask in kept.items()}
    return dict(adapter) | {path: with_e(adapter[path], e) for path, e in pruned.items()}


def with_e(part: Adapter, e: Array) -> Adapter:
    """Replaces the `e` of a leaf's adapter."""
    return Adapter(part.variant, part.axes, **{**part.arrays, "e": e})
