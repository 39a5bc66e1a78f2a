"""Where the factors of a kernel go, given where it does: each axis as the kernel's, the rank on every device."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from .._core.kernel import AdaptedKernel
from .._core.placement import along
from .interpreter import NoRule, Value


def specs(kernel: AdaptedKernel, spec: Any) -> AdaptedKernel:
    """The kernel with a `PartitionSpec` in place of each of its arrays, where `spec` is that of `w`."""
    if spec.unreduced or spec.reduced:
        raise NoRule("a kernel that is still to be summed over devices")

    def move(factor: Any, before: tuple[int, ...], after: tuple[int, ...]) -> Any:
        del factor, after
        return along(before, spec)

    # What is no factor is the same on every device.
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, PartitionSpec) else PartitionSpec(),
        kernel.moved(spec, kernel.roles, move),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def shardings(value: Value, sharding: Any) -> Any:
    """The shardings of a value's arrays, where `sharding` is that of `w`, or of the array."""
    if not isinstance(value, AdaptedKernel) or sharding is None:
        return sharding
    if not isinstance(sharding, NamedSharding):
        raise NoRule("a sharding of the kernel that does not name its axes")
    return jax.tree.map(lambda spec: sharding.update(spec=spec), specs(value, sharding.spec))
