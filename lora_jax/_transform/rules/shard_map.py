"""Adapted kernels in a `shard_map`: their factors are cut as they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding

from ..._compat import ClosedJaxpr, primitives, varying
from ..._core.base import Change
from ..._core.kernel import AdaptedKernel, TrackedKernel
from ..._core.placement import mesh_axes
from ..interpreter import NoRule, Site, Value
from ..placement import specs
from ..registry import rule


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

    # What stands for an array has no axes to shard: it is one before.
    operands = tuple(x.with_array() if isinstance(x, TrackedKernel) else x for x in operands)

    def run(*operands: Value) -> tuple[Array, ...]:
        operands = tuple(_inside(x, place, newly_manual_axes) for x, place in zip(operands, places, strict=True))
        out = site.interpret(jaxpr, operands)
        return tuple(site.array(result, "a shard_map returns the kernel") for result in out)

    each = zip(operands, in_specs, strict=True)
    places = tuple(specs(x, spec) if isinstance(x, TrackedKernel) else spec for x, spec in each)
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


def _inside(x: Value, place: Any, manual_axes: Collection[str]) -> Value:
    """An operand inside; a factor is the same over the axes of the mesh along which it is not cut."""
    if not isinstance(x, AdaptedKernel):
        return x
    cut = {name: {axis for names in spec for axis in mesh_axes(names)} for name, (spec, _) in place.factors.items()}
    return x.with_replicated({name: x.replicated_over(name) | ({*manual_axes} - cut[name]) for name in x.factors})


@rule(primitives.all_gather_p, "moved")
def _all_gather(
    site: Site,
    kernel: TrackedKernel,
    *,
    all_gather_dimension: int,
    axis_name: Sequence[str],
    axis_index_groups: Any,
    axis_size: int,
    tiled: bool,
) -> TrackedKernel:
    """The factors that have the axis are gathered."""
    del site, axis_size
    at, names = all_gather_dimension, tuple(axis_name)

    def gather(x: Array, axis: int) -> Array:
        return lax.all_gather(x, names, axis=axis, tiled=tiled, axis_index_groups=axis_index_groups)

    change = Change(gather, (at,))
    if not isinstance(kernel, AdaptedKernel):
        roles = kernel.roles if tiled else [*kernel.roles[:at], kernel.role_of_new_axis("b"), *kernel.roles[at:]]
        return kernel.moved(change, roles, lambda factor, before, after: factor)
    gathered = [name for name, (_, layout) in kernel.factors.items() if not tiled or at in layout(kernel.roles)]
    known = {name: kernel.replicated_over(name).union(() if axis_index_groups else names) for name in gathered}
    if not tiled:
        # The devices' kernels side by side: a batch of them, whatever was cut.
        roles = [*kernel.roles[:at], "b", *kernel.roles[at:]]
        stack = kernel.moved(change, roles, lambda factor, _, after: gather(factor, after.index(at)))
        return stack.with_replicated(known)
    # Put together from pieces, the kernel is a product only if the other factor is the same for all of them.
    for name, (factor, _) in kernel.factors.items():
        same = kernel.replicated_over(name) | (varying(kernel.w) - varying(factor))
        if name not in gathered and not set(names) <= same:
            raise NoRule(
                "it is gathered from devices on which its other factor differs, or may differ without `check_vma=True`"
            )

    def move(factor: Array, before: tuple[int, ...], after: tuple[int, ...]) -> Array:
        del after
        return gather(factor, before.index(at)) if at in before else factor

    return kernel.moved(change, kernel.roles, move).with_replicated(known)
