"""Adapted kernels in a `shard_map`: their factors are cut as they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding

from .._adapter import AdaptedKernel
from .._compat import ClosedJaxpr, primitives, varying
from ._interpreter import NoRule, Site, Value
from ._placement import specs
from ._registry import rule


@rule("shard_map", "rebuilt")
def _shard_map(
    site: Site,
    *operands: Value,
    jaxpr: ClosedJaxpr,
    mesh: Any,
    in_specs: Sequence[Any],
    out_specs: Sequence[Any],
    check_vma: bool,
    newly_manual_axes: Collection[str],
) -> list[Value]:
    """`jax.shard_map`: the factors are cut as the kernel is, the rank is not."""

    def run(*operands: Value) -> tuple[Array, ...]:
        out = site.interpret(jaxpr, operands)
        return tuple(site.dense(result, "a shard_map returns the kernel") for result in out)

    each = zip(operands, in_specs, strict=True)
    places = tuple(specs(x, spec) if isinstance(x, AdaptedKernel) else spec for x, spec in each)
    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=places,
        out_specs=tuple(out_specs),
        axis_names=set(newly_manual_axes),
        check_vma=check_vma,
    )
    if AxisType.Explicit in mesh.axis_types:
        # There an array has to come as it will be cut, and the user has seen to the kernel alone.
        operands = jax.tree.map(lambda x, spec: jax.reshard(x, NamedSharding(mesh, spec)), operands, places)
    return list(mapped(*operands))


@rule(primitives.all_gather_p, "moved")
def _all_gather(
    site: Site,
    kernel: AdaptedKernel,
    *,
    all_gather_dimension: int,
    axis_name: Sequence[str],
    axis_index_groups: Any,
    axis_size: int,
    tiled: bool,
) -> AdaptedKernel:
    """The factors that have the axis are gathered."""
    del site, axis_size
    at, names = all_gather_dimension, tuple(axis_name)

    def gather(x: Array, axis: int) -> Array:
        return lax.all_gather(x, names, axis=axis, tiled=tiled, axis_index_groups=axis_index_groups)

    if not tiled:
        # The devices' kernels side by side: a batch of them, whatever was cut.
        roles = [*kernel.roles[:at], "" if kernel.is_probe else "b", *kernel.roles[at:]]
        return kernel.moved(gather(kernel.w, at), roles, lambda factor, _, after: gather(factor, after.index(at)))

    def move(factor: Array, before: tuple[int, ...], after: tuple[int, ...]) -> Array:
        del after
        if at in before:
            return gather(factor, before.index(at))
        # Put together from pieces, the kernel is a product only if the other factor is the same for all of them.
        if not set(names) <= varying(kernel.w) - varying(factor):
            raise NoRule(
                "a kernel put together from devices, where its other factor may differ; `check_vma` would tell"
            )
        return factor

    return kernel.moved(gather(kernel.w, at), kernel.roles, move)
