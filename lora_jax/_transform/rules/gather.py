"""Lookups in an adapted kernel: what is picked of `w` is picked of each factor that has the axis.

An embedding's rows are an activation, so they are formed: `w[ids] + s·a[ids]·b`. Where an input and an output axis are
left, as of experts or layers picked from a stack, the result is a kernel again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array, lax

from ..._compat import primitives
from ..._core.axes import RANK, axes_of_a, axes_of_b
from ..._core.base import Change, apply_change, apply_to_base
from ..._core.contract import Labelled, Labels, computable, is_narrow
from ..._core.kernel import AdaptedKernel, Label, PlainKernel, gain_of
from ..._core.sizes import smallest
from ..contraction.factored import expand
from ..contraction.forms import Sum, times
from ..interpreter import NoRule, Site, Value, on_all_tokens
from ..registry import rule

# Out of range, these modes move a slice to the nearest place: where a whole axis is taken, there is only one.
_MOVES = (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)


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
    """Rows are formed from the rows of a factor; layers, experts and columns that are picked stay a kernel."""
    if not isinstance(operand, AdaptedKernel | PlainKernel):
        raise NoRule("the adapted kernel is the index")
    kernel = operand
    lookup = _Lookup(kernel.w.shape, dimension_numbers, slice_sizes, mode)
    lookup.check()
    indices = site.array(indices, "the adapted kernel is the index")
    hints = {"unique_indices": unique_indices, "indices_are_sorted": indices_are_sorted}

    def pick(fill_value: Any) -> Change:
        return Change(_pick, (dimension_numbers, slice_sizes, mode, fill_value, *hints.values()))

    result: Any = site.eqn.outvars[0].aval
    labels = lookup.labels(result.ndim)
    if not isinstance(kernel, AdaptedKernel):
        return _plain(site, kernel, lookup, pick(fill_value), indices, labels)
    a = lookup.take(Labelled(kernel.a, axes_of_a(kernel.roles)), indices, hints)
    b = lookup.take(Labelled(kernel.b, axes_of_b(kernel.roles)), indices, hints)
    gain = None if kernel.gain is None else lookup.take(gain_of(kernel), indices, hints)
    if {"i", "o"} <= {kernel.roles[axis] for axis in lookup.left}:
        roles = [
            "b" if label in a.labels and label in b.labels else "i" if label in a.labels else "o" for label in labels
        ]
        order_a, order_b = (
            tuple(axis if axis == RANK else labels[axis] for axis in axes)
            for axes in (axes_of_a(roles), axes_of_b(roles))
        )
        if gain is not None and mode == lax.GatherScatterMode.FILL_OR_DROP and fill_value not in (None, 0):
            raise NoRule("kernels that have a gain are looked up, and filled with a number beyond the end")
        moved = dataclasses.replace(
            kernel,
            w=apply_change(kernel.w, pick(fill_value), indices),
            a=a.in_order(order_a),
            b=b.in_order(order_b),
            roles=tuple(roles),
            replicated=(),  # the indices may be others on each device
        )
        return moved if gain is None else dataclasses.replace(moved, gain=_as_b(gain, order_b))
    on_all_tokens(kernel)
    y = apply_to_base(pick(fill_value), kernel.w, indices)
    dtype = computable(y.dtype)
    both = _cast(a, dtype), _cast(b, dtype)
    thin = smallest(both, key=lambda factor: factor.array.size)
    other = both[1] if thin is both[0] else both[0]
    ahead = set(labels[:1]) <= set(thin.labels)  # on the left, so that the result needs no transpose
    low_rank = expand(kernel, thin, other, labels, kernel_first=not ahead, precision=None, like=jax.typeof(y))
    site.used(
        kernel,
        "factored",
        roles=lookup.roles,
        flops=y.size * (2 * kernel.a.shape[-1] + 1) + thin.array.size,
    )
    if gain is None:
        return Sum(y, low_rank) if is_narrow(y.dtype) else y + low_rank
    if mode != lax.GatherScatterMode.FILL_OR_DROP:
        return times(Sum(y, low_rank), gain.expand_to(labels))
    # What the base is filled with beyond the end is no output, and has no gain.
    rows = apply_to_base(pick(0), kernel.w, indices)
    return times(Sum(rows, low_rank), gain.expand_to(labels)) + lax.stop_gradient(y - rows)


def _as_b(gain: Labelled, order: Labels) -> Array:
    """A gain as a kernel keeps it, in the place of `b`'s rank one number."""
    at = order.index(RANK)
    return lax.expand_dims(gain.in_order((*order[:at], *order[at + 1 :])), [at])


def _cast(factor: Labelled, dtype: Any) -> Labelled:
    return factor._replace(array=factor.array.astype(dtype))


def _plain(site: Site, kernel: PlainKernel, lookup: _Lookup, pick: Change, indices: Array, labels: Labels) -> Value:
    """Notes a lookup of rows; what may be a kernel again goes on, and is one if it is contracted."""
    roles = lookup.roles if "o" in lookup.roles else ""
    if sum(bool(kernel.roles[axis]) for axis in lookup.left) < 2:
        site.used(kernel, "factored", roles=roles)
        return apply_to_base(pick, kernel.w, indices)
    kept = tuple(kernel.roles[label] if label < kernel.w.ndim else frozenset[Label]() for label in labels)
    w = apply_change(kernel.w, pick, indices)
    return dataclasses.replace(kernel, w=w, roles=kept, lookup=site.uses(kernel, "factored", roles=roles))


def _pick(w: Array, indices: Array, numbers: Any, sizes: Any, mode: Any, fill_value: Any, *hints: bool) -> Array:
    unique, in_order = hints
    return lax.gather(
        w,
        indices,
        numbers,
        sizes,
        mode=mode,
        fill_value=fill_value,
        unique_indices=unique,
        indices_are_sorted=in_order,
    )


@dataclasses.dataclass(frozen=True)
class _Lookup:
    """What a `gather` picks of an array of `shape`, and of a factor of it.

    The axes of the result go by labels: an axis of the array by its number, one of the indices by a number beyond
    these, or by that of the array's axis along which it runs (the `vmap` of a lookup).
    """

    shape: tuple[int, ...]
    numbers: Any
    slice_sizes: tuple[int, ...]
    mode: Any

    @property
    def columns(self) -> tuple[int, ...]:
        """The columns of the indices that pick a place; the others stand for a whole axis.

        Where none of them does, as of an axis of size 1, everything is taken for each index, whichever column says so.
        """
        axes, collapsed = self.numbers.start_index_map, self.numbers.collapsed_slice_dims
        picking = tuple(
            column
            for column, axis in enumerate(axes)
            if self.mode not in _MOVES or self.slice_sizes[axis] != self.shape[axis] or axis in collapsed
        )
        return picking or tuple(range(len(axes)))

    @property
    def picked(self) -> tuple[int, ...]:
        """The axis of each of the columns."""
        return tuple(self.numbers.start_index_map[column] for column in self.columns)

    @property
    def left(self) -> tuple[int, ...]:
        """The axes of which more is taken than one place."""
        gone = [axis for axis in self.picked if self.slice_sizes[axis] == 1]
        return tuple(
            axis for axis in range(len(self.shape)) if axis not in (*gone, *self.numbers.operand_batching_dims)
        )

    @property
    def roles(self) -> str:
        """The roles of the axes where rows are looked up: a token is an input."""
        batch = "b" if set(self.left) - set(self.picked) else "o"
        return "".join(
            "i" if axis in self.picked else batch if axis in self.numbers.operand_batching_dims else "o"
            for axis in range(len(self.shape))
        )

    def check(self) -> None:
        """Raises if nothing is picked, or if part of an axis is taken from its start and no index says so."""
        known = {*self.picked, *self.numbers.operand_batching_dims}
        whole = all(self.slice_sizes[axis] == size for axis, size in enumerate(self.shape) if axis not in known)
        if not self.picked or not whole or not set(self.numbers.collapsed_slice_dims) <= known:
            raise NoRule("a lookup that takes from the start of an axis, or takes everything")

    def labels(self, ndim: int) -> Labels:
        """The labels of the result."""
        numbers = self.numbers
        kept = iter(self._kept(range(len(self.shape))))
        index = iter(self._index_labels(ndim - len(numbers.offset_dims)))
        return tuple(next(kept) if axis in numbers.offset_dims else next(index) for axis in range(ndim))

    def take(self, factor: Labelled, indices: Array, hints: dict[str, bool]) -> Labelled:
        """The same of a factor: the axes of the indices, then its own; itself, if none of its axes is picked."""
        numbers, place = self.numbers, factor.labels.index
        columns = [column for column in self.columns if numbers.start_index_map[column] in factor.labels]
        if not columns:
            return factor
        batching = sorted(
            (place(axis), at)
            for axis, at in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
            if axis in factor.labels
        )
        every = len(columns) == len(numbers.start_index_map) and len(batching) == len(numbers.operand_batching_dims)
        index_labels, kept = self._index_labels(indices.ndim - 1), self._kept(factor.labels)
        array = lax.gather(
            factor.array,
            indices if len(columns) == indices.shape[-1] else indices[..., np.array(columns)],
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(len(index_labels), len(index_labels) + len(kept))),
                collapsed_slice_dims=tuple(
                    sorted(place(axis) for axis in numbers.collapsed_slice_dims if axis in factor.labels)
                ),
                start_index_map=tuple(place(numbers.start_index_map[column]) for column in columns),
                operand_batching_dims=tuple(at for at, _ in batching),
                start_indices_batching_dims=tuple(at for _, at in batching),
            ),
            tuple(
                size if axis == RANK else self.slice_sizes[axis]
                for axis, size in zip(factor.labels, factor.array.shape, strict=True)
            ),
            mode=self.mode,
            fill_value=0,  # beyond the end, what the base is filled with is all there is
            **(hints if every else {}),  # with fewer columns they may be neither sorted nor different
        )
        return Labelled(array, (*index_labels, *kept))

    def _kept(self, axes: Sequence[int]) -> tuple[int, ...]:
        gone = (*self.numbers.collapsed_slice_dims, *self.numbers.operand_batching_dims)
        return tuple(axis for axis in axes if axis not in gone)

    def _index_labels(self, count: int) -> tuple[int, ...]:
        numbers = self.numbers
        along = dict(zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True))
        return tuple(along.get(at, len(self.shape) + at) for at in range(count))
