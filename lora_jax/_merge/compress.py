"""Reduces the rank of an adapter."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapter, Adapters, check_adapter
from .._core.linalg import (
    as_factors,
    factors_from_svd,
    has_factors,
    kernel_shape,
    rank_for_energy,
    svd_of_delta,
    truncation_error,
)
from .._core.numbers import integer, number
from .._core.paths import Pattern, matching_paths
from .._core.placement import sharded_as
from .._core.variant import LowRank
from .._errors import SpecError

Value = TypeVar("Value", int, float)


def compress(
    adapter: Adapters,
    rank: int | Mapping[Pattern, int] | None = None,
    *,
    energy: float | Mapping[Pattern, float] | None = None,
) -> tuple[dict[str, Adapter], dict[str, Array]]:
    """Reduces the rank of an adapter by truncated singular value decompositions.

    Each `s·A·B` is replaced by its best approximation in the Frobenius norm (Eckart and Young 1936), computed from QR
    decompositions of the factors without materializing the product. The variant keeps its `alpha`, so the scale is that
    of the new rank; the new factors take it into account. Leaves of this rank or lower, and all other arrays, are
    unchanged. Works under `jit` with `rank`; with `energy` the shapes depend on values.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> a, b = jnp.eye(5, 2), jnp.eye(2, 3) * jnp.array([[4.0], [3.0]])
    >>> adapter = {"kernel": lj.Adapter(lj.LoRA(rank=2, alpha=4), "io", a=a, b=b)}
    >>> smaller, residual = lj.compress(adapter, 1)
    >>> smaller["kernel"], round(float(residual["kernel"]), 3)
    (Adapter(LoRA(rank=1, alpha=4), 'io', a=float32[5, 1], b=float32[1, 3]), 0.6)

    Args:
      adapter: from training, `restore` or `extract`.
      rank: one rank for all leaves, or a dict from patterns to ranks, in which the first match decides.
      energy: in place of `rank`, a fraction in (0, 1) or a dict from patterns to fractions: each leaf gets the smallest
        rank that keeps this fraction of ‖s·A·B‖² in the Frobenius norm. The layers of a stack share the largest.

    Returns:
      The adapter, with unchanged dtypes; and for each leaf with factors the relative error of `s·A·B` in the Frobenius
      norm, before rounding to the dtype, of shape (batch…).

    Raises:
      AdapterError: if `adapter` is not an adapter.
      SpecError: for a rank below 1, an energy outside (0, 1) or under `jit`, both or neither of them, a pattern that
        matches no leaf with factors, or a leaf of `AdaLoRA`; convert such leaves with `adaptive.compact` first.
    """
    check_adapter(adapter, "The arguments come in this order: compress(adapter, rank).")
    if (rank is None) == (energy is None):
        raise SpecError(f"Expected either `rank` or `energy`; got rank={rank} and energy={energy}.")
    factored = {path: part for path, part in adapter.items() if has_factors(part)}
    paths = list(factored)
    if rank is not None:
        ranks = _by_path(rank, paths, functools.partial(integer, "rank", least=1))
    else:
        assert energy is not None
        energies = _by_path(energy, paths, check_energy)
        ranks = {path: rank_for_energy(svd_of_delta(factored[path]).s, share) for path, share in energies.items()}
    smaller, residual = dict(adapter), {}
    for path, part in factored.items():
        smaller[path], residual[path] = _compressed(path, part, ranks.get(path, part.a.shape[-1]))
    return smaller, residual


def check_energy(energy: Any) -> float:
    """Returns an energy as a Python number.

    Raises:
      SpecError: if it is not in (0, 1).
    """
    plain = number("energy", energy)
    if not 0 < plain < 1:
        raise SpecError(f"Expected a number in (0, 1) for `energy`; got energy={plain}.")
    return plain


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
    factors = as_factors(*factors_from_svd(svd, rank, variant.scale), part.axes, kernel_shape(part))
    new = {
        name: sharded_as(array.astype(part.arrays[name].dtype), part.arrays[name]) for name, array in factors.items()
    }
    return Adapter(variant, part.axes, **{**part.arrays, **new}), truncation_error(svd.s, rank)


def _by_path(
    values: Value | Mapping[Pattern, Value], paths: list[str], checked: Callable[[Value], Value]
) -> dict[str, Value]:
    """Returns the value for each path that a pattern matches; the first match decides."""
    if not isinstance(values, Mapping):
        return dict.fromkeys(paths, checked(values))
    chosen: dict[str, Value] = {}
    for pattern, value in values.items():
        found = matching_paths(pattern, paths, "every pattern to match a leaf with factors")
        chosen = dict.fromkeys(found, checked(value)) | chosen
    return chosen
