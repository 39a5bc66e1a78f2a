"""Weights the product of rank r per token and expert, for mixtures and for adapters of some tokens.

    y = x·W0 + (((x·A)·s) ⊙ g)·B

`g` has the axes of `x` that the kernel does not have, the tokens, and one weight for each expert, which is repeated
over the expert's ranks. It comes from the caller or from the activation, as `router(x·p)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..._core.axes import RANK, axes_with
from ..._core.contract import Labeled, Labels, widest
from ..._core.kernel import AdaptedKernel
from ..._core.routing import Experts, count
from .operation import Contraction

NO_TOKENS = "its adapter differs between tokens, and here it is not multiplied with one activation per token"


def routing_problem(kernel: AdaptedKernel, contraction: Contraction, shape: Sequence[int]) -> str | None:
    """Returns why the experts of a kernel cannot be weighted in a contraction with a result of this shape, or None."""
    if kernel.given is not None:
        expected = tuple(kernel.given.shape[len(_batch_of_given(kernel)) + 1 :])
        got = tuple(shape[at] for at in _token_axes(kernel, contraction.y))
        broadcasts = len(expected) == len(got) and all(map(_broadcasts, expected, got))
        if not broadcasts and (math.prod(expected),) != got:
            return f"expected token axes of shape {expected}, as `token_weights` has; got {got}"
        if not {*_batch_of_given(kernel)} <= {*contraction.y}:
            return "it has `token_weights` for each layer, and the axis of the layers is contracted here"
    if kernel.p is None:
        return None
    inputs, batch = ({*axes_with(kernel.roles, role)} for role in "ib")
    wide = {axis for axis in inputs if kernel.w.shape[axis] != 1}
    if not wide <= contraction.contracted or batch & contraction.contracted:
        return "its router reads the activation of the kernel's inputs, which are not what is contracted here"
    if kernel.split_inputs:
        return f"its router reads the whole activation, whose inputs are sharded over {sorted(kernel.split_inputs)}"
    standardizes = any(group.router is not None and group.router.standardizes for group in kernel.experts)
    if standardizes and not wide <= set(contraction.x):
        return "its router standardizes the activation, which is not defined for the window of a convolution"
    return None


def _token_axes(kernel: AdaptedKernel, labels: Labels) -> list[int]:
    """The axes of a result that are not axes of the kernel, in the order of `x`."""
    return [at for at, label in enumerate(labels) if label >= kernel.w.ndim]


def weights_by_rank(kernel: AdaptedKernel, x: Array, contraction: Contraction) -> Labeled:
    """Returns the weights of a kernel's experts, each repeated over the ranks of its expert, for `weigh`."""
    logits = None if kernel.p is None else _logits(kernel, x, contraction)
    parts = []
    columns = {"activation": 0, "caller": 0}
    for group in kernel.experts:
        if group.source == "constant":
            parts.append(Labeled(jnp.ones(len(group.ranks), jnp.float32), (RANK,)))
            continue
        source = logits if group.source == "activation" else _given(kernel, contraction)
        assert source is not None
        first = columns[group.source]
        columns[group.source] = last = first + len(group.ranks)
        array = lax.slice_in_dim(source.array, first, last, axis=-1)
        if group.router is not None:
            if group.router.standardizes:
                array = array / _deviation(x, contraction, source.labels)
            array = group.router.weights(array)
        parts.append(Labeled(array, source.labels))
    return _concatenate([_repeat(part, group) for part, group in zip(parts, kernel.experts, strict=True)])


def weigh(thin: Labeled, weights: Labeled) -> Labeled:
    """Multiplies a product of rank r with weights. Booleans select, so that what is not finite does not matter."""
    factor = weights.expand_to(thin.labels)
    if factor.dtype == bool:
        return thin._replace(array=jnp.where(factor, thin.array, jnp.zeros_like(thin.array)))
    return thin._replace(array=thin.array * factor.astype(thin.array.dtype))


def routing_flops(kernel: AdaptedKernel, contraction: Contraction) -> int:
    """Counts the FLOPs of `x·p` and of the weighting, without those of the router's function."""
    if not kernel.experts:
        return 0
    per_column = contraction.costs.first.forward // kernel.a.shape[-1]
    return per_column * count(kernel.experts, "activation") + contraction.costs.thin


def _given(kernel: AdaptedKernel, contraction: Contraction) -> Labeled:
    """Returns the weights from the caller, with the experts as the last axis; tokens may be merged into one axis."""
    if kernel.given is None:  # only shapes are needed
        return Labeled(jnp.ones(count(kernel.experts, "caller"), jnp.float32), (RANK,))
    tokens = tuple(contraction.y[at] for at in _token_axes(kernel, contraction.y))
    labels = (*_batch_of_given(kernel), RANK, *tokens)
    given = kernel.given if kernel.given.ndim == len(labels) else lax.collapse(kernel.given, labels.index(RANK) + 1)
    order = (*(label for label in labels if label != RANK), RANK)
    return Labeled(Labeled(given, labels).in_order(order), order)


def _batch_of_given(kernel: AdaptedKernel) -> tuple[int, ...]:
    """The kernel axes that the weights from the caller have."""
    return axes_with(kernel.roles, "b") if kernel.given_per_layer else ()


def _broadcasts(given: Any, size: Any) -> bool:
    return bool(given == 1 or given == size)


def _logits(kernel: AdaptedKernel, x: Array, contraction: Contraction) -> Labeled:
    """Returns `x·p` in at least float32, with the experts as the last axis."""
    dtype = widest(x.dtype, kernel.p.dtype, jnp.float32)
    product = contraction.x_times_a(x.astype(dtype), kernel.p.astype(dtype))
    order = (*(label for label in product.labels if label != RANK), RANK)
    return Labeled(product.in_order(order), order)


def _deviation(x: Array, contraction: Contraction, labels: Labels) -> Array:
    """Returns the standard deviation of the activation of each token over the inputs; 1 in place of 0."""
    inputs = [at for at, label in enumerate(contraction.x) if label in contraction.contracted]
    rest = tuple(label for label in contraction.x if label not in contraction.contracted)
    variance = jnp.var(x.astype(widest(x.dtype, jnp.float32)), axis=inputs)
    return Labeled(jnp.sqrt(jnp.where(variance == 0, 1, variance)), rest).expand_to(labels)


def _repeat(weights: Labeled, group: Experts) -> Labeled:
    """Repeats the weight of each expert over its ranks."""
    array, ranks = weights.array, group.ranks
    *tokens, experts = array.shape
    if len(set(ranks)) == 1:
        repeated = jnp.broadcast_to(array[..., None], (*tokens, experts, ranks[0]))
        return weights._replace(array=repeated.reshape(*tokens, experts * ranks[0]))
    columns = [
        jnp.broadcast_to(lax.slice_in_dim(array, at, at + 1, axis=-1), (*tokens, rank)) for at, rank in enumerate(ranks)
    ]
    return weights._replace(array=lax.concatenate(columns, array.ndim - 1))


def _concatenate(parts: Sequence[Labeled]) -> Labeled:
    """Concatenates weights along the ranks; an axis that only some have is repeated for the others."""
    if len(parts) == 1:
        return parts[0]
    labels = (*dict.fromkeys(label for part in parts for label in part.labels if label != RANK), RANK)
    dtype = widest(jnp.float32, *(part.array.dtype for part in parts))
    arrays = [part.expand_to(labels).astype(dtype) for part in parts]
    shape = jnp.broadcast_shapes(*(array.shape[:-1] for array in arrays))
    return Labeled(lax.concatenate([jnp.broadcast_to(x, (*shape, x.shape[-1])) for x in arrays], len(shape)), labels)
