"""Sharding constraints on a kernel: each factor is sharded along the axes that it has."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from ..._compat import primitives
from ..._core.kernel import TrackedKernel
from ..._core.placement import factor_spec
from ..._core.stored import Change
from ..interpreter import NoRule, Site
from ..placement import check_reduced
from ..registry import rule


@rule(primitives.sharding_constraint_p, "moved")
def _sharding_constraint(
    site: Site,
    kernel: TrackedKernel,
    *,
    sharding: Any,
    layout: Any,
    context_mesh: Any,
    unconstrained_dims: Collection[int],
) -> TrackedKernel:
    """Each factor is constrained along the axes that it has."""
    del site, context_mesh  # set by the context of the equation
    if layout is not None or not isinstance(sharding, NamedSharding):
        raise NoRule("a constraint on the layout, or a sharding without named axes")
    padded = (*sharding.spec, *(None,) * (kernel.w.ndim - len(sharding.spec)))
    spec = [PartitionSpec.UNCONSTRAINED if axis in unconstrained_dims else names for axis, names in enumerate(padded)]
    return _place(kernel, lax.with_sharding_constraint, sharding.update(spec=PartitionSpec(*spec)))


@rule("reshard", "moved")
def _reshard(site: Site, kernel: TrackedKernel, *, dst_sharding: NamedSharding, concrete_mesh: Any) -> TrackedKernel:
    """Each factor is resharded along the axes that it has."""
    del site
    return _place(kernel, jax.reshard, NamedSharding(concrete_mesh or dst_sharding.mesh, dst_sharding.spec))


def _place(kernel: TrackedKernel, place: Any, sharding: NamedSharding) -> TrackedKernel:
    check_reduced(sharding.spec)

    def move(factor: Array, before: tuple[int, ...], after: tuple[int, ...]) -> Array:
        del after
        placed: Array = place(factor, sharding.update(spec=factor_spec(before, sharding.spec)))
        return placed

    return kernel.moved(Change(place, (sharding,), places=True), kernel.roles, move)
