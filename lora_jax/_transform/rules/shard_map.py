"""Adapted kernels in a `shard_map`: the factors are sharded as their kernel is."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding

from ..._compat import ClosedJaxpr, primitives, varying
from ..._core.axes import RANK, axes_of_a
from ..._core.base import Recorded, type_of
from ..._core.kernel import AdaptedKernel, TrackedKernel
from ..._core.placement import mesh_axes
from ..._core.stored import Change
from ..interpreter import NoRule, Site, Value
from ..placement import kernel_specs
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
    """`jax.shard_map`; the factors are sharded as the kernel is, and replicated along the rank."""

    def run(*operands: Value) -> tuple[Array, ...]:
        operands = tuple(_mark_replicated(x, spec, newly_manual_axes) for x, spec in zip(operands, specs, strict=True))
        out = site.interpret(jaxpr, operands)
        return tuple(site.to_array(result, "a shard_map returns the kernel") for result in out)

    pairs = [_with_specs(x, spec, mesh) for x, spec in zip(operands, in_specs, strict=True)]
    operands, specs = tuple(x for x, _ in pairs), tuple(spec for _, spec in pairs)
    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=specs,
        out_specs=tuple(out_specs),
        axis_names=set(newly_manual_axes),
        check_vma=check_vma,
    )
    if AxisType.Explicit in mesh.axis_types:
        # An operand must already have the sharding of its spec, and the model reshards only the kernel.
        operands = jax.tree.map(lambda x, spec: jax.reshard(x, NamedSharding(mesh, spec)), operands, specs)
    return list(mapped(*operands))


def _with_specs(x: Value, spec: Any, mesh: Any) -> tuple[Value, Any]:
    """Returns an operand and its specs. A stored leaf is dequantized unless its arrays can be sharded."""
    if not isinstance(x, TrackedKernel):
        return x, spec
    specs = kernel_specs(x, spec)
    if not isinstance(x.w, Recorded):
        return x, specs
    if (found := x.w.shards(spec, mesh)) is None:
        return x.with_array(), dataclasses.replace(specs, w=spec)
    base, base_specs = found
    return dataclasses.replace(x, w=base), dataclasses.replace(specs, w=base_specs)  # type: ignore[type-var]


def _mark_replicated(x: Value, specs: Any, manual_axes: Collection[str]) -> Value:
    """Records in a kernel the mesh axes over which its factors are replicated."""
    if not isinstance(x, AdaptedKernel):
        return x
    sharded = {name: {axis for names in spec for axis in mesh_axes(names)} for name, (spec, _) in specs.factors.items()}
    split = x.split_inputs if x.p is None else x.split_inputs | (_axes_of_inputs(x, specs) & {*manual_axes})
    known = {name: x.replicated_over(name) | ({*manual_axes} - sharded[name]) for name in x.factors}
    return dataclasses.replace(x, split_inputs=split).with_replicated(known)


def _axes_of_inputs(kernel: AdaptedKernel, specs: Any) -> set[str]:
    """Returns the mesh axes over which the inputs of `p` are sharded."""
    roles = [kernel.roles[axis] if axis != RANK else "" for axis in axes_of_a(kernel.roles)]
    return {axis for names, role in zip(specs.p, roles, strict=True) if role == "i" for axis in mesh_axes(names)}


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
    """The factors that have the axis are gathered, too."""
    del site, axis_size
    at, names = all_gather_dimension, tuple(axis_name)

    def gather(x: Array, axis: int) -> Array:
        return lax.all_gather(x, names, axis=axis, tiled=tiled, axis_index_groups=axis_index_groups)

    change = Change(gather, (at,), gathers=tiled)
    if not isinstance(kernel, AdaptedKernel):
        roles = kernel.roles if tiled else [*kernel.roles[:at], kernel.role_of_new_axis("b"), *kernel.roles[at:]]
        return kernel.moved(change, roles, lambda factor, before, after: factor)
    gathered = [name for name, (_, layout) in kernel.factors.items() if not tiled or at in layout(kernel.roles)]
    known = {name: kernel.replicated_over(name).union(() if axis_index_groups else names) for name in gathered}
    if not tiled:
        # The kernels of the devices become a batch, whichever axes are sharded.
        roles = [*kernel.roles[:at], "b", *kernel.roles[at:]]
        stack = kernel.moved(change, roles, lambda factor, _, after: gather(factor, after.index(at)))
        return stack.with_replicated(known)
    # Concatenated shards are a product of two factors only if the other factor is the same on all devices.
    for name, (factor, _) in kernel.factors.items():
        same = kernel.replicated_over(name) | (varying(type_of(kernel.w)) - varying(jax.typeof(factor)))
        if name not in gathered and not set(names) <= same:
            raise NoRule(
                "it is gathered from devices on which the other factor differs, or may differ without `check_vma=True`"
            )

    def move(factor: Array, before: tuple[int, ...], after: tuple[int, ...]) -> Array:
        del after
        return gather(factor, before.index(at)) if at in before else factor

    moved = kernel.moved(change, kernel.roles, move).with_replicated(known)
    return dataclasses.replace(moved, split_inputs=moved.split_inputs - {*names}) if kernel.roles[at] == "i" else moved
