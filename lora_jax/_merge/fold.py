"""One leaf and its adapter: put together, taken apart, and what rounding took.

Computed in float32, or in what is wider among the leaf and the adapter, and cast once. The result is what the leaf was:
in NumPy's hands or JAX's, with the same sharding, in the same memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .._core.adapter import Adapter, Adapters
from .._core.contract import widest
from .._core.kernel import AdaptedKernel, delta, materialize
from .._core.values import in_device_memory, is_concrete, is_finite, on_same_devices


class Rounding(NamedTuple):
    """What rounding to the base's dtype took from one merged leaf.

    Attributes:
      max_error: largest distance of an element from the exact sum.
      mean_error: mean distance.
      lost: share of the elements that the adapter changes and that rounded back to the base's value, in [0, 1].
    """

    max_error: float
    mean_error: float
    lost: float


def fold(w: Any, part: Adapter) -> Any:
    """The leaf with its adapter, `W0 + s·A·B`."""
    return _on_leaf(_fold, w, part)


def unfold(w: Any, part: Adapter) -> Any:
    """The leaf without the low-rank term of its adapter, `W - s·A·B`; a gain is not taken out."""
    return _on_leaf(_unfold, w, part)


def is_fold(merged: Any, w: Any, part: Adapter) -> bool:
    """Whether a leaf is `fold` of another and its adapter, as any program and any processor may round it.

    True of a trace, which has no values.
    """
    if not all(map(is_concrete, (merged, w, *part.arrays.values()))):
        return True
    if merged.shape != w.shape:
        return False
    with jax.ensure_compile_time_eval(), precision_of(w):
        w, merged = on_same_devices(w, merged)
        return bool(_jitted(_is_fold, None)(w, part, merged))


def rounding(w: Any, part: Adapter, folded: Any) -> Rounding:
    """What was lost between `w` and its adapter, and `fold` of them."""
    return Rounding(*map(float, _on_near(_measure, w, part, folded)))


def drift_bound(merged: Any, restored: Any) -> float:
    """A bound on what two casts took: half a unit in the last place of the largest element, each."""
    info = jnp.finfo(merged.dtype)
    least = max(float(info.smallest_subnormal), float(jnp.finfo(jnp.float32).tiny))  # processors flush what is smaller
    largest = (float(abs(in_device_memory(leaf)).max()) for leaf in (merged, restored))
    return sum(max(float(info.eps) / 2 * each, least) for each in largest)


def precision_of(w: Any) -> Any:
    """A context in which NumPy's float64 is not cut to float32."""
    return jax.enable_x64(True) if w.dtype == np.float64 else contextlib.nullcontext()


def too_large(
    leaves: Mapping[str, Any], adapter: Adapters, results: Mapping[str, Any], *, taken: bool = False
) -> list[str]:
    """A line for each leaf that `fold`, or `unfold` if it is `taken`, has made too large for its dtype."""
    found = {path: _excess(leaves[path], adapter[path], leaf, taken=taken) for path, leaf in results.items()}
    return [
        f"{path!r}: {largest:.6g} in {leaves[path].dtype}, whose largest number is {jnp.finfo(leaves[path].dtype).max}"
        for path, largest in found.items()
        if largest is not None
    ]


def _excess(w: Any, part: Adapter, result: Any, *, taken: bool) -> float | None:
    """The largest magnitude of a sum that its dtype does not hold; None if it does, or if the leaf was not finite."""
    info = jnp.finfo(w.dtype)
    saturates = info.bits < 8  # these have neither infinity nor NaN: what is too large becomes their largest number
    if not is_concrete(result) or (is_finite(result) and not saturates) or not is_finite(w):
        return None
    largest = float(_on_near(_largest_taken if taken else _largest, w, part))
    half_a_place = float(info.eps) * 2.0 ** (int(info.maxexp) - 2)
    return None if saturates and largest <= float(info.max) + half_a_place else largest


def _in_wide(w: Array, part: Adapter) -> AdaptedKernel | Array:
    """What the model would see, were all of the leaf in float32, or in what is wider among its dtypes."""
    wide = widest(jnp.float32, w.dtype, *(array.dtype for array in part.arrays.values()))
    return part.variant.apply(w.astype(wide), part.arrays, part.axes, "")


def _sum(w: Array, part: Adapter) -> Array:
    kernel = _in_wide(w, part)
    return materialize(kernel) if isinstance(kernel, AdaptedKernel) else kernel


def _difference(w: Array, part: Adapter) -> Array:
    kernel = _in_wide(w, part)
    if isinstance(kernel, AdaptedKernel):
        return materialize(dataclasses.replace(kernel, scale=-kernel.scale, gain=None))
    added = _in_wide(jnp.zeros_like(w), part)
    assert not isinstance(added, AdaptedKernel)
    return w.astype(added.dtype) - added


def _fold(w: Array, part: Adapter) -> Array:
    return _sum(w, part).astype(w.dtype)


def _is_fold(w: Array, part: Adapter, merged: Array) -> Array:
    total, dtype = _sum(w, part), merged.dtype
    finite = jnp.where(jnp.isfinite(total), jnp.abs(total), 0)
    # By so much may two sums differ before they are cast: in their order, and where a product is added at once.
    slack = 4 * float(jnp.finfo(widest(dtype, jnp.float32)).eps) * jnp.max(finite, initial=0)
    low, high, got = (x.astype(dtype).astype(total.dtype) for x in (total - slack, total + slack, merged))
    return jnp.all(((low <= got) & (got <= high)) | (jnp.isnan(total) & jnp.isnan(got)))


def _unfold(w: Array, part: Adapter) -> Array:
    return _difference(w, part).astype(w.dtype)


def _largest(w: Array, part: Adapter) -> Array:
    return jnp.max(jnp.abs(_sum(w, part)))


def _largest_taken(w: Array, part: Adapter) -> Array:
    return jnp.max(jnp.abs(_difference(w, part)))


def _measure(w: Array, part: Adapter, folded: Array) -> tuple[Array, Array, Array]:
    kernel = _in_wide(w, part)
    if isinstance(kernel, AdaptedKernel) and kernel.gain is None:
        change = delta(kernel)
        total = kernel.w + change
        taken = total - kernel.w
        rest = (kernel.w - (total - taken)) + (change - taken)  # what rounding took from `total` itself (Knuth's sum)
    else:
        total = materialize(kernel) if isinstance(kernel, AdaptedKernel) else kernel
        change, rest = total - w.astype(total.dtype), jnp.zeros_like(total)
    error = jnp.abs((total - folded.astype(total.dtype)) + rest)
    changed = change != 0
    lost = jnp.sum(changed & (folded == w)) / jnp.maximum(jnp.sum(changed), 1)
    return jnp.max(error), jnp.mean(error), lost


def _on_leaf(function: Callable[..., Array], w: Any, part: Adapter) -> Any:
    """One leaf's result, where and as the leaf is; its temporaries do not outlive the call."""
    if not all(map(is_concrete, (w, *part.arrays.values()))):
        return function(jnp.asarray(w), part)
    with jax.ensure_compile_time_eval():  # also under `jit`, for arrays that it does not trace
        if isinstance(w, np.ndarray):
            with precision_of(w):
                return np.array(_jitted(function, None)(w, part))
        leaf = in_device_memory(w)
        return jax.device_put(_jitted(function, leaf.sharding)(leaf, part), w.sharding)


def _on_near(function: Callable[..., Any], w: Any, part: Adapter, *others: Any) -> Any:
    """What is measured of one leaf, in its devices' own memory."""
    with jax.ensure_compile_time_eval(), precision_of(w):
        return _jitted(function, None)(in_device_memory(w), part, *map(in_device_memory, others))


@functools.cache
def _jitted(function: Callable[..., Array], sharding: Any) -> Callable[..., Array]:
    return jax.jit(function, out_shardings=sharding)
