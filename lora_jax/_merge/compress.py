"""Reduces the rank of an adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapter, Adapters, check_adapter
from .._core.axes import axes_of_a, axes_of_b
from .._core.linalg import as_factors, factors_from_svd, has_factors, svd_of_delta, truncation_error
from .._core.paths import Pattern, matching_paths, pattern_text
from .._core.placement import sharded_as
from .._core.variant import LowRank
from .._errors import SpecError


def compress(adapter: Adapters, rank: int | Mapping[Pattern, int]) -> tuple[dict[str, Adapter], dict[str, Array]]:
    """Reduces the rank of an adapter by truncated singular value decompositions.

    Each `s·A·B` is replaced by its best approximation in the Frobenius norm (Eckart and Young 1936), computed from QR
    decompositions of the factors without materializing the product. The variant keeps its `alpha`, so the scale is that
    of the new rank; the new factors take it into account. Leaves of this rank or lower, and all other arrays, are
    unchanged. Works under `jit`.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> a, b = jnp.eye(5, 2), jnp.eye(2, 3) * jnp.array([[4.0], [3.0]])
    >>> adapter = {"kernel": lj.Adapter(lj.LoRA(rank=2, alpha=4), "io", a=a, b=b)}
    >>> smaller, residual = lj.compress(adapter, 1)
    >>> smaller["kernel"], round(float(residual["kernel"]), 3)
    (Adapter(LoRA(rank=1, alpha=4), 'io', a=float32[5, 1], b=float32[1, 3]), 0.6)

    Args:
      adapter: from training, `restore` or `extract`.
      rank: one rank for all leaves, or a dict from patterns to ranks, in which the first match decides.

    Returns:
      The adapter, with unchanged dtypes; and for each leaf with factors the relative error of `s·A·B` in the Frobenius
      norm, before rounding to the dtype, of shape (batch…).

    Raises:
      AdapterError: if `adapter` is not an adapter.
      SpecError: for a rank below 1, a pattern that matches no leaf with factors, or a leaf of `AdaLoRA`; convert such
        leaves with `adaptive.compact` first.
    """
    check_adapter(adapter, "The arguments come in this order: compress(adapter, rank).")
    factored = {path: part for path, part in adapter.items() if has_factors(part)}
    ranks = _ranks(rank, list(factored))
    smaller, residual = dict(adapter), {}
    for path, part in factored.items():
        smaller[path], residual[path] = _compressed(path, part, ranks.get(path, part.a.shape[-1]))
    return smaller, residual


def _compressed(path: str, part: Adapter, rank: int) -> tuple[Adapter, Array]:
    assert isinstance(part.variant, LowRank)
    if part.variant.diagonal(part.arrays) is not None:
        raise SpecError(
            f"Expected leaves whose update is s·A·B; got {part.variant} at {path!r}.\n"
            "  Convert such leaves first: lora_jax.adaptive.compact(adapter)."
        )
    batch = part.a.shape[: part.axes.count("b")]
    if rank >= part.a.shape[-1] or part.variant.scale == 0:
        return part, jnp.zeros(batch)
    svd = svd_of_delta(part)
    variant = dataclasses.replace(part.variant, rank=rank)
    sizes = dict(zip((*axes_of_a(part.axes), *axes_of_b(part.axes)), (*part.a.shape, *part.b.shape), strict=True))
    shape = [sizes[axis] for axis in range(len(part.axes))]
    new = {
        name: sharded_as(array.astype(part.arrays[name].dtype), part.arrays[name])
        for name, array in as_factors(*factors_from_svd(svd, rank, variant.scale), part.axes, shape).items()
    }
    return Adapter(variant, part.axes, **{**part.arrays, **new}), truncation_error(svd.s, rank)


def _ranks(rank: int | Mapping[Pattern, int], paths: list[str]) -> dict[str, int]:
    """Returns the rank for each path that a pattern matches; the first match decides."""
    rules = rank if isinstance(rank, Mapping) else {"**": rank}
    ranks: dict[str, int] = {}
    for pattern, new_rank in rules.items():
        if new_rank < 1:
            raise SpecError(f"Expected a rank of at least 1; got {new_rank}, for {pattern_text(pattern)!r}.")
        found = matching_paths(pattern, paths, "every pattern to match a leaf with factors")
        ranks = dict.fromkeys(found, new_rank) | ranks
    return ranks
