"""Look-ups in an adapted kernel: an embedding's rows come from `w` and, thin, from the factor that has the rows."""

from __future__ import annotations

from typing import Any

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
    picked = dimension_numbers.start_index_map
    whole = [axis for axis in range(kernel.w.ndim) if axis not in picked]
    if (
        dimension_numbers.operand_batching_dims
        or tuple(sorted(picked)) != tuple(dimension_numbers.collapsed_slice_dims)
        or any(slice_sizes[axis] != kernel.w.shape[axis] for axis in whole)
    ):
        raise NoRule("a look-up that is not of whole rows")
    roles = ["i" if axis in picked else "o" for axis in range(kernel.w.ndim)]
    if not kernel.is_probe and {kernel.roles[axis] for axis in picked} not in ({"i"}, {"o"}):
        raise NoRule(f"a look-up along axes {picked}, of an adapter with axes {''.join(kernel.roles)!r}")

    def take(x: Array, numbers: Any, sizes: tuple[int, ...], fill: Any) -> Array:
        return lax.gather(
            x,
            indices,
            numbers,
            sizes,
            unique_indices=unique_indices,
            indices_are_sorted=indices_are_sorted,
            mode=mode,
            fill_value=fill,
        )

    y = take(kernel.w, dimension_numbers, slice_sizes, fill_value)
    if kernel.is_probe:
        site.used(kernel, "factored", roles=roles)
        return y
    a, b = factors(kernel)
    one, other = (a, b) if kernel.roles[picked[0]] == "i" else (b, a)
    rest = tuple(label for label in one.labels if label not in picked)
    batch = indices.ndim - 1
    collapsed = tuple(sorted(one.labels.index(axis) for axis in picked))
    thin = take(
        one.array,
        lax.GatherDimensionNumbers(
            offset_dims=tuple(range(batch, batch + len(rest))),
            collapsed_slice_dims=collapsed,
            start_index_map=tuple(one.labels.index(axis) for axis in picked),
        ),
        tuple(1 if axis in collapsed else size for axis, size in enumerate(one.array.shape)),
        0,  # beyond the end, what the base is filled with is all there is
    )
    # The axes of the indices are labelled beyond the kernel's.
    index_labels = iter(range(kernel.w.ndim, kernel.w.ndim + batch))
    whole_labels = iter(whole)
    out = tuple(next(whole_labels if axis in dimension_numbers.offset_dims else index_labels) for axis in range(y.ndim))
    thin_labels = (*range(kernel.w.ndim, kernel.w.ndim + batch), *rest)
    low_rank = expand(
        kernel, Labelled(thin, thin_labels), other, out, kernel_first=False, precision=None, dtype=y.dtype
    )
    rank = kernel.a.shape[-1]
    site.used(kernel, "factored", roles=roles, operations=y.size * (2 * rank + 1) + thin.size)
    return y + low_rank
