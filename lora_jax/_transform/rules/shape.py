"""Operations that change the axes or the dtype of a kernel. The result is an adapted kernel again.

Each rule changes one factor at a time, given the kernel axis of each of the factor's axes before and after.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from ..._compat import primitives, varying
from ..._core.axes import RANK, join
from ..._core.contract import is_narrow
from ..._core.kernel import AdaptedKernel, Label, PlainKernel, TrackedKernel
from ..._core.placement import factor_spec
from ..._core.stored import Change
from ..contraction.forms import Sum
from ..interpreter import NoRule, Site, Value
from ..registry import rule

Axes = tuple[int, ...]


@rule(primitives.transpose_p, "moved")
def _transpose(site: Site, kernel: TrackedKernel, *, permutation: Axes) -> TrackedKernel:
    """The factors are transposed."""
    del site

    def move(factor: Array, before: Axes, after: Axes) -> Array:
        return lax.transpose(factor, [before.index(axis if axis == RANK else permutation[axis]) for axis in after])

    roles = [kernel.roles[axis] for axis in permutation]
    return kernel.moved(Change(lax.transpose, (tuple(permutation),)), roles, move)


def _factor_sharding(sharding: Any, axes: Axes) -> Any:
    """Returns the sharding of a factor with some of the kernel's axes, given that of the kernel or None."""
    return None if sharding is None else sharding.update(spec=factor_spec(axes, sharding.spec))


@rule(primitives.broadcast_in_dim_p, "moved")
def _broadcast_in_dim(
    site: Site, kernel: Value, *dynamic_shape: Any, shape: Axes, broadcast_dimensions: Axes, sharding: Any
) -> TrackedKernel:
    """A new axis is an output axis, along which `b` is broadcast."""
    if dynamic_shape:
        raise NoRule("a shape known only at run time")
    del site
    roles = [kernel.role_of_new_axis("o")] * len(shape)
    for axis, role in zip(broadcast_dimensions, kernel.roles, strict=True):
        roles[axis] = role

    def move(factor: Array, before: Axes, after: Axes) -> Array:
        rank = factor.shape[before.index(RANK)]
        sizes = [rank if axis == RANK else shape[axis] for axis in after]
        dimensions = [after.index(axis if axis == RANK else broadcast_dimensions[axis]) for axis in before]
        return lax.broadcast_in_dim(factor, sizes, dimensions, out_sharding=_factor_sharding(sharding, after))

    return kernel.moved(Change(_broadcast, (tuple(shape), tuple(broadcast_dimensions), sharding)), roles, move)


def _broadcast(w: Array, shape: Axes, dimensions: Axes, sharding: Any) -> Array:
    return lax.broadcast_in_dim(w, shape, dimensions, out_sharding=sharding)


@rule(primitives.reshape_p, "moved")
def _reshape(site: Site, kernel: Value, *dynamic_shape: Any, new_sizes: Axes, dimensions: Any, sharding: Any) -> Value:
    """Axes of one role are split or merged, axes of size 1 with any; a merge of inputs with outputs is refused."""
    if dynamic_shape:
        raise NoRule("a shape known only at run time")
    if dimensions is not None:  # a transpose before the reshape
        kernel = _transpose(site, kernel, permutation=dimensions)
    after_reshape = _roles_after if isinstance(kernel, AdaptedKernel) else _labels_after
    roles = after_reshape(kernel, new_sizes)

    def move(factor: Array, before: Axes, after: Axes) -> Array:
        rank = factor.shape[before.index(RANK)]
        sizes = [rank if axis == RANK else new_sizes[axis] for axis in after]
        return lax.reshape(factor, sizes, out_sharding=_factor_sharding(sharding, after))

    return site.materialize_row(kernel.moved(Change(_reshape_array, (tuple(new_sizes), sharding)), roles, move))


def _reshape_array(w: Array, sizes: Axes, sharding: Any) -> Array:
    return lax.reshape(w, sizes, out_sharding=sharding)


def _roles_after(kernel: AdaptedKernel, new_sizes: Axes) -> list[str]:
    """Returns the roles of a kernel's axes after a reshape. An axis of size 1 can be merged with axes of any role."""
    shape = kernel.w.shape
    roles = [""] * len(new_sizes)
    for old, new in _blocks(shape, new_sizes):
        wide = [axis for axis in old if shape[axis] != 1]
        role = join([kernel.roles[axis] for axis in wide or old[:1]])
        if len(role) > 1:
            raise NoRule(f"a reshape from {shape} to {new_sizes} merges axes with the roles {role!r}")
        for place in new:
            roles[place] = role if not wide or new_sizes[place] != 1 else ""
    # A new axis of size 1 becomes the input or the output if there is none otherwise.
    lost = [role for role in "io" if role in kernel.roles and role not in roles]
    return [role or (lost.pop() if lost else "o") for role in roles]


def _labels_after(kernel: PlainKernel, new_sizes: Axes) -> list[frozenset[Label]]:
    """Returns the axes of leaves that each axis comes from after a reshape."""
    shape, labels = kernel.w.shape, [frozenset[Label]()] * len(new_sizes)
    place = 0  # the last new axis so far
    for old, new in _blocks(shape, new_sizes):
        wide = [axis for axis in old if shape[axis] != 1]
        joined = frozenset[Label]().union(*(kernel.roles[axis] for axis in wide or old[:1]))
        for place in new:
            labels[place] = joined if not wide or new_sizes[place] != 1 else frozenset()
        if not new and labels:  # merged into the axis before it
            labels[place] |= joined
    return labels


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs the smallest runs of axes that span the same elements, in two shapes of the same size.

    >>> _blocks((8, 4, 16), (8, 64)), _blocks((6, 4), (2, 3, 4))
    ([([0], [0]), ([1, 2], [1])], [([0], [0, 1]), ([1], [2])])
    """
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        ends = itertools.product(range(min(i + 1, len(old)), len(old) + 1), range(min(j + 1, len(new)), len(new) + 1))
        # Symbolic sizes can be tested for equality, but often not ordered.
        equal = [(k, m) for k, m in ends if math.prod(old[i:k]) == math.prod(new[j:m])]
        k, m = min(equal, key=sum, default=(len(old), len(new)))
        blocks.append(([*range(i, k)], [*range(j, m)]))
        i, j = k, m
    return blocks


@rule(primitives.rev_p, "moved")
def _rev(site: Site, kernel: TrackedKernel, *, dimensions: Axes) -> TrackedKernel:
    """The factors are reversed."""
    del site

    def move(factor: Array, before: Axes, after: Axes) -> Array:
        del after
        return lax.rev(factor, [before.index(axis) for axis in dimensions if axis in before])

    return kernel.moved(Change(lax.rev, (tuple(dimensions),)), kernel.roles, move)


@rule(primitives.pad_p, "moved")
def _pad(site: Site, kernel: Value, value: Value, *, padding_config: Sequence[tuple[int, int, int]]) -> TrackedKernel:
    """The factors are padded with zeros, the base with any value; a kernel as the padding value is refused."""
    if not isinstance(kernel, TrackedKernel):
        raise NoRule("the kernel is the padding value")
    if "gain" in kernel.factors and (isinstance(value, Array) or value != 0):
        raise NoRule("a kernel with a gain is padded with a value other than 0")
    value = site.to_array(value, "the kernel is the padding value")

    def move(factor: Array, before: Axes, after: Axes) -> Array:
        del after
        config = [(0, 0, 0) if axis == RANK else padding_config[axis] for axis in before]
        # Zeros for any padding value: the low-rank term must not change it.
        return lax.pad(factor, jnp.zeros((), factor.dtype), config)

    return kernel.moved(Change(lax.pad, (tuple(padding_config),)), kernel.roles, move, value)


@rule(primitives.convert_element_type_p, "moved")
def _convert_element_type(
    site: Site, kernel: TrackedKernel | Sum, *, new_dtype: Any, weak_type: bool, sharding: Any
) -> TrackedKernel | Sum:
    """The factors keep their dtype until they are consumed; a cast to an integer dtype is refused."""
    del site, weak_type  # the next operation has a strong type either way
    if isinstance(kernel, Sum):
        if sharding is not None or is_narrow(new_dtype) or not jnp.issubdtype(new_dtype, jnp.floating):
            raise NoRule("a cast of a sum")  # the sum is added first, then cast
        return kernel.cast(new_dtype)
    if not jnp.issubdtype(new_dtype, jnp.floating):
        raise NoRule(f"a cast to {jnp.dtype(new_dtype).name}")
    if sharding is not None:
        raise NoRule("a cast that also changes the sharding")
    return kernel.with_base(Change(lax.convert_element_type, (jnp.dtype(new_dtype),), elementwise=True))


@rule(primitives.reduce_precision_p, "moved")
def _reduce_precision(site: Site, kernel: TrackedKernel, *, exponent_bits: int, mantissa_bits: int) -> TrackedKernel:
    """The factors keep their precision."""
    del site
    return kernel.with_base(Change(lax.reduce_precision, (exponent_bits, mantissa_bits), elementwise=True))


@rule("optimization_barrier", "moved")
def _optimization_barrier(site: Site, *operands: Value) -> list[Value]:
    """All arrays pass the barrier together."""
    del site
    return list(lax.optimization_barrier(operands))


@rule(primitives.copy_p, "moved")
def _copy(site: Site, kernel: TrackedKernel) -> TrackedKernel:
    """The base is copied."""
    del site
    return kernel.with_base(Change(jnp.copy, elementwise=True))


@rule(primitives.name_p, "moved")
def _name(site: Site, kernel: TrackedKernel, *, name: str) -> TrackedKernel:
    """The base gets the name, for `remat` policies."""
    del site
    return kernel.with_base(Change(checkpoint_name, (name,), elementwise=True))


@rule(primitives.stop_gradient_p, "moved")
def _stop_gradient(site: Site, kernel: TrackedKernel) -> TrackedKernel:
    """The factors get no gradient either."""
    del site

    def move(factor: Array, before: Axes, after: Axes) -> Array:
        del before, after
        return lax.stop_gradient(factor)

    return kernel.moved(Change(lax.stop_gradient, elementwise=True), kernel.roles, move)


@rule("pvary", "moved")
def _pvary(site: Site, kernel: TrackedKernel, *, axes: Sequence[str]) -> TrackedKernel:
    """The base varies over the mesh axes; the factors do when they are consumed."""
    del site  # `shard_map` inserts it before a replicated kernel is consumed; JAX inserts it for the factors
    return kernel.with_base(Change(_vary, (tuple(axes),), elementwise=True))


def _vary(w: Array, axes: tuple[str, ...]) -> Array:
    # A barrier with the operands lets a stored base vary with them in JAX 0.10.
    rest = tuple(axis for axis in axes if axis not in varying(jax.typeof(w)))
    return lax.pcast(w, rest, to="varying") if rest else w
