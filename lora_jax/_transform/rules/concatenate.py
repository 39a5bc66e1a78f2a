"""Kernels put side by side before they are used, such as a fused query, key and value: one kernel of all their ranks.

along outputs    [w1 w2] + [a1 a2]·[[b1 0] [0 b2]]
along inputs     likewise, with the zeros in a
along a batch    each part keeps its place, its rank filled up with zeros to the largest

Pieces of one kernel, as `roll` makes them, are of its own rank again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding

from ..._compat import primitives
from ..._core.axes import RANK, axes_of_a, axes_of_b, join, sizes
from ..._core.contract import widest
from ..._core.kernel import AdaptedKernel
from ..._core.placement import along, typed
from ..interpreter import NoRule, Site, Value, array_of, is_adapted
from ..registry import rule

Axes = tuple[int, ...]


@rule(primitives.concatenate_p, "moved")
def _concatenate(site: Site, *parts: Value, dimension: int) -> AdaptedKernel:
    """The factors stand side by side, along the rank and along the axis."""
    return _side_by_side(site, parts, dimension)


@rule("stack", "moved")
def _stack(site: Site, *parts: Value, axis: int) -> AdaptedKernel:
    """As `concatenate`, along a new batch axis."""
    return _side_by_side(site, [_layer(part, axis) for part in parts], axis)


def _layer(part: Value, axis: int) -> Value:
    """A part of a stack: with one more axis, of size 1, which is a batch axis of a kernel."""
    if not isinstance(part, AdaptedKernel):
        return jnp.expand_dims(part, axis)

    def move(factor: Array, before: Axes, after: Axes) -> Array:
        del before
        return jnp.expand_dims(factor, after.index(axis))

    roles = [*part.roles[:axis], "" if part.is_probe else "b", *part.roles[axis:]]
    return part.moved(jnp.expand_dims(part.w, axis), roles, move)


def _side_by_side(site: Site, parts: Sequence[Value], axis: int) -> AdaptedKernel:
    adapted = [part for part in parts if is_adapted(part)]
    if not adapted:
        return _probes_side_by_side(parts, axis)
    roles = adapted[0].roles
    if any(part.roles != roles for part in adapted):
        found = " and ".join(dict.fromkeys(repr("".join(part.roles)) for part in adapted))
        raise NoRule(f"kernels are put side by side whose axes are {found}")
    rates = [part.dropout and part.dropout.rate for part in adapted]
    if len(set(rates)) > 1:
        raise NoRule(f"kernels are put side by side whose dropouts are {rates}")
    if len({part.active is None for part in adapted}) > 1:
        raise NoRule("kernels are put side by side of which some act on some tokens alone")
    # A leaf that is not adapted is noted as read, and has no ranks.
    parts = [part if is_adapted(part) else site.dense(part, "") for part in parts]
    if len({part.scale for part in adapted}) > 1:
        parts = [_unscaled(part, axis) if is_adapted(part) else part for part in parts]
        adapted = [part for part in parts if is_adapted(part)]
    # Pieces of one kernel have one factor in common.
    pieces = any(len({id(getattr(part, name)) for part in adapted}) == 1 for name in _factors_without(axis, roles))
    ranks = [part.a.shape[-1] if is_adapted(part) else 0 for part in parts]
    aligned = pieces or roles[axis] == "b"
    starts = [0] * len(parts) if aligned else list(itertools.accumulate(ranks, initial=0))
    total = max(ranks) if aligned else sum(ranks)

    def side_by_side(name: str, axes: Axes) -> Array:
        dtype = widest(*(getattr(part, name).dtype for part in adapted))
        rank_axis = axes.index(RANK)
        if axis not in axes and pieces:
            return getattr(adapted[0], name)
        if axis not in axes:
            return lax.concatenate([getattr(part, name).astype(dtype) for part in adapted], rank_axis)
        placed = []
        for part, rank, start in zip(parts, ranks, starts, strict=False):
            widths = [(0, 0)] * len(axes)
            widths[rank_axis] = (start, total - start - rank)
            shape = sizes(axes, np.shape(array_of(part)), rank)
            factor = (
                getattr(part, name).astype(dtype) if rank else jnp.zeros(shape, dtype, out_sharding=_like(part, axes))
            )
            placed.append(jnp.pad(factor, widths))
        return lax.concatenate(placed, axes.index(axis))

    return dataclasses.replace(
        adapted[0],
        gain=_gains_side_by_side(parts, axis, roles),
        w=lax.concatenate([array_of(part) for part in parts], axis),
        a=side_by_side("a", axes_of_a(roles)),
        b=side_by_side("b", axes_of_b(roles)),
        scale=adapted[0].scale,
        paths=_paths(adapted),
    ).with_replicated(
        {name: frozenset.intersection(*(part.replicated_over(name) for part in adapted)) for name in ("a", "b", "gain")}
    )


def _gains_side_by_side(parts: Sequence[Value], axis: int, roles: Sequence[str]) -> Any:
    """The gain of all the parts, if one has any: 1 is that of the others."""
    gains = [part.gain if is_adapted(part) else None for part in parts]
    known = [gain for gain in gains if gain is not None]
    if not known or (all(gain is known[0] for gain in gains) and axis not in axes_of_b(roles)):
        return known[0] if known else None
    if axis not in axes_of_b(roles):
        raise NoRule("kernels are put side by side along their inputs, of which one has a gain")
    axes, dtype = axes_of_b(roles), widest(*(gain.dtype for gain in known))
    every = [
        jnp.ones(sizes(axes, np.shape(array_of(part)), 1), dtype, out_sharding=_like(array_of(part), axes))
        if gain is None
        else gain.astype(dtype)
        for part, gain in zip(parts, gains, strict=True)
    ]
    return lax.concatenate(every, axes.index(axis))


def _like(part: Array, axes: Axes) -> NamedSharding | None:
    """Where a factor of a leaf would be, if the leaf's type says where that is."""
    sharding = typed(jax.typeof(part))
    return None if sharding is None else sharding.update(spec=along(axes, sharding.spec))


def _factors_without(axis: int, roles: Sequence[str]) -> list[str]:
    """The name of the factor that does not have a kernel's axis; none, if both have it."""
    return [name for name, axes in (("a", axes_of_a(roles)), ("b", axes_of_b(roles))) if axis not in axes]


def _unscaled(kernel: AdaptedKernel, axis: int) -> AdaptedKernel:
    """The same kernel with a scale of 1; a factor takes it that has the axis, and is copied for it anyway."""
    name = "b" if "a" in _factors_without(axis, kernel.roles) else "a"
    return dataclasses.replace(kernel, scale=1.0, **{name: getattr(kernel, name) * kernel.scale})


def _probes_side_by_side(parts: Sequence[Value], axis: int) -> AdaptedKernel:
    """Each axis comes from one of every leaf among the parts."""
    probes = [part for part in parts if isinstance(part, AdaptedKernel)]
    return dataclasses.replace(
        probes[0],
        w=lax.concatenate([array_of(part) for part in parts], axis),
        roles=tuple(join(labels) for labels in zip(*(probe.roles for probe in probes), strict=True)),
        paths=_paths(probes),
        look_up=tuple(use for probe in probes for use in probe.look_up)
        if all(probe.look_up for probe in probes)
        else (),
    )


def _paths(kernels: Sequence[AdaptedKernel]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(path for kernel in kernels for path in kernel.paths))
