"""AdaLoRA's training as one optax transformation with static shapes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from .._core.adapter import Adapter
from .._core.placement import sharded_as
from .._errors import AdapterError, SpecError
from ._importance import Importance, keep, measure, scores, unmeasured, with_e
from ._leaves import adaptive
from ._schedule import budget, check_schedule


class AdaLoRAState(NamedTuple):
    """The state of `ada_lora`.

    Attributes:
      step: the number of updates so far.
      importance: of AdaLoRA's leaves.
      kept: `{path: (batch…, rank)}`, True for the directions that the last allocation kept.
      inner: the state of the wrapped optimizer.
    """

    step: Array
    importance: Importance
    kept: dict[str, Array]
    inner: optax.OptState


def ada_lora(
    tx: optax.GradientTransformation,
    *,
    end: int,
    warmup: int,
    settle: int,
    total: int,
    interval: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """Trains AdaLoRA's leaves and prunes directions as the budget decreases (Zhang et al. 2023, arXiv:2303.10512).

    Every update adds its gradient to the importance. After `warmup` updates, directions are allocated at every multiple
    of `interval`: those with the highest scores are kept, as many as `budget` allows, and `e` of the others is exactly
    zero after the update. A pruned direction can come back at a later allocation. The last allocation is at update
    `total - settle`; after it, pruned directions stay at zero. `tx` trains all other leaves unchanged.

    Wrap all transformations that change updates, including the learning rate: a later one would change what was pruned.
    Shapes and tree structure are constant, so a step is compiled once and can be the body of a scan.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> adapter = lj.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, {"kernel": lj.AdaLoRA(rank=3, alpha=3)})
    >>> tx = ada_lora(optax.adam(0.1), end=1, warmup=0, settle=0, total=1)
    >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, adapter), tx.init(adapter), adapter)
    >>> int(jnp.count_nonzero(optax.apply_updates(adapter, updates)["kernel"].e)), int(state.step)
    (1, 1)

    Args:
      tx: any optax optimizer, such as `optax.adamw(1e-3)`.
      end: the final number of directions over all kernels and layers; the initial number is the sum of all ranks.
      warmup: t_i, the number of updates at the beginning with all directions.
      settle: t_f, the number of updates at the end with the final directions.
      total: T, the number of updates.
      interval: ΔT, the number of updates between two allocations.
      beta1: β₁, which smooths the sensitivity.
      beta2: β₂, which smooths the uncertainty.

    Returns:
      A transformation of an adapter's gradients; `update` needs the adapter as `params`. Its state is an
      `AdaLoRAState`.

    Raises:
      SpecError: if `interval` is below 1 or a beta is not in [0, 1); from `init`, where `budget` raises it.
      AdapterError: from `init` and `update`, if no leaf is of `AdaLoRA`; from `update`, if `params` is missing.
    """
    if interval < 1 or not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise SpecError(
            f"Expected an interval of at least 1, and betas in [0, 1); got interval={interval}, beta1={beta1}, "
            f"beta2={beta2}."
        )
    inner, last = optax.with_extra_args_support(tx), total - settle
    schedule = {"end": end, "warmup": warmup, "settle": settle, "total": total}

    def init(adapter: Any) -> AdaLoRAState:
        parts = adaptive(adapter)
        check_schedule(start=_directions(parts), **schedule)
        kept = {path: jnp.ones(part.e.shape, bool) for path, part in parts.items()}
        return AdaLoRAState(jnp.zeros((), jnp.int32), unmeasured(adapter), kept, inner.init(adapter))

    def update(gradient: Any, state: AdaLoRAState, params: Any = None, **extra_args: Any) -> tuple[Any, AdaLoRAState]:
        if params is None:
            raise AdapterError("Expected `params`, the adapter; got None.\n  Call tx.update(gradient, state, adapter).")
        parts, step = adaptive(params), state.step + 1
        importance = measure(state.importance, gradient, params, beta1=beta1, beta2=beta2)
        chosen = keep(scores(importance), budget(step, start=_directions(parts), **schedule))
        allocates = (step <= last) & ((step % interval == 0) | (step == last))  # up to `warmup`, all fit the budget
        kept = jax.tree.map(lambda new, old: jnp.where(allocates, new, old), chosen, state.kept)
        updates, inner_state = inner.update(gradient, state.inner, params, **extra_args)
        unpruned = ~(allocates | (step > last))
        pruned = {path: _pruned(updates[path], part, kept[path] | unpruned) for path, part in parts.items()}
        return dict(updates) | pruned, AdaLoRAState(step, importance, kept, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _directions(parts: dict[str, Adapter]) -> int:
    return sum(part.e.size for part in parts.values())


def _pruned(update: Adapter, part: Adapter, kept: Array) -> Adapter:
    """Changes an update so that `e` is zero after it, in the directions that are not kept."""
    e = part.e
    return with_e(update, jnp.where(sharded_as(kept, e), update.e.astype(e.dtype), -e))
