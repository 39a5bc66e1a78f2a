"""Concatenated kernels, such as a fused query, key and value: one kernel whose rank is the sum of their ranks.

along outputs    [w1 w2] + [a1 a2]·[[b1 0] [0 b2]]
along inputs     the same, with the zeros in a
along a batch    the factors are concatenated too, each padded with zeros to the largest rank
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
from ..._core.base import type_of
from ..._core.concatenated import concatenate
from ..._core.contract import widest
from ..._core.kernel import AdaptedKernel, Label, PlainKernel, TrackedKernel
from ..._core.placement import explicit_sharding, factor_spec
from ..._core.routing import Experts
from ..._core.stored import Change
from ..interpreter import NoRule, Site, Value, base_value
from ..registry import rule

Axes = tuple[int, ...]


@rule(primitives.concatenate_p, "moved")
def _concatenate(site: Site, *parts: Value, dimension: int) -> TrackedKernel:
    """The factors are concatenated along the rank, and along the axis with zeros in between."""
    return _concatenate_kernels(site, parts, dimension)


@rule("stack", "moved")
def _stack(site: Site, *parts: Value, axis: int) -> TrackedKernel:
    """As `concatenate`, along a new batch axis."""
    return _concatenate_kernels(site, [_expand_dims(part, axis) for part in parts], axis)


def _expand_dims(part: Value, axis: int) -> Value:
    """Inserts an axis of size 1, which is a batch axis of a kernel."""
    if not isinstance(part, TrackedKernel):
        return jnp.expand_dims(part, axis)

    def move(factor: Array, before: Axes, after: Axes) -> Array:
        del before
        return jnp.expand_dims(factor, after.index(axis))

    roles = [*part.roles[:axis], part.role_of_new_axis("b"), *part.roles[axis:]]
    return part.moved(Change(jnp.expand_dims, (axis,)), roles, move)


def _concatenate_kernels(site: Site, parts: Sequence[Value], axis: int) -> TrackedKernel:
    adapted = [part for part in parts if isinstance(part, AdaptedKernel)]
    if not adapted:
        return _concatenate_plain(parts, axis)
    roles = adapted[0].roles
    if any(part.roles != roles for part in adapted):
        found = " and ".join(dict.fromkeys(repr("".join(part.roles)) for part in adapted))
        raise NoRule(f"a concatenation of kernels with the axes {found}")
    rates = [part.dropout and part.dropout.rate for part in adapted]
    if len(set(rates)) > 1:
        raise NoRule(f"a concatenation of kernels with the dropout rates {rates}")
    for part in parts:
        if isinstance(part, PlainKernel):  # a leaf without factors has rank 0
            site.log_use(part, "opaque")
    if len({part.scale for part in adapted}) > 1:
        parts = [_fold_scale(part, axis) if isinstance(part, AdaptedKernel) else part for part in parts]
        adapted = [part for part in parts if isinstance(part, AdaptedKernel)]
    gain_role, *others = dict.fromkeys(part.gain_role for part in adapted if part.gain is not None) or ["o"]
    if others:
        raise NoRule("a concatenation of kernels of which one has a gain of the inputs and one of the outputs")
    along_batch = roles[axis] == "b"
    experts, given = _concatenate_experts(adapted, along_batch=along_batch)

    def concatenate_factors(name: str, axes: Axes) -> Array:
        having = [part for part in adapted if getattr(part, name) is not None]
        dtype = widest(*(getattr(part, name).dtype for part in having))
        rank_axis = axes.index(RANK)
        if axis not in axes:
            return lax.concatenate([getattr(part, name).astype(dtype) for part in having], rank_axis)
        ranks = [getattr(part, name).shape[rank_axis] if part in having else 0 for part in parts]
        starts = [0] * len(parts) if along_batch else list(itertools.accumulate(ranks, initial=0))
        total = max(ranks) if along_batch else sum(ranks)
        padded = []
        for part, rank, start in zip(parts, ranks, starts, strict=False):
            widths = [(0, 0)] * len(axes)
            widths[rank_axis] = (start, total - start - rank)
            if rank:
                factor = getattr(part, name).astype(dtype)
            else:
                shape = sizes(axes, np.shape(base_value(part)), rank)
                factor = jnp.zeros(shape, dtype, out_sharding=_factor_sharding(part, axes))
            padded.append(jnp.pad(factor, widths))
        return lax.concatenate(padded, axes.index(axis))

    return dataclasses.replace(
        adapted[0],
        gain=_concatenate_gains(parts, axis, roles, gain_role),
        gain_role=gain_role,
        w=concatenate([base_value(part) for part in parts], axis),
        a=concatenate_factors("a", axes_of_a(roles)),
        b=concatenate_factors("b", axes_of_b(roles)),
        scale=adapted[0].scale,
        p=None if all(part.p is None for part in adapted) else concatenate_factors("p", axes_of_a(roles)),
        experts=experts,
        given=given,
        split_inputs=frozenset().union(*(part.split_inputs for part in adapted)),
        paths=_paths(adapted),
    ).with_replicated(
        {
            name: frozenset.intersection(*(part.replicated_over(name) for part in adapted))
            for name in ("a", "b", "gain", "p")
        }
    )


def _concatenate_experts(adapted: Sequence[AdaptedKernel], *, along_batch: bool) -> tuple[tuple[Experts, ...], Any]:
    """Returns the experts of the result, and the weights from the caller; adapters of all tokens have a weight of 1."""
    if not any(part.is_routed for part in adapted):
        return (), None
    first = adapted[0]
    if along_batch:
        if any(part.experts != first.experts or part.given is not first.given for part in adapted):
            raise NoRule("a concatenation along a batch axis of kernels with other experts or weights")
        return first.experts, first.given
    groups = [part.experts or (Experts((part.a.shape[-1],), "constant"),) for part in adapted]
    given = [part.given for part in adapted if part.given is not None]
    if not given:
        return tuple(itertools.chain(*groups)), None
    if len({weights.ndim for weights in given}) > 1 or any(part.given_per_layer for part in adapted):
        raise NoRule("a concatenation of kernels with `token_weights` for each layer, or with other token axes")
    tokens = np.broadcast_shapes(*(weights.shape[1:] for weights in given))
    dtype = widest(*(weights.dtype for weights in given))
    wide = [jnp.broadcast_to(weights, (len(weights), *tokens)).astype(dtype) for weights in given]
    return tuple(itertools.chain(*groups)), lax.concatenate(wide, 0)


def _concatenate_gains(parts: Sequence[Value], axis: int, roles: Sequence[str], role: str) -> Any:
    """Returns the gain of the result, if any part has one; the gain of the others is 1."""
    gains = [part.gain if isinstance(part, AdaptedKernel) else None for part in parts]
    known = [gain for gain in gains if gain is not None]
    axes = axes_of_a(roles) if role == "i" else axes_of_b(roles)
    if not known or (all(gain is known[0] for gain in gains) and axis not in axes):
        return known[0] if known else None
    if axis not in axes:
        raise NoRule("a concatenation along an axis that the gain of one of the kernels does not have")
    dtype = widest(*(gain.dtype for gain in known))
    arrays = [
        jnp.ones(sizes(axes, np.shape(base_value(part)), 1), dtype, out_sharding=_factor_sharding(part, axes))
        if gain is None
        else gain.astype(dtype)
        for part, gain in zip(parts, gains, strict=True)
    ]
    return lax.concatenate(arrays, axes.index(axis))


def _factor_sharding(part: Value, axes: Axes) -> NamedSharding | None:
    """Returns the sharding of a factor of a leaf, if the sharding is part of the leaf's type."""
    sharding = explicit_sharding(type_of(base_value(part)))
    return None if sharding is None else sharding.update(spec=factor_spec(axes, sharding.spec))


def _fold_scale(kernel: AdaptedKernel, axis: int) -> AdaptedKernel:
    """Multiplies the scale into a factor that has the axis, which is copied anyway."""
    name = "a" if axis in axes_of_a(kernel.roles) else "b"
    return dataclasses.replace(kernel, scale=1.0, **{name: getattr(kernel, name) * kernel.scale})


def _concatenate_plain(parts: Sequence[Value], axis: int) -> PlainKernel:
    """Concatenates leaves without factors; each axis of the result comes from one of every leaf."""
    leaves = [part for part in parts if isinstance(part, PlainKernel)]
    lookups = [leaf.lookup for leaf in leaves]
    return PlainKernel(
        concatenate([base_value(part) for part in parts], axis),
        roles=tuple(frozenset[Label]().union(*labels) for labels in zip(*(leaf.roles for leaf in leaves), strict=True)),
        paths=_paths(leaves),
        lookup=tuple(itertools.chain(*lookups)) if all(lookups) else (),
    )


def _paths(kernels: Sequence[TrackedKernel]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(path for kernel in kernels for path in kernel.paths))
