"""Requests to put a kernel somewhere on the mesh: its factors go along, each along the axes that it has."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ..._compat import primitives
from ..._core.kernel import AdaptedKernel
from ..interpreter import NoRule, Site
from ..placement import shardings
from ..registry import rule


@rule(primitives.sharding_constraint_p, "moved")
def _sharding_constraint(
    site: Site,
    kernel: AdaptedKernel,
    *,
    sharding: Any,
    layout: Any,
    context_mesh: Any,
    unconstrained_dims: Collection[int],
) -> AdaptedKernel:
    """Each factor is constrained along the axes that it has."""
    del site, context_mesh  # the equation's own context brings the mesh back
    if layout is not None or not isinstance(sharding, NamedSharding):
        raise NoRule("a constraint on the layout, or a sharding that does not name its axes")
    given = (*sharding.spec, *(None,) * (kernel.w.ndim - len(sharding.spec)))
    spec = [PartitionSpec.UNCONSTRAINED if axis in unconstrained_dims else names for axis, names in enumerate(given)]
    places = shardings(kernel, sharding.update(spec=PartitionSpec(*spec)))
    return jax.tree.map(lax.with_sharding_constraint, kernel, places)


@rule("reshard", "moved")
def _reshard(site: Site, kernel: AdaptedKernel, *, dst_sharding: NamedSharding, concrete_mesh: Any) -> AdaptedKernel:
    """Each factor is cut anew along the axes that it has."""
    del site
    sharding = NamedSharding(concrete_mesh or dst_sharding.mesh, dst_sharding.spec)
    return jax.tree.map(jax.reshard, kernel, shardings(kernel, sharding))
