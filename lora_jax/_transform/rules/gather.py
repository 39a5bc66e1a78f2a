"""Lookups in an adapted kernel: the indices that select from `w` select from each factor that has the axis.

The rows of an embedding are an activation and are materialized: `w[ids] + s·a[ids]·b`. If the result still has an input
and an output axis, as for experts or layers selected from a stack, it is a kernel again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..._compat import primitives
from ..._core.axes import RANK, axes_of_a, axes_of_b
from ..._core.base import Base, Recorded, apply_change, apply_to_base
from ..._core.contract import Labeled, Labels, computable, is_narrow
from ..._core.kernel import AdaptedKernel, Label, PlainKernel, gain_of
from ..._core.sizes import smallest
from ..._core.stored import Change
from ..contraction.factored import multiply_second
from ..contraction.forms import Sum, apply_gain
from ..interpreter import NoRule, Site, Value, check_unrouted
from ..registry import rule

# With these modes, an index along an axis that is taken completely has no effect.
_CLAMPING_MODES = (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)


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
    hints = _Hints(unique_indices, indices_are_sorted)
    lookup = _Lookup(kernel.w.shape, dimension_numbers, slice_sizes, mode, fill_value, hints)
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


def _select_kernels(kernel: AdaptedKernel, lookup: _Lookup, indices: Array, labels: Labels) -> AdaptedKernel:
    """Looks up in the base and in each factor."""
    filled = lookup.mode == lax.GatherScatterMode.FILL_OR_DROP
    if kernel.gain is not None and filled and lookup.fill_value not in (None, 0):
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


def _look_up_rows(site: Site, kernel: AdaptedKernel, lookup: _Lookup, indices: Array, labels: Labels) -> Array | Sum:
    """Adds the rows of the low-rank term to those of the base.

    What an index out of range selects is filled last, so that nothing before has a gradient there, not even where the
    model's is NaN.
    """
    filled = lookup.mode == lax.GatherScatterMode.FILL_OR_DROP
    rows = lookup.clipped() if filled else lookup
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
    if not filled:
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


def _look_up_leaf(site: Site, leaf: PlainKernel, lookup: _Lookup, indices: Array, labels: Labels) -> Value:
    """Looks up in a leaf without factors; a result with two of its axes stays a kernel, as it may be contracted."""
    roles = lookup.roles if "o" in lookup.roles else ""
    if sum(bool(leaf.roles[axis]) for axis in lookup.remaining) < 2:
        site.log_use(leaf, "factored", roles=roles)
        return lookup.apply(leaf.w, indices)
    kept = tuple(leaf.roles[label] if label < leaf.w.ndim else frozenset[Label]() for label in labels)
    w = apply_change(leaf.w, lookup.change, indices)
    return dataclasses.replace(leaf, w=w, roles=kept, lookup=site.make_uses(leaf, "factored", roles=roles))


class _Hints(NamedTuple):
    """What a model promises of the indices of a `gather`."""

    unique_indices: bool = False
    indices_are_sorted: bool = False


def _look_up(w: Array, indices: Array, numbers: Any, sizes: Any, mode: Any, fill_value: Any, *hints: bool) -> Array:
    return lax.gather(w, indices, numbers, sizes, mode=mode, fill_value=fill_value, **_Hints(*hints)._asdict())


@dataclasses.dataclass(frozen=True)
class _Lookup:
    """What a `gather` selects from an array of `shape`, and from its factors.

    An axis of the array is labeled by its number. An axis of the indices is labeled by a number after these, or by that
    of the array's batching axis that it corresponds to (the `vmap` of a lookup).
    """

    shape: tuple[int, ...]
    numbers: Any
    slice_sizes: tuple[int, ...]
    mode: Any
    fill_value: Any
    hints: _Hints

    @property
    def change(self) -> Change:
        """The lookup in an array of `shape`."""
        return Change(_look_up, (self.numbers, self.slice_sizes, self.mode, self.fill_value, *self.hints))

    def clipped(self) -> _Lookup:
        """Returns the lookup that reads the nearest position inside the array for an index out of range."""
        return dataclasses.replace(self, mode=lax.GatherScatterMode.CLIP, fill_value=None, hints=_Hints())

    @property
    def columns(self) -> tuple[int, ...]:
        """The columns of the indices that select a position; the other columns belong to axes taken completely.

        All columns, if none selects a position, as for an axis of size 1.
        """
        axes, collapsed = self.numbers.start_index_map, self.numbers.collapsed_slice_dims
        selecting = tuple(
            column
            for column, axis in enumerate(axes)
            if self.mode not in _CLAMPING_MODES or self.slice_sizes[axis] != self.shape[axis] or axis in collapsed
        )
        return selecting or tuple(range(len(axes)))

    @property
    def selected(self) -> tuple[int, ...]:
        """The axis of each of the columns."""
        return tuple(self.numbers.start_index_map[column] for column in self.columns)

    @property
    def remaining(self) -> tuple[int, ...]:
        """The axes of the array that the result still has."""
        gone = [axis for axis in self.selected if self.slice_sizes[axis] == 1]
        return tuple(
            axis for axis in range(len(self.shape)) if axis not in (*gone, *self.numbers.operand_batching_dims)
        )

    @property
    def roles(self) -> str:
        """The roles of the axes in a lookup of rows: the axis of the rows is an input."""
        batch = "b" if set(self.remaining) - set(self.selected) else "o"
        return "".join(
            "i" if axis in self.selected else batch if axis in self.numbers.operand_batching_dims else "o"
            for axis in range(len(self.shape))
        )

    def check(self) -> None:
        """Raises if nothing is selected, or if an axis without an index is taken only in part."""
        indexed = {*self.selected, *self.numbers.operand_batching_dims}
        complete = all(self.slice_sizes[axis] == size for axis, size in enumerate(self.shape) if axis not in indexed)
        if not self.selected or not complete or not set(self.numbers.collapsed_slice_dims) <= indexed:
            raise NoRule("a lookup without an index, or of part of an axis without an index")

    def labels(self, ndim: int) -> Labels:
        """Returns the labels of the result."""
        numbers = self.numbers
        kept = iter(self._kept(range(len(self.shape))))
        index = iter(self._index_labels(ndim - len(numbers.offset_dims)))
        return tuple(next(kept) if axis in numbers.offset_dims else next(index) for axis in range(ndim))

    def apply(self, w: Base, indices: Array) -> Array:
        """Looks up in the base; of a stored leaf that is looked up by rows, only these rows are dequantized."""
        if not isinstance(w, Recorded) or not self._selects_rows:
            return apply_to_base(self.change, w, indices)
        size = self.shape[0]
        if self.mode in _CLAMPING_MODES:
            indices = jnp.clip(indices, 0, size - 1)
        flat = indices.reshape(-1)
        outside = (flat < 0) | (flat >= size)
        if (rows := w.take(jnp.where(outside, 0, flat))) is None:
            return apply_to_base(self.change, w, indices)
        # Each index looks up its own row; one that was out of range still is.
        own = jnp.where(outside, flat.size, jnp.arange(flat.size, dtype=indices.dtype)).reshape(indices.shape)
        return apply_to_base(self.change, rows, own)

    @property
    def _selects_rows(self) -> bool:
        numbers = self.numbers
        return numbers.start_index_map == (0,) and self.slice_sizes[0] == 1 and not numbers.operand_batching_dims

    def inside(self, indices: Array) -> Labeled:
        """Returns for each index whether all that it selects is inside the array."""
        numbers = self.numbers
        inside = [
            (index >= 0) & (index <= self.shape[axis] - self.slice_sizes[axis])
            for axis, index in zip(numbers.start_index_map, jnp.moveaxis(indices, -1, 0), strict=True)
        ]
        return Labeled(functools.reduce(jnp.logical_and, inside), self._index_labels(indices.ndim - 1))

    def take(self, factor: Labeled, indices: Array) -> Labeled:
        """Applies the lookup to a factor; returns it as it is if no column selects along its axes."""
        numbers, position = self.numbers, factor.labels.index
        columns = [column for column in self.columns if numbers.start_index_map[column] in factor.labels]
        if not columns:
            return factor
        batching = sorted(
            (position(axis), at)
            for axis, at in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
            if axis in factor.labels
        )
        complete = len(columns) == len(numbers.start_index_map) and len(batching) == len(numbers.operand_batching_dims)
        index_labels, kept = self._index_labels(indices.ndim - 1), self._kept(factor.labels)
        array = lax.gather(
            factor.array,
            indices if len(columns) == indices.shape[-1] else indices[..., np.array(columns)],
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(len(index_labels), len(index_labels) + len(kept))),
                collapsed_slice_dims=tuple(
                    sorted(position(axis) for axis in numbers.collapsed_slice_dims if axis in factor.labels)
                ),
                start_index_map=tuple(position(numbers.start_index_map[column]) for column in columns),
                operand_batching_dims=tuple(at for at, _ in batching),
                start_indices_batching_dims=tuple(at for _, at in batching),
            ),
            tuple(
                size if axis == RANK else self.slice_sizes[axis]
                for axis, size in zip(factor.labels, factor.array.shape, strict=True)
            ),
            mode=self.mode,
            fill_value=0,  # beyond the end, the result is the fill value of the base
            **(self.hints if complete else _Hints())._asdict(),  # fewer columns need not be sorted or unique
        )
        return Labeled(array, (*index_labels, *kept))

    def _kept(self, axes: Sequence[int]) -> tuple[int, ...]:
        gone = (*self.numbers.collapsed_slice_dims, *self.numbers.operand_batching_dims)
        return tuple(axis for axis in axes if axis not in gone)

    def _index_labels(self, count: int) -> tuple[int, ...]:
        numbers = self.numbers
        along = dict(zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True))
        return tuple(along.get(at, len(self.shape) + at) for at in range(count))
