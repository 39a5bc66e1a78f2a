"""Kernels put side by side before they are used, such as a fused query, key and value: one kernel of all their ranks.

along outputs    [w1 w2] + [a1 a2]·[[b1 0] [0 b2]]
along inputs     likewise, with the zeros in a
along a batch    each part keeps its place, its rank padded with zeros to the largest
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding

from ..._compat import primitives
from ..._core.axes import RANK, axes_of_a, axes_of_b, sizes
from ..._core.base import Change, concatenate, type_of
from ..._core.contract import widest
from ..._core.kernel import AdaptedKernel, Label, PlainKernel, TrackedKernel
from ..._core.placement import explicit_sharding, factor_spec
from ..interpreter import NoRule, Site, Value, base_of
from ..registry import rule

Axes = tuple[int, ...]


@rule(primitives.concatenate_p, "moved")
def _concatenate(site: Site, *parts: Value, dimension: int) -> TrackedKernel:
    """The factors stand side by side, along the rank and along the axis."""
    return _side_by_side(site, parts, dimension)


@rule("stack", "moved")
def _stack(site: Site, *parts: Value, axis: int) -> TrackedKernel:
    """As `concatenate`, along a new batch axis."""
    return _side_by_side(site, [_layer(part, axis) for part in parts], axis)


def _layer(part: Value, axis: int) -> Value:
    """A part of a stack: with one more axis, of size 1, which is a batch axis of a kernel."""
    if not isinstance(part, TrackedKernel):
        return jnp.expand_dims(part, axis)

    def move(factor: Array, before: Axes, after: Axes) -> Array:
        del before
        return jnp.expand_dims(factor, after.index(axis))

    roles = [*part.roles[:axis], part.role_of_new_axis("b"), *part.roles[axis:]]
    return part.moved(Change(jnp.expand_dims, (axis,)), roles, move)


def _side_by_side(site: Site, parts: Sequence[Value], axis: int) -> TrackedKernel:
    adapted = [part for part in parts if isinstance(part, AdaptedKernel)]
    if not adapted:
        return _plain_side_by_side(parts, axis)
    roles = adapted[0].roles
    if any(part.roles != roles for part in adapted):
        found = " and ".join(dict.fromkeys(repr("".join(part.roles)) for part in adapted))
        raise NoRule(f"kernels are put side by side whose axes are {found}")
    rates = [part.dropout and part.dropout.rate for part in adapted]
    if len(set(rates)) > 1:
        raise NoRule(f"kernels are put side by side whose dropouts are {rates}")
    if len({part.active is None for part in adapted}) > 1:
        raise NoRule("kernels are put side by side of which some act on some tokens alone")
    for part in parts:
        if isinstance(part, PlainKernel):  # noted as read; it has no ranks
            site.used(part, "opaque")
    if len({part.scale for part in adapted}) > 1:
        parts = [_unscaled(part, axis) if isinstance(part, AdaptedKernel) else part for part in parts]
        adapted = [part for part in parts if isinstance(part, AdaptedKernel)]
    ranks = [part.a.shape[-1] if isinstance(part, AdaptedKernel) else 0 for part in parts]
    aligned = roles[axis] == "b"
    starts = [0] * len(parts) if aligned else list(itertools.accumulate(ranks, initial=0))
    total = max(ranks) if aligned else sum(ranks)

    def side_by_side(name: str, axes: Axes) -> Array:
        dtype = widest(*(getattr(part, name).dtype for part in adapted))
        rank_axis = axes.index(RANK)
        if axis not in axes:
            return lax.concatenate([getattr(part, name).astype(dtype) for part in adapted], rank_axis)
        placed = []
        for part, rank, start in zip(parts, ranks, starts, strict=False):
            widths = [(0, 0)] * len(axes)
            widths[rank_axis] = (start, total - start - rank)
            shape = sizes(axes, np.shape(base_of(part)), rank)
            factor = (
                getattr(part, name).astype(dtype) if rank else jnp.zeros(shape, dtype, out_sharding=_like(part, axes))
            )
            placed.append(jnp.pad(factor, widths))
        return lax.concatenate(placed, axes.index(axis))

    return dataclasses.replace(
        adapted[0],
        gain=_gains_side_by_side(parts, axis, roles),
        w=concatenate([base_of(part) for part in parts], axis),
        a=side_by_side("a", axes_of_a(roles)),
        b=side_by_side("b", axes_of_b(roles)),
        scale=adapted[0].scale,
        paths=_paths(adapted),
    ).with_replicated(
        {name: frozenset.intersection(*(part.replicated_over(name) for part in adapted)) for name in ("a", "b", "gain")}
    )


def _gains_side_by_side(parts: Sequence[Value], axis: int, roles: Sequence[str]) -> Any:
    """The gain of all the parts, if one has any: 1 is that of the others."""
    gains = [part.gain if isinstance(part, AdaptedKernel) else None for part in parts]
    known = [gain for gain in gains if gain is not None]
    if not known or (all(gain is known[0] for gain in gains) and axis not in axes_of_b(roles)):
        return known[0] if known else None
    if axis not in axes_of_b(roles):
        raise NoRule("kernels are put side by side along their inputs, of which one has a gain")
    axes, dtype = axes_of_b(roles), widest(*(gain.dtype for gain in known))
    every = [
        jnp.ones(sizes(axes, np.shape(base_of(part)), 1), dtype, out_sharding=_like(part, axes))
        if gain is None
        else gain.astype(dtype)
        for part, gain in zip(parts, gains, strict=True)
    ]
    return lax.concatenate(every, axes.index(axis))


def _like(part: Value, axes: Axes) -> NamedSharding | None:
    """Where a factor of a leaf would be, if the leaf's type says where that is."""
    sharding = explicit_sharding(type_of(base_of(part)))
    return None if sharding is None else sharding.update(spec=factor_spec(axes, sharding.spec))


def _factors_without(axis: int, roles: Sequence[str]) -> list[str]:
    """The name of the factor that does not have a kernel's axis; none, if both have it."""
    return [name for name, axes in (("a", axes_of_a(roles)), ("b", axes_of_b(roles))) if axis not in axes]


def _unscaled(kernel: AdaptedKernel, axis: int) -> AdaptedKernel:
    """The same kernel with a scale of 1; a factor takes it that has the axis, and is copied for it anyway."""
    name = "b" if "a" in _factors_without(axis, kernel.roles) else "a"
    return dataclasses.replace(kernel, scale=1.0, **{name: getattr(kernel, name) * kernel.scale})


def _plain_side_by_side(parts: Sequence[Value], axis: int) -> PlainKernel:
    """Each axis comes from one of every leaf among the parts."""
    leaves = [part for part in parts if isinstance(part, PlainKernel)]
    lookups = [leaf.lookup for leaf in leaves]
    return PlainKernel(
        concatenate([base_of(part) for part in parts], axis),
        roles=tuple(frozenset[Label]().union(*labels) for labels in zip(*(leaf.roles for leaf in leaves), strict=True)),
        paths=_paths(leaves),
        lookup=tuple(itertools.chain(*lookups)) if all(lookups) else (),
    )


def _paths(kernels: Sequence[TrackedKernel]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(path for kernel in kernels for path in kernel.paths))
