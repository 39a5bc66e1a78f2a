"""EVA: Fine-tuning via Explained Variance Adaptation (Paischer et al. 2024, arXiv:2410.07170)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapters
from .._core.paths import flatten
from .._core.values import is_concrete, on_host
from .._errors import AdapterError, SpecError, listed
from ._activations import Activations
from ._leaf import Leaf, Start, low_rank_leaves, start


def eva(
    params: Any,
    adapter: Adapters,
    activations: Mapping[str, Activations],
    *,
    rho: float = 1.0,
    centered: bool = True,
) -> Start:
    """Starts `A` with the directions in which the kernel's inputs vary most, and gives rank to where they vary most.

        Σ xᵀx / n - x̄ᵀx̄ = V·Λ·Vᵀ,   A = V[:, 1…r],   B = 0

    (Paischer et al. 2024, arXiv:2410.07170). The columns of `A` are the leading right singular vectors of all
    activations together, with their mean taken away as in the authors' and PEFT's incremental PCA; here the sums are
    kept whole, so that the result depends neither on the order nor on the size of the batches. The base stays.

    With `rho` above 1 the ranks are dealt out anew. The budget is the sum of the ranks (a stack of layers takes one
    rank for each layer at a time); it goes to the directions, of all kernels, that explain the largest share Λⱼ/ΣΛ of
    their own kernel's variance, up to ρ times its rank for each. The scale of each adapter stays.

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
      params: the parameter tree that the adapter was made for.
      adapter: from `init`; its factors are replaced.
      activations: by path, of one batch or summed over several.
      rho: ρ, how many times its rank an adapter may get. 1 keeps the ranks and works under `jit`; PEFT's default is 2.
      centered: whether the mean is taken away; without, the directions are those of the activations themselves.

    Returns:
      `params` as they were, and the adapter, without the leaves that get rank 0.

    Raises:
      SpecError: if `rho` is below 1.
      AdapterError: if the adapter does not fit `params`, or `activations` not the adapter; if they have seen nothing;
        if ranks are to be dealt out under `jit`, where shapes cannot depend on values.
    """
    if not rho >= 1:
        raise SpecError(f"Expected rho to be 1, which keeps the ranks, or more; got rho={rho!r}.")
    leaves = {leaf.path: leaf for leaf in low_rank_leaves(adapter, flatten(params)[0])}
    _check(leaves, activations)
    found = {path: _principal(activations[path].covariance(centered=centered)) for path in leaves}
    ranks = {path: leaf.variant.rank for path, leaf in leaves.items()}
    if rho > 1:
        ranks = _dealt(leaves, {path: its.explained for path, its in found.items()}, rho)

    def method(leaf: Leaf) -> tuple[Array, Array]:
        (layers, _, d_out), rank = leaf.shape, ranks[leaf.path]
        return found[leaf.path].directions[:, :, :rank], jnp.zeros((layers, rank, d_out))

    left = {path: part for path, part in adapter.items() if ranks.get(path) != 0}
    return start(params, left, method)


class _Principal(NamedTuple):
    """The principal directions of activations, `(layers, d, d)`, and the share of the variance of each."""

    directions: Array
    explained: Array


def _principal(covariance: Array) -> _Principal:
    variances, directions = jnp.linalg.eigh(covariance)  # in ascending order
    variances = jnp.maximum(variances[:, ::-1], 0)
    whole = jnp.maximum(variances.sum(-1, keepdims=True), jnp.finfo(variances.dtype).tiny)
    return _Principal(directions[:, :, ::-1], variances / whole)


def _dealt(leaves: Mapping[str, Leaf], explained: Mapping[str, Array], rho: float) -> dict[str, int]:
    """Deals the ranks out by the shares of variance that each explains; of a stack, by the mean of its layers."""
    if not all(is_concrete(its) for its in jax.tree.leaves(dict(explained))):
        raise AdapterError(
            "Expected values to deal the ranks out by; got a trace, which has none.\n"
            "  Call eva outside `jit`, or with rho=1."
        )
    bids: list[tuple[float, str]] = []
    for path, leaf in leaves.items():
        most = min(round(rho * leaf.variant.rank), *leaf.shape[1:])
        bids += [(float(share), path) for share in on_host(explained[path]).mean(0)[:most]]
    budget = sum(leaf.variant.rank * leaf.shape[0] for leaf in leaves.values())
    ranks = dict.fromkeys(leaves, 0)
    for _, path in sorted(bids, key=lambda bid: -bid[0]):
        if (cost := leaves[path].shape[0]) <= budget:
            ranks[path] += 1
            budget -= cost
    return ranks


def _check(leaves: Mapping[str, Leaf], activations: Mapping[str, Activations]) -> None:
    missing = [repr(path) for path in leaves if path not in activations]
    if missing:
        raise AdapterError(
            f"Expected the activations of every adapted kernel; {len(missing)} are not there.\n{listed(missing)}\n"
            "  activations(apply, params, adapter, *args) returns them."
        )
    unseen = [
        f"{path!r}: {int((count == 0).sum())} of {count.size}"
        for path in leaves
        if is_concrete(count := activations[path].count) and bool((count == 0).any())
    ]
    if unseen:
        raise AdapterError(
            f"Expected every layer of each kernel to have met activations; {len(unseen)} kernels have layers that met "
            f"none.\n{listed(unseen)}\n"
            "  Add up more batches; or what the model does with their products cannot be followed by reverse mode."
        )
