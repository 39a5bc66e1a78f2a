"""Ragged products, as in mixtures of experts: each group of rows of x is multiplied with the kernel of its expert.

    y = ragged(x, W0) + ragged(ragged(x, A)·s, B)

Usually the experts are a batch axis of the adapter. A factor that all experts share is multiplied with all rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..._core.axes import RANK, axes_of_a, axes_of_b
from ..._core.base import apply_to_base
from ..._core.contract import Labeled, Labels, computable, contract, sharding_of_product
from ..._core.kernel import AdaptedKernel, TrackedKernel, gain_of
from ..._core.placement import names_of
from ..contraction.factored import labeled_factors, precision_of_factors, thin_dtype
from ..contraction.forms import Sum, apply_gain
from ..interpreter import NoRule, Site, Value, check_unrouted
from ..registry import rule


@rule("ragged_dot_general", "low-rank")
def _ragged_dot_general(
    site: Site,
    lhs: Value,
    rhs: Value,
    group_sizes: Value,
    *,
    ragged_dot_dimension_numbers: Any,
    precision: Any,
    preferred_element_type: Any,
    group_offset: Any,
    out_sharding: Any,
) -> Value:
    """As `dot_general`, each row with the factors of its group; a kernel that is divided into groups is refused."""
    numbers = ragged_dot_dimension_numbers
    if not isinstance(rhs, TrackedKernel) or isinstance(lhs, AdaptedKernel):
        raise NoRule("the adapted kernel is divided into groups")
    if not numbers.rhs_group_dimensions:
        raise NoRule("a contracted axis or a batch axis is divided into groups")
    kernel, group_sizes = rhs, site.to_array(group_sizes, "the adapted kernel is `group_sizes`")
    (group,), (lhs_ragged,) = numbers.rhs_group_dimensions, numbers.lhs_ragged_dimensions
    (lhs_summed, summed), (lhs_batch, batch) = numbers.dot_dimension_numbers
    roles = "".join("b" if axis in (group, *batch) else "i" if axis in summed else "o" for axis in range(kernel.w.ndim))
    lhs = site.to_array(lhs, "the left operand")  # logs a leaf without factors

    def product(x: Array, w: Array, sizes: Array) -> Array:
        return lax.ragged_dot_general(
            x,
            w,
            sizes,
            numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
            group_offset=group_offset,
            out_sharding=out_sharding,
        )

    def base_product() -> Array:
        return apply_to_base(lambda w, x, sizes: product(x, w, sizes), kernel.w, lhs, group_sizes)

    if not isinstance(kernel, AdaptedKernel):
        site.log_use(kernel, "factored", roles=roles)
        return base_product()
    adapter_roles = "".join(kernel.roles)
    misfit = any((kernel.roles[axis] == "b") != (axis in batch) for axis in (*batch, *summed))
    if group_sizes.ndim > 1 and misfit:
        raise NoRule(f"groups per batch element and the axes {roles!r}; the adapter has {adapter_roles!r}")
    check_unrouted(kernel)
    w_axis_of = dict(zip((*lhs_batch, *lhs_summed), (*batch, *summed), strict=True))
    dropped = lhs if kernel.dropout is None else kernel.dropout.apply(lhs)
    x = Labeled(
        dropped.astype(computable(dropped.dtype)),
        tuple(w_axis_of.get(axis, kernel.w.ndim + axis) for axis in range(lhs.ndim)),
    )
    x_rest = [label for label in x.labels if label >= kernel.w.ndim]
    w_rest = [axis for axis in range(kernel.w.ndim) if roles[axis] == "o"]
    out = (*batch, *x_rest, *w_rest)
    gain = None if kernel.gain is None else gain_of(kernel)
    if gain is not None and not set(gain.labels) <= {group, *out}:
        raise NoRule("a product that contracts axes with a gain")
    if gain is not None and kernel.dropout is not None:
        raise NoRule("a ragged product with dropout, of a kernel that has a gain")
    like: Any = site.eqn.outvars[0].aval
    factor_precision = precision_of_factors(precision, lhs.dtype, kernel.w.dtype, like.dtype)
    groups = _Groups(group, kernel.w.ndim + lhs_ragged, batch, group_sizes, group_offset, factor_precision)
    if site.settings.observe:
        x_times_a = functools.partial(groups.x_times_a, x.labels, adapter_roles, {*out, *axes_of_b(adapter_roles)})
        return site.observe(kernel, lhs, product, x_times_a, group_sizes, roles=roles)
    y = base_product()
    a, b = labeled_factors(kernel)
    first, second = (b, a) if all(adapter_roles[axis] == "o" for axis in summed) else (a, b)
    if group not in first.labels:
        x = groups.without_other_rows(x, (*batch, *x_rest[: x_rest.index(groups.ragged)]))
    dtype = thin_dtype(x.array.dtype, kernel.w.dtype, y.dtype)
    thin = groups.contract(x, first, keep={*second.labels, *out}, dtype=dtype)
    scaled = thin._replace(array=thin.array * kernel.scale)
    names = names_of(out, jax.typeof(y))
    low_rank = groups.contract(scaled, second, keep=out, dtype=computable(y.dtype), names=names).in_order(out)
    # The two products, the scale and the sum.
    flops = groups.flops(x, first) + groups.flops(thin, second) + thin.array.size + y.size
    site.log_use(kernel, "factored", roles=roles, flops=flops)
    if gain is None:
        return Sum(y, low_rank)
    return apply_gain(Sum(y, low_rank), groups.select_by_row(gain, lhs.shape[lhs_ragged]).expand_to(out))


@dataclasses.dataclass(frozen=True)
class _Groups:
    """The groups of rows of a ragged product.

    Attributes:
      group: the kernel's axis of experts.
      ragged: the label of the rows.
      batch: the kernel's batch axes, in the order of `sizes`.
      sizes: the number of rows of each expert, which are contiguous.
      offset: as `group_offset` in `ragged_dot_general`.
      precision: as in `ragged_dot_general`.
    """

    group: int
    ragged: int
    batch: Labels
    sizes: Array
    offset: Any
    precision: Any

    def contract(
        self,
        x: Labeled,
        factor: Labeled,
        *,
        keep: Collection[int],
        dtype: Any = None,
        names: Mapping[int, Any] | None = None,
    ) -> Labeled:
        """As `_core.contract.contract`, but with the factor of its expert for each row, if there is one for each."""
        if self.group not in factor.labels:
            return contract(x, factor, keep=keep, precision=self.precision, dtype=dtype, names=names)
        shared = [label for label in x.labels if label in factor.labels]
        summed = [label for label in shared if label not in keep]
        batch = sorted((label for label in shared if label in keep), key=(*self.batch, *shared).index)
        dot = [[[array.labels.index(label) for label in labels] for array in (x, factor)] for labels in (summed, batch)]
        rest = [label for label in (*x.labels, *factor.labels) if label not in (*shared, self.group)]
        numbers = lax.RaggedDotDimensionNumbers(dot, [x.labels.index(self.ragged)], [factor.labels.index(self.group)])
        array = lax.ragged_dot_general(
            x.array,
            factor.array,
            self.sizes,
            numbers,
            precision=self.precision,
            preferred_element_type=dtype,
            group_offset=self.offset,
            out_sharding=sharding_of_product(x, factor, (*batch, *rest), names),
        )
        return Labeled(array, (*batch, *rest))

    def without_other_rows(self, x: Labeled, prefix: Labels) -> Labeled:
        """Returns `x` with zeros in rows of no group, which may not be finite; `prefix` labels leading axes of `sizes`.

        The operation ignores these rows. A factor that all experts share does not, in its gradient.
        """
        rows = Labeled(jnp.arange(x.array.shape[x.labels.index(self.ragged)]), (self.ragged,)).expand_to(x.labels)
        count = jnp.sum(self.sizes, -1, dtype=rows.dtype)
        ends = Labeled(count, prefix if self.sizes.ndim > 1 else ()).expand_to(x.labels)
        return x._replace(array=jnp.where(rows < ends, x.array, jnp.zeros_like(x.array)))

    def select_by_row(self, x: Labeled, rows: int) -> Labeled:
        """Selects, for each row, the element of its expert."""
        if self.group not in x.labels:
            return x
        ones = Labeled(jnp.ones((rows, 1), x.array.dtype), (self.ragged, RANK))
        factor = Labeled(lax.expand_dims(x.array, [x.array.ndim]), (*x.labels, RANK))
        return self.contract(ones, factor, keep={self.ragged, *x.labels})

    def x_times_a(self, labels: Labels, roles: str, keep: Collection[int], x: Array, a: Array, sizes: Array) -> Labeled:
        """Multiplies `x` with `a` only, for given sizes of the groups."""
        precise = dataclasses.replace(self, sizes=sizes, precision=lax.Precision.HIGHEST)
        return precise.contract(Labeled(x, labels), Labeled(a, axes_of_a(roles)), keep=keep)

    def flops(self, x: Labeled, factor: Labeled) -> int:
        """Counts the FLOPs of a product; each row is multiplied with the factor of one expert."""
        factor_sizes = [
            size
            for label, size in zip(factor.labels, factor.array.shape, strict=True)
            if label not in (*x.labels, self.group)
        ]
        return 2 * x.array.size * math.prod(factor_sizes)
