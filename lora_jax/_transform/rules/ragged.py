"""Products by group, as mixtures of experts make them: the rows of x, run by run, each with its own expert's kernel.

    y = ragged(x, W0) + ragged(ragged(x, A)·s, B)

Usually the experts are a batch axis of the adapter. A factor that they share meets all rows alike.
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
from ..._core.contract import Labelled, Labels, computable, contract, sharding_of_product
from ..._core.kernel import AdaptedKernel, TrackedKernel, gain_of
from ..._core.placement import names_of
from ..contraction.factored import factors, precision_of_factors, thin_dtype
from ..contraction.forms import Sum, times
from ..interpreter import NoRule, Site, Value, on_all_tokens
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
    """As `dot_general`, each row with the factors of its own group; refused where the kernel is what is divided."""
    numbers = ragged_dot_dimension_numbers
    if not isinstance(rhs, TrackedKernel) or isinstance(lhs, AdaptedKernel):
        raise NoRule("the adapted kernel is what is divided into groups")
    if not numbers.rhs_group_dimensions:
        raise NoRule("what is summed, or a batch, is divided into groups")
    kernel, group_sizes = rhs, site.array(group_sizes, "it divides into groups")
    (group,), (lhs_ragged,) = numbers.rhs_group_dimensions, numbers.lhs_ragged_dimensions
    (lhs_summed, summed), (lhs_batch, batch) = numbers.dot_dimension_numbers
    roles = "".join("b" if axis in (group, *batch) else "i" if axis in summed else "o" for axis in range(kernel.w.ndim))
    lhs = site.array(lhs, "it is divided into groups")  # a leaf without factors: noted

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

    def of_base() -> Array:
        return apply_to_base(lambda w, x, sizes: product(x, w, sizes), kernel.w, lhs, group_sizes)

    if not isinstance(kernel, AdaptedKernel):
        site.used(kernel, "factored", roles=roles)
        return of_base()
    its = "".join(kernel.roles)
    misfit = any((kernel.roles[axis] == "b") != (axis in batch) for axis in (*batch, *summed))
    if group_sizes.ndim > 1 and misfit:
        raise NoRule(f"groups for each of a batch, with the axes {roles!r}; the adapter's are {its!r}")
    on_all_tokens(kernel)
    met = dict(zip((*lhs_batch, *lhs_summed), (*batch, *summed), strict=True))
    dropped = lhs if kernel.dropout is None else kernel.dropout.apply(lhs)
    x = Labelled(
        dropped.astype(computable(dropped.dtype)),
        tuple(met.get(axis, kernel.w.ndim + axis) for axis in range(lhs.ndim)),
    )
    x_rest = [label for label in x.labels if label >= kernel.w.ndim]
    w_rest = [axis for axis in range(kernel.w.ndim) if roles[axis] == "o"]
    out = (*batch, *x_rest, *w_rest)
    gain = None if kernel.gain is None else gain_of(kernel)
    if gain is not None and not set(gain.labels) <= {group, *out}:
        raise NoRule("of the outputs that have a gain, some are summed")
    if gain is not None and kernel.dropout is not None:
        raise NoRule("a product by group in which something is dropped, of a kernel that has a gain")
    like: Any = site.eqn.outvars[0].aval
    own = precision_of_factors(precision, lhs.dtype, kernel.w.dtype, like.dtype)
    groups = _Groups(group, kernel.w.ndim + lhs_ragged, batch, group_sizes, group_offset, own)
    if site.settings.observe:
        with_a = functools.partial(groups.thin, x.labels, its, {*out, *axes_of_b(its)})
        return site.observe(kernel, lhs, product, with_a, group_sizes, roles=roles)
    y = of_base()
    a, b = factors(kernel)
    first, second = (b, a) if all(its[axis] == "o" for axis in summed) else (a, b)
    dtype = thin_dtype(x.array.dtype, kernel.w.dtype, y.dtype)
    thin = groups.contract(x, first, keep={*second.labels, *out}, dtype=dtype)
    scaled = thin._replace(array=thin.array * kernel.scale)
    names = names_of(out, jax.typeof(y))
    low_rank = groups.contract(scaled, second, keep=out, dtype=computable(y.dtype), names=names).in_order(out)
    # Beside the two products: the scale on the thin one, and the sum with the base's.
    flops = groups.flops(x, first) + groups.flops(thin, second) + thin.array.size + y.size
    site.used(kernel, "factored", roles=roles, flops=flops)
    if gain is None:
        return Sum(y, low_rank)
    return times(Sum(y, low_rank), groups.of_each_row(gain, lhs.shape[lhs_ragged]).expand_to(out))


@dataclasses.dataclass(frozen=True)
class _Groups:
    """How the rows are divided.

    Attributes:
      group: the kernel's axis of experts.
      ragged: the label of the rows.
      batch: the kernel's batch axes, in the order in which `sizes` has them.
      sizes: how many rows each expert has, one run after the other.
      offset: as in `ragged_dot_general`.
      precision: likewise.
    """

    group: int
    ragged: int
    batch: Labels
    sizes: Array
    offset: Any
    precision: Any

    def contract(
        self,
        x: Labelled,
        factor: Labelled,
        *,
        keep: Collection[int],
        dtype: Any = None,
        names: Mapping[int, Any] | None = None,
    ) -> Labelled:
        """As `_contract.contract`, each row with its own expert's factor, if the factor has one for each."""
        if self.group not in factor.labels:
            return contract(x, factor, keep=keep, precision=self.precision, dtype=dtype, names=names)
        shared = [label for label in x.labels if label in factor.labels]
        summed = [label for label in shared if label not in keep]
        batch = sorted((label for label in shared if label in keep), key=(*self.batch, *shared).index)
        dot = [[[its.labels.index(label) for label in met] for its in (x, factor)] for met in (summed, batch)]
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
        return Labelled(array, (*batch, *rest))

    def of_each_row(self, x: Labelled, rows: int) -> Labelled:
        """What is kept for each expert, for each row: that of its own expert."""
        if self.group not in x.labels:
            return x
        one = Labelled(jnp.ones((rows, 1), x.array.dtype), (self.ragged, RANK))
        factor = Labelled(lax.expand_dims(x.array, [x.array.ndim]), (*x.labels, RANK))
        return self.contract(one, factor, keep={self.ragged, *x.labels})

    def thin(self, labels: Labels, roles: str, keep: Collection[int], x: Array, a: Array, sizes: Array) -> Array:
        """The product of rank r with `a` alone, for given sizes of the groups."""
        precise = dataclasses.replace(self, sizes=sizes, precision=lax.Precision.HIGHEST)
        return precise.contract(Labelled(x, labels), Labelled(a, axes_of_a(roles)), keep=keep).array

    def flops(self, x: Labelled, factor: Labelled) -> int:
        """Of a product; a row meets one expert's factor."""
        alone = [
            size
            for label, size in zip(factor.labels, factor.array.shape, strict=True)
            if label not in (*x.labels, self.group)
        ]
        return 2 * x.array.size * math.prod(alone)
