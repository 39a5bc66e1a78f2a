"""Look-ups in an adapted kernel: an embedding's rows come from `w` and, thin, from the factor that has the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array, lax

from .._adapter import AdaptedKernel
from .._compat import primitives
from .._contract import Labelled
from ._factored import expand, factors
from ._interpreter import NoRule, Site, Value, rule

_MOVES = (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)


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
    rows = _rows(dimension_numbers, slice_sizes, kernel.w.shape, mode)
    roles = ["i" if axis in rows.picked else "o" for axis in range(kernel.w.ndim)]
    if not kernel.is_probe and {kernel.roles[axis] for axis in rows.picked} not in ({"i"}, {"o"}):
        raise NoRule(f"a look-up along axes {rows.picked}, of an adapter with axes {''.join(kernel.roles)!r}")
    hints = {"unique_indices": unique_indices, "indices_are_sorted": indices_are_sorted}
    y = lax.gather(kernel.w, indices, dimension_numbers, slice_sizes, mode=mode, fill_value=fill_value, **hints)
    if kernel.is_probe:
        site.used(kernel, "factored", roles=roles)
        return y
    a, b = factors(kernel)
    one, other = (a, b) if kernel.roles[rows.picked[0]] == "i" else (b, a)
    thin = _take(one, rows, indices, kernel.w.ndim, mode, hints)
    # The axes of the result: those of the indices, labelled beyond the kernel's, and of a slice what is not collapsed.
    index_labels = iter(range(kernel.w.ndim, kernel.w.ndim + indices.ndim - 1))
    slice_labels = iter(axis for axis in range(kernel.w.ndim) if axis not in dimension_numbers.collapsed_slice_dims)
    labels = [next(slice_labels if axis in dimension_numbers.offset_dims else index_labels) for axis in range(y.ndim)]
    out = tuple(label for label in labels if label not in rows.kept)
    low_rank = expand(kernel, thin, other, out, kernel_first=False, precision=None, dtype=y.dtype)
    rank = kernel.a.shape[-1]
    site.used(kernel, "factored", roles=roles, operations=y.size * (2 * rank + 1) + thin.array.size)
    return y + lax.expand_dims(low_rank, [axis for axis, label in enumerate(labels) if label in rows.kept])


class _Rows(NamedTuple):
    """What a `gather` takes, if it takes whole rows.

    Attributes:
      picked: the kernel's axes that are indexed, one place of each.
      columns: the column of the indices for each of them; None if they are all the columns, in this order.
      kept: those of them that stay in the result with size 1, as the `vmap` of `w[i]` leaves them.
    """

    picked: tuple[int, ...]
    columns: tuple[int, ...] | None
    kept: tuple[int, ...]


def _rows(numbers: Any, slice_sizes: Sequence[int], shape: Sequence[int], mode: Any) -> _Rows:
    # Out of range, these modes move a slice to the nearest place: where a whole axis is taken, there is only one.
    moves = mode in _MOVES
    collapsed, axes = numbers.collapsed_slice_dims, numbers.start_index_map
    taken_whole = [moves and slice_sizes[axis] == shape[axis] and axis not in collapsed for axis in axes]
    columns = tuple(column for column in range(len(axes)) if not taken_whole[column])
    picked = tuple(axes[column] for column in columns)
    kept = tuple(axis for axis in picked if axis not in collapsed)
    if (
        numbers.operand_batching_dims
        or not set(collapsed) <= set(picked)
        or (kept and not moves)
        or any(slice_sizes[axis] != (1 if axis in picked else shape[axis]) for axis in range(len(shape)))
    ):
        raise NoRule("a look-up that is not of whole rows")
    return _Rows(picked, None if len(columns) == len(axes) else columns, kept)


def _take(factor: Labelled, rows: _Rows, indices: Array, ndim: int, mode: Any, hints: Mapping[str, Any]) -> Labelled:
    """The same rows of a factor: the axes of the indices, labelled from `ndim` on, then the rest of the factor's."""
    places = tuple(factor.labels.index(axis) for axis in rows.picked)
    batch = tuple(range(ndim, ndim + indices.ndim - 1))
    rest = tuple(label for label in factor.labels if label not in rows.picked)
    array = lax.gather(
        factor.array,
        indices if rows.columns is None else indices[..., np.array(rows.columns)],
        lax.GatherDimensionNumbers(
            offset_dims=tuple(range(len(batch), len(batch) + len(rest))),
            collapsed_slice_dims=tuple(sorted(places)),
            start_index_map=places,
        ),
        tuple(1 if place in places else size for place, size in enumerate(factor.array.shape)),
        mode=mode,
        fill_value=0,  # beyond the end, what the base is filled with is all there is
        **(hints if rows.columns is None else {}),  # with fewer columns they may be neither sorted nor different
    )
    return Labelled(array, (*batch, *rest))
