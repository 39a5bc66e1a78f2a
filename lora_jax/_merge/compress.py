"""Adapters of a lower rank, from adapters of a higher one."""

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
    """Brings an adapter to a lower rank, from its factors alone.

    Each `s·A·B` is replaced by its best approximation in the Frobenius norm (Eckart and Young 1936), from QR
    decompositions of the factors; the product is never formed. The variant keeps its `alpha`, so that its scale is that
    of the new rank; the factors are made for it. Leaves of that rank or lower, and all other arrays, stay as they are.
    Works under `jit`.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> a, b = jnp.eye(5, 2), jnp.eye(2, 3) * jnp.array([[4.0], [3.0]])
    >>> adapter = {"kernel": lj.Adapter(lj.LoRA(rank=2, alpha=4), "io", a=a, b=b)}
    >>> smaller, residual = lj.compress(adapter, 1)
    >>> smaller["kernel"], round(float(residual["kernel"]), 3)
    (Adapter(LoRA(rank=1, alpha=4), 'io', a=float32[5, 1], b=float32[1, 3]), 0.6)

    Args:
      adapter: from training, `restore` or `extract`.
      rank: for every leaf; or for those that match a pattern, of which the first that matches a path decides.

    Returns:
      The adapter, its arrays in the dtypes that they had; and for each leaf with factors the share of `s·A·B` that is
      lost, in the Frobenius norm, before rounding to that dtype; of shape (batch…).

    Raises:
      AdapterError: if it is no adapter.
      SpecError: for a rank below 1, a pattern that matches no leaf with factors, or a leaf of `AdaLoRA`, which
        `adaptive.compact` makes plain first.
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
            f"Expected leaves whose update is s·A·B alone; got {part.variant} at {path!r}.\n"
            "  Make plain adapters of such leaves first: lora_jax.adaptive.compact(adapter)."
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
    """The rank of each path that is to have one: that of the first pattern that matches it."""
    rules = rank if isinstance(rank, Mapping) else {"**": rank}
    ranks: dict[str, int] = {}
    for pattern, wanted in rules.items():
        if wanted < 1:
            raise SpecError(f"Expected a rank of at least 1; got {wanted}, for {pattern_text(pattern)!r}.")
        found = matching_paths(pattern, paths, "every pattern to match a leaf with factors")
        ranks = dict.fromkeys(found, wanted) | ranks
    return ranks
