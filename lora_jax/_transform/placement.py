"""Partition specs and shardings of a kernel's factors: each axis is sharded as the kernel's, the rank is replicated."""

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
    """Raises `NoRule` for a kernel that has not been summed over devices yet."""
    if spec.unreduced or spec.reduced:
        raise NoRule("a kernel that is not yet summed over devices")


def kernel_specs(kernel: TrackedKernel, spec: Any) -> Any:
    """Returns the kernel with a `PartitionSpec` in place of each of its arrays, given the spec of `w`.

    A base that is not an array gets None, which leaves its sharding open.
    """
    check_reduced(spec)
    layouts = {name: layout(kernel.roles) for name, (_, layout) in kernel.factors.items()}
    factors: dict[str, Any] = {name: factor_spec(axes, spec) for name, axes in layouts.items()}
    placed = dataclasses.replace(kernel, w=None if isinstance(kernel.w, Recorded) else spec, **factors)  # type: ignore
    # Arrays other than factors, such as dropout keys, are replicated.
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, PartitionSpec) else PartitionSpec(),
        placed,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def value_shardings(value: Value, sharding: Any) -> Any:
    """Returns the shardings of a value's arrays, given the sharding of the array or of the kernel's `w`."""
    if not isinstance(value, TrackedKernel) or sharding is None:
        return sharding
    if not isinstance(sharding, NamedSharding):
        raise NoRule("a sharding of the kernel that does not name its axes")
    return jax.tree.map(lambda spec: sharding.update(spec=spec), kernel_specs(value, sharding.spec))
