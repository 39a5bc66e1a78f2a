"""EVA: Fine-tuning via Explained Variance Adaptation (Paischer et al. 2024, arXiv:2410.07170)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapter, Adapters
from .._core.paths import flatten
from .._core.values import is_concrete, on_host
from .._errors import AdapterError, SpecError
from ._activations import Activations, check_activations
from ._leaf import Leaf, Start, initialize, low_rank_leaves


def eva(
    params: Any,
    adapter: Adapters,
    activations: Mapping[str, Activations],
    *,
    rho: float = 1.0,
    keep_scale: bool = True,
    centered: bool = True,
    whiten: bool = False,
) -> Start:
    """Initializes `A` with the directions in which the kernel's inputs vary most, and can reallocate ranks.

        Σ xᵀx / n - x̄ᵀx̄ = V·Λ·Vᵀ,   A = V[:, 1…r],   B = 0

    (Paischer et al. 2024, arXiv:2410.07170). The columns of `A` are the leading right singular vectors of the
    activations, centered as in the incremental PCA of the authors and of PEFT. Here the complete sums are kept, so the
    result does not depend on the order or the size of the batches, and there is no threshold of convergence. The base
    is unchanged.

    With `rho` above 1, ranks are reallocated. The budget is the sum of the ranks, where one more rank of a stack costs
    one for each layer. It is spent on the directions, among those of all kernels, with the largest shares Λⱼ/ΣΛ of the
    variance of their kernel; no kernel gets more than ρ times its rank.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import starts
    >>> params = {"kernel": jnp.ones((2, 3))}
    >>> apply = lambda params, x: x @ params["kernel"]
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=1, alpha=1)})
    >>> seen = starts.activations(apply, params, adapter, jnp.array([[0.0, 5.0], [1.0, -5.0], [-1.0, 0.0]]))
    >>> params, adapter = starts.eva(params, adapter, seen)
    >>> jnp.abs(jnp.round(adapter["kernel"].a[:, 0], 1))
    Array([0.1, 1. ], dtype=float32)

    Args:
      params: the parameter tree that the adapter was initialized for.
      adapter: from `init`; its factors are replaced.
      activations: by path, from `activations`; of one batch, or summed over several.
      rho: ρ, by how much a rank may grow. 1 keeps the ranks and works under `jit`; PEFT's default is 2.
      keep_scale: whether α changes with the rank, so that the scale s stays the same; otherwise α stays.
      centered: whether the mean of the activations is subtracted.
      whiten: whether each direction is divided by √σⱼ, where σⱼ² = n·Λⱼ, as by the authors and PEFT: directions that
        vary less get larger values. They depend on n, the number of rows. Λⱼ is bounded from below by its largest
        value times the machine epsilon.

    Returns:
      `params` unchanged, and the adapter, without the leaves that are allocated rank 0.

    Raises:
      SpecError: if `rho` is below 1.
      AdapterError: if the adapter does not fit `params` or adapts only some layers of a stack; if `activations` does
        not fit the adapter, or has no rows for a layer; if `rho` is above 1 under `jit`, where shapes cannot depend on
        values.
    """
    if not rho >= 1:
        raise SpecError(f"Expected rho to be 1, which keeps the ranks, or more; got rho={rho!r}.")
    leaves = {leaf.path: leaf for leaf in low_rank_leaves(adapter, flatten(params)[0])}
    check_activations(leaves.values(), activations)
    components = {path: _principal_components(activations[path], centered=centered) for path in leaves}
    ranks = {path: leaf.variant.rank for path, leaf in leaves.items()}
    if rho > 1:
        ranks = _allocate(leaves, {path: found.explained for path, found in components.items()}, rho)

    def method(leaf: Leaf) -> tuple[Array, Array]:
        (layers, _, d_out), rank, found = leaf.shape, ranks[leaf.path], components[leaf.path]
        a = found.directions / jnp.sqrt(found.singular_values)[:, None] if whiten else found.directions
        return a[:, :, :rank], jnp.zeros((layers, rank, d_out))

    _, new = initialize(params, {path: part for path, part in adapter.items() if ranks.get(path) != 0}, method)
    if not keep_scale:
        new |= {path: _with_alpha_of(leaves[path], new[path]) for path in leaves if path in new}
    return Start(params, new)


def _with_alpha_of(leaf: Leaf, part: Adapter) -> Adapter:
    variant = dataclasses.replace(leaf.variant, rank=part.a.shape[-1])
    return Adapter(variant, part.axes, **part.arrays)


class _Components(NamedTuple):
    """Principal directions, `(layers, d, d)`; the share of the variance that each explains, and σ, `(layers, d)`."""

    directions: Array
    explained: Array
    singular_values: Array


def _principal_components(activations: Activations, *, centered: bool) -> _Components:
    variances, directions = jnp.linalg.eigh(activations.covariance(centered=centered))  # in ascending order
    variances = jnp.maximum(variances[:, ::-1], 0)
    limits = jnp.finfo(variances.dtype)
    total = jnp.maximum(variances.sum(-1, keepdims=True), limits.tiny)
    floor = jnp.maximum(limits.eps * variances[:, :1], limits.tiny)
    singular_values = jnp.sqrt(activations.count[:, None] * jnp.maximum(variances, floor))
    return _Components(directions[:, :, ::-1], variances / total, singular_values)


def _allocate(leaves: Mapping[str, Leaf], explained: Mapping[str, Array], rho: float) -> dict[str, int]:
    """Allocates ranks to the directions with the largest shares of variance, for a stack the mean over its layers."""
    if not all(is_concrete(shares) for shares in jax.tree.leaves(dict(explained))):
        raise AdapterError(
            "Expected concrete activations, because rho > 1 makes the ranks depend on values; got traced arrays.\n"
            "  Call eva outside `jit`, or with rho=1."
        )
    candidates: list[tuple[float, str]] = []
    for path, leaf in leaves.items():
        most = min(round(rho * leaf.variant.rank), *leaf.shape[1:])
        candidates += [(float(share), path) for share in on_host(explained[path]).mean(0)[:most]]
    budget = sum(leaf.variant.rank * leaf.shape[0] for leaf in leaves.values())
    ranks = dict.fromkeys(leaves, 0)
    for _, path in sorted(candidates, key=lambda candidate: -candidate[0]):
        if (cost := leaves[path].shape[0]) <= budget:
            ranks[path] += 1
            budget -= cost
    return ranks
