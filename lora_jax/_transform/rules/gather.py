"""Lookups in an adapted kernel: the indices that select from `w` select from each factor that has the axis.

The rows of an embedding are an activation and are materialized: `w[ids] + s·a[ids]·b`. If the result still has an input
and an output axis, as for experts or layers selected from a stack, it is a kernel again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..._compat import primitives
from ..._core.axes import RANK, axes_of_a, axes_of_b
from ..._core.base import apply_change
from ..._core.contract import Labeled, Labels, computable, is_narrow
from ..._core.kernel import AdaptedKernel, Label, PlainKernel, gain_of
from ..._core.sizes import smallest
from ..contraction.factored import multiply_second
from ..contraction.forms import Sum, apply_gain
from ..interpreter import NoRule, Site, Value, check_unrouted
from ..lookup import Hints, Lookup
from ..registry import rule


@rule(primitives.gather_p, "low-rank")
def _gather(
    site: Site,
    operand: Value,
    indices: Value,
    *,
    dimension_numbers: Any,
    slice_sizes: tuple[int, ...],
    unique_indices: bool,
    indices_are_sorted: bool,
    mode: Any,
    fill_value: Any,
) -> Value:
    """Looked-up rows are materialized from rows of the factors; selected layers, experts and columns stay a kernel."""
    if not isinstance(operand, AdaptedKernel | PlainKernel):
        raise NoRule("the adapted kernel is the index")
    kernel = operand
    hints = Hints(unique_indices, indices_are_sorted)
    lookup = Lookup(kernel.w.shape, dimension_numbers, slice_sizes, mode, fill_value, hints)
    lookup.check()
    indices = site.to_array(indices, "the adapted kernel is the index")
    if jnp.iinfo(indices.dtype).bits < 32:  # the number of rows, or of indices, may not fit their dtype
        indices = indices.astype(jnp.int32)
    result: Any = site.eqn.outvars[0].aval
    labels = lookup.labels(result.ndim)
    if not isinstance(kernel, AdaptedKernel):
        return _look_up_leaf(site, kernel, lookup, indices, labels)
    if kernel.given_per_layer:
        raise NoRule("a lookup of layers, of a kernel with `token_weights` for each layer")
    if {"i", "o"} <= {kernel.roles[axis] for axis in lookup.remaining}:
        return _select_kernels(kernel, lookup, indices, labels)
    check_unrouted(kernel)
    return _look_up_rows(site, kernel, lookup, indices, labels)


def _select_kernels(kernel: AdaptedKernel, lookup: Lookup, indices: Array, labels: Labels) -> AdaptedKernel:
    """Looks up in the base and in each factor."""
    if kernel.gain is not None and lookup.fills and lookup.fill_value not in (None, 0):
        raise NoRule("a lookup of kernels with a gain whose `fill_value` is not 0")
    a = lookup.take(Labeled(kernel.a, axes_of_a(kernel.roles)), indices)
    b = lookup.take(Labeled(kernel.b, axes_of_b(kernel.roles)), indices)
    p = None if kernel.p is None else lookup.take(Labeled(kernel.p, axes_of_a(kernel.roles)), indices)
    gain = None if kernel.gain is None else lookup.take(gain_of(kernel), indices)
    roles = ["b" if label in a.labels and label in b.labels else "i" if label in a.labels else "o" for label in labels]
    order_a, order_b = (
        tuple(axis if axis == RANK else labels[axis] for axis in axes) for axes in (axes_of_a(roles), axes_of_b(roles))
    )
    moved = dataclasses.replace(
        kernel,
        w=apply_change(kernel.w, lookup.change, indices),
        a=a.in_order(order_a),
        b=b.in_order(order_b),
        p=None if p is None else p.in_order(order_a),
        roles=tuple(roles),
        replicated=(),  # the indices may differ between devices
    )
    order = order_a if kernel.gain_role == "i" else order_b
    return moved if gain is None else dataclasses.replace(moved, gain=_insert_rank(gain, order))


def _look_up_rows(site: Site, kernel: AdaptedKernel, lookup: Lookup, indices: Array, labels: Labels) -> Array | Sum:
    """Adds the rows of the low-rank term to those of the base.

    What an index out of range selects is filled last, so that nothing before has a gradient there, not even where the
    model's is NaN.
    """
    rows = lookup.clipped() if lookup.fills else lookup
    y = rows.apply(kernel.w, indices)
    dtype = computable(y.dtype)
    a = _cast(rows.take(Labeled(kernel.a, axes_of_a(kernel.roles)), indices), dtype)
    b = _cast(rows.take(Labeled(kernel.b, axes_of_b(kernel.roles)), indices), dtype)
    thin = smallest((a, b), key=lambda factor: factor.array.size)
    other = b if thin is a else a
    left, like = set(labels[:1]) <= set(thin.labels), jax.typeof(y)  # on the left, so that no transpose is needed
    low_rank = multiply_second(kernel, thin, other, labels, kernel_first=not left, precision=None, like=like)
    site.log_use(
        kernel,
        "factored",
        roles=lookup.roles,
        flops=y.size * (2 * kernel.a.shape[-1] + 1) + thin.array.size,
    )
    total: Array | Sum
    if kernel.gain is not None:
        total = apply_gain(Sum(y, low_rank), rows.take(gain_of(kernel), indices).expand_to(labels))
    else:
        total = Sum(y, low_rank) if is_narrow(y.dtype) else y + low_rank
    if not lookup.fills:
        return total
    inside = lookup.inside(indices).expand_to(labels)
    fill_value = jnp.asarray(jnp.nan if lookup.fill_value is None else lookup.fill_value, y.dtype)
    if isinstance(total, Sum):
        return Sum(jnp.where(inside, y, fill_value), jnp.where(inside, low_rank, 0))
    return jnp.where(inside, total, fill_value)


def _insert_rank(gain: Labeled, order: Labels) -> Array:
    """Returns a gain with the axes of a factor, with size 1 for the rank."""
    at = order.index(RANK)
    return lax.expand_dims(gain.in_order((*order[:at], *order[at + 1 :])), [at])


def _cast(factor: Labeled, dtype: Any) -> Labeled:
    return factor._replace(array=factor.array.astype(dtype))


def _look_up_leaf(site: Site, leaf: PlainKernel, lookup: Lookup, indices: Array, labels: Labels) -> Value:
    """Looks up in a leaf without factors; a result with two of its axes stays a kernel, as it may be contracted."""
    roles = lookup.roles if "o" in lookup.roles else ""
    if sum(bool(leaf.roles[axis]) for axis in lookup.remaining) < 2:
        site.log_use(leaf, "factored", roles=roles)
        return lookup.apply(leaf.w, indices)
    kept = tuple(leaf.roles[label] if label < leaf.w.ndim else frozenset[Label]() for label in labels)
    w = apply_change(leaf.w, lookup.change, indices)
    return dataclasses.replace(leaf, w=w, roles=kept, lookup=site.make_uses(leaf, "factored", roles=roles))
