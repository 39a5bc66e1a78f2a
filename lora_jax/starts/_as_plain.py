"""Converts an adapter on a changed base to an adapter on the original base."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapter, Adapters
from .._core.attach import check
from .._core.axes import RANK, axes_of_b
from .._core.contract import widest
from .._core.paths import flatten
from .._core.stored import stored_among
from .._core.values import equal, is_concrete, on_same_devices
from .._errors import AdapterError, listed
from .._merge.fold import fold, keep_float64
from ._leaf import Leaf, low_rank


def as_plain(params: Any, adapter: Adapters, started_params: Any, started_adapter: Adapters) -> dict[str, Adapter]:
    """Converts a trained adapter on a changed base to an adapter of twice the rank on the original base.

        W + s·A·B = (W0 - s·A₀·B₀) + s·A·B = W0 + s·[A, A₀]·[B; -B₀]

    An adapter that `pissa`, `olora`, `corda` or `lora_ga` initialized belongs to the base that they returned; the
    result belongs to the original base. The conversion is exact: α is such that the scale stays the same at rank 2r, 2α
    for LoRA and √2·α for rsLoRA. The adapter of an unchanged kernel is returned as it is.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import starts
    >>> params = {"kernel": jnp.eye(4)}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=1, alpha=4)})
    >>> started = starts.pissa(params, adapter)
    >>> trained = jax.tree.map(lambda x: x + 0.1, started.adapter)
    >>> starts.as_plain(params, trained, *started)
    {'kernel': Adapter(LoRA(rank=2, alpha=8.0), 'io', a=float32[4, 2], b=float32[2, 4])}

    Args:
      params: the original base.
      adapter: the adapter after training.
      started_params: the base that the initialization returned.
      started_adapter: the adapter that the initialization returned, before training.

    Returns:
      The adapter for `params`. For a base in 16 bits, the sum does not contain the rounding of the changed base.

    Raises:
      AdapterError: if the adapters do not fit the bases or each other; if `started_params` with `started_adapter` is
        not `params`, except under `jit`, where arrays have no values to compare; if a changed kernel is quantized, as
        by `loftq` and `qpissa`: the error of its quantization has no low rank.
    """
    leaves, changed = flatten(params)[0], flatten(started_params)[0]
    check(changed, started_adapter, tree="started_params")
    check(changed, adapter, tree="started_params")
    check(leaves, started_adapter)
    initial = {path: Leaf(path, leaves[path], part) for path, part in started_adapter.items() if low_rank(part.variant)}
    _check_arrays(initial, changed)
    _check(adapter, started_adapter, initial, changed)
    plain = dict(adapter)
    for path, leaf in initial.items():
        if path in adapter and not _equal(leaf.w, changed[path]):
            plain[path] = _concatenate(adapter[path], leaf)
    return plain


def _concatenate(trained: Adapter, initial: Leaf) -> Adapter:
    rank_axis = axes_of_b(trained.axes).index(RANK)
    a = jnp.concatenate([trained.a, initial.part.a], -1)
    b = jnp.concatenate([trained.b, -initial.part.b], rank_axis)
    return initial.replaced(initial.variant.at_rank(2 * initial.variant.rank), {**trained.arrays, "a": a, "b": b})


def _check_arrays(initial: dict[str, Leaf], changed: dict[str, Any]) -> None:
    different = [path for path, leaf in initial.items() if leaf.w is not changed[path]]
    quantized = stored_among({path: initial[path].w for path in different}, different)
    quantized += stored_among(changed, different)
    if quantized:
        raise AdapterError(
            f"Expected the changed kernels to be arrays, because only then the conversion is exact; {len(quantized)} "
            f"are quantized.\n{listed(quantized)}\n"
            "  For the best approximation of a rank: "
            "extract(params, merge(quant.dequantize(started_params), adapter), spec)."
        )


def _check(adapter: Adapters, started: Adapters, initial: dict[str, Leaf], changed: dict[str, Any]) -> None:
    wrong = [
        f"{path!r}: {adapter[path].variant} in `adapter`, {part.variant} in `started_adapter`"
        for path, part in started.items()
        if path in adapter and adapter[path].variant != part.variant
    ]
    wrong += [
        f"{path!r}: not in `started_adapter`"
        for path, part in adapter.items()
        if part.variant.needs_axes and path not in started
    ]
    wrong += [
        f"{path!r}: `started_params` with `started_adapter` is not `params`"
        for path, leaf in initial.items()
        if not _equal(leaf.w, changed[path]) and not _restores(leaf, changed[path])
    ]
    if wrong:
        raise AdapterError(
            "Expected `adapter` to be trained from `started_adapter`, which was initialized from `params`; "
            f"{len(wrong)} kernels differ.\n{listed(wrong)}\n"
            "  Pass the original base and both results of the initialization: "
            "started = pissa(params, adapter); as_plain(params, trained, *started)."
        )


def _equal(one: Any, other: Any) -> bool:
    return one is other or (is_concrete(one) and is_concrete(other) and equal(one, other))


def _restores(leaf: Leaf, changed: Any) -> bool:
    """Returns whether a changed kernel plus its initial update is the original kernel, up to rounding."""
    if not (is_concrete(leaf.w) and is_concrete(changed)):
        return True
    with jax.ensure_compile_time_eval(), keep_float64(leaf.w):
        return bool(_is_near(*on_same_devices(leaf.w, changed, fold(changed, leaf.part))))


@jax.jit
def _is_near(base: Array, residual: Array, restored: Array) -> Array:
    limits, wide = jnp.finfo(base.dtype), widest(jnp.float32, base.dtype, residual.dtype)
    base, residual, restored = (array.astype(wide) for array in (base, residual, restored))
    # The sums are rounded relative to the largest element, and each element to the dtype of the base.
    sizes = abs(base) + abs(residual)
    slack = 8 * float(jnp.finfo(jnp.float32).eps) * sizes.max(initial=0)
    return jnp.all(abs(restored - base) <= slack + float(limits.eps) * sizes + float(limits.smallest_subnormal))
