"""Look-ups in an adapted kernel: an embedding's rows come from `w` and, thin, from the factor that has the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax import Array, lax

from .._adapter import AdaptedKernel
from .._compat import primitives
from .._contract import Labelled
from ._factored import expand, factors
from ._interpreter import NoRule, Site, Value, rule


@rule(primitives.gather_p)
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
) -> Array:
    if isinstance(indices, AdaptedKernel):
        raise NoRule("the adapted kernel is the index")
    kernel = operand
    # Out of range, these modes move a slice to the nearest place: an axis of which all is taken has only one.
    moves = mode in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    all_taken = [moves and size == length for size, length in zip(slice_sizes, kernel.w.shape, strict=True)]
    collapsed = dimension_numbers.collapsed_slice_dims
    by_column = dimension_numbers.start_index_map
    columns = [column for column, axis in enumerate(by_column) if axis in collapsed or not all_taken[axis]]
    picked = tuple(by_column[column] for column in columns)
    kept = [axis for axis in picked if axis not in collapsed]  # size 1 in the result: so `vmap` of `w[i]` leaves them
    whole = [axis for axis in range(kernel.w.ndim) if axis not in picked]
    if (
        dimension_numbers.operand_batching_dims
        or not set(collapsed) <= set(picked)
        or (kept and not moves)
        or any(slice_sizes[axis] != 1 for axis in kept)
        or any(slice_sizes[axis] != kernel.w.shape[axis] for axis in whole)
    ):
        raise NoRule("a look-up that is not of whole rows")
    roles = ["i" if axis in picked else "o" for axis in range(kernel.w.ndim)]
    if not kernel.is_probe and {kernel.roles[axis] for axis in picked} not in ({"i"}, {"o"}):
        raise NoRule(f"a look-up along axes {picked}, of an adapter with axes {''.join(kernel.roles)!r}")

    def take(x: Array, indices: Array, numbers: Any, sizes: tuple[int, ...], *, alike: bool, fill: Any) -> Array:
        return lax.gather(
            x,
            indices,
            numbers,
            sizes,
            unique_indices=unique_indices and alike,
            indices_are_sorted=indices_are_sorted and alike,
            mode=mode,
            fill_value=fill,
        )

    y = take(kernel.w, indices, dimension_numbers, slice_sizes, alike=True, fill=fill_value)
    if kernel.is_probe:
        site.used(kernel, "factored", roles=roles)
        return y
    a, b = factors(kernel)
    one, other = (a, b) if kernel.roles[picked[0]] == "i" else (b, a)
    rest = tuple(label for label in one.labels if label not in picked)
    batch = indices.ndim - 1
    places = tuple(one.labels.index(axis) for axis in picked)
    all_columns = len(columns) == len(by_column)
    thin = take(
        one.array,
        indices if all_columns else indices[..., np.array(columns)],
        lax.GatherDimensionNumbers(
            offset_dims=tuple(range(batch, batch + len(rest))),
            collapsed_slice_dims=tuple(sorted(places)),
            start_index_map=places,
        ),
        tuple(1 if axis in places else size for axis, size in enumerate(one.array.shape)),
        alike=all_columns,  # with fewer columns they need be neither sorted nor different
        fill=0,  # beyond the end, what the base is filled with is all there is
    )
    # The axes of the indices are labelled beyond the kernel's.
    index_labels = iter(range(kernel.w.ndim, kernel.w.ndim + batch))
    slice_labels = iter(axis for axis in range(kernel.w.ndim) if axis not in collapsed)
    labels = [next(slice_labels if axis in dimension_numbers.offset_dims else index_labels) for axis in range(y.ndim)]
    out = tuple(label for label in labels if label not in kept)
    thin_labels = (*range(kernel.w.ndim, kernel.w.ndim + batch), *rest)
    low_rank = expand(
        kernel, Labelled(thin, thin_labels), other, out, kernel_first=False, precision=None, dtype=y.dtype
    )
    rank = kernel.a.shape[-1]
    site.used(kernel, "factored", roles=roles, operations=y.size * (2 * rank + 1) + thin.size)
    return y + lax.expand_dims(low_rank, [axis for axis, label in enumerate(labels) if label in kept])
