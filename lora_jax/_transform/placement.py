"""Where the factors of a kernel go, given where it does: each axis as the kernel's, the rank on every device."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from .._core.base import Recorded
from .._core.kernel import TrackedKernel
from .._core.placement import factor_spec
from .interpreter import NoRule, Value


def check_reduced(spec: PartitionSpec) -> None:
    """Raises `NoRule` for a kernel that is still to be summed over devices."""
    if spec.unreduced or spec.reduced:
        raise NoRule("a kernel that is still to be summed over devices")


def specs(kernel: TrackedKernel, spec: Any) -> Any:
    """The kernel with a `PartitionSpec` in place of each of its arrays, where `spec` is that of `w`.

    A base that is no array has None, and may be anywhere.
    """
    check_reduced(spec)
    factors: dict[str, Any] = {
        name: factor_spec(layout(kernel.roles), spec) for name, (_, layout) in kernel.factors.items()
    }
    placed = dataclasses.replace(kernel, w=None if isinstance(kernel.w, Recorded) else spec, **factors)  # type: ignore
    # What is no factor is the same on every device.
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, PartitionSpec) else PartitionSpec(),
        placed,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def shardings(value: Value, sharding: Any) -> Any:
    """The shardings of a value's arrays, where `sharding` is that of `w`, or of the array."""
    if not isinstance(value, TrackedKernel) or sharding is None:
        return sharding
    if not isinstance(sharding, NamedSharding):
        raise NoRule("a sharding of the kernel that does not name its axes")
    return jax.tree.map(lambda spec: sharding.update(spec=spec), specs(value, sharding.spec))
