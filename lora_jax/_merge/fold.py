"""Merges one leaf with its adapter, subtracts the adapter again, and measures the rounding errors.

Everything is computed in float32, or in the widest dtype of the leaf and the adapter, and cast once. The result is a
NumPy or JAX array like the leaf, with the same sharding and memory kind.
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
from .._core.memory import is_in_host_memory, to_device, to_host
from .._core.values import in_device_memory, is_concrete, is_finite, on_same_devices


class Rounding(NamedTuple):
    """The errors of one merged leaf from rounding to the base's dtype.

    Attributes:
      max_error: the largest absolute difference of an element from the exact sum.
      mean_error: the mean absolute difference.
      lost: of the elements that the adapter changes, the share that rounded back to the base's value, in [0, 1].
    """

    max_error: float
    mean_error: float
    lost: float

    def cells(self) -> dict[str, str]:
        """Returns the text of each column of a table."""
        return {
            "max error": f"{self.max_error:.3g}",
            "mean error": f"{self.mean_error:.3g}",
            "lost": f"{self.lost:.2%}",
        }


def fold(w: Any, part: Adapter) -> Any:
    """Returns the leaf merged with its adapter, such as `W0 + s·A·B`."""
    return _run_like_leaf(_fold, w, part)


def unfold(w: Any, part: Adapter) -> Any:
    """Returns the leaf minus the low-rank term, `W - s·A·B`; a gain is not divided out."""
    return _run_like_leaf(_unfold, w, part)


def is_fold(merged: Any, w: Any, part: Adapter) -> bool:
    """Returns whether a leaf equals `fold(w, part)` up to the rounding of any program or processor.

    Returns True for traced arrays, which have no values.
    """
    if not all(map(is_concrete, (merged, w, *part.arrays.values()))):
        return True
    if merged.shape != w.shape:
        return False
    with jax.ensure_compile_time_eval(), keep_float64(w):
        w, merged = on_same_devices(w, merged)
        return bool(_jitted(_is_fold, None)(w, part, merged))


def rounding(w: Any, part: Adapter, folded: Any) -> Rounding:
    """Measures the rounding errors of `folded`, which is `fold(w, part)`."""
    return Rounding(*map(float, _run_on_device(_rounding_errors, w, part, folded)))


def rounding_bound(merged: Any, restored: Any) -> float:
    """Bounds the error of two casts: for each, half a unit in the last place of the largest element."""
    info = jnp.finfo(merged.dtype)
    least = max(float(info.smallest_subnormal), float(jnp.finfo(jnp.float32).tiny))  # subnormals may be flushed to zero
    magnitudes = (float(abs(in_device_memory(leaf)).max()) for leaf in (merged, restored))
    return sum(max(float(info.eps) / 2 * magnitude, least) for magnitude in magnitudes)


def keep_float64(w: Any) -> Any:
    """Returns a context in which JAX does not convert NumPy's float64 to float32."""
    return jax.enable_x64(True) if w.dtype == np.float64 else contextlib.nullcontext()


def overflows(
    leaves: Mapping[str, Any], adapter: Adapters, results: Mapping[str, Any], *, unfolded: bool = False
) -> list[str]:
    """Returns a line for each result of `fold`, or of `unfold` if `unfolded`, that overflows its dtype."""
    found = {path: _overflow(leaves[path], adapter[path], leaf, unfolded=unfolded) for path, leaf in results.items()}
    return [
        f"{path!r}: {largest:.6g} in {leaves[path].dtype}, whose largest value is {jnp.finfo(leaves[path].dtype).max}"
        for path, largest in found.items()
        if largest is not None
    ]


def _overflow(w: Any, part: Adapter, result: Any, *, unfolded: bool) -> float | None:
    """Returns the largest magnitude if it overflows the dtype; None if not, or if the leaf was not finite."""
    info = jnp.finfo(w.dtype)
    saturates = info.bits < 8  # these dtypes have neither infinity nor NaN; casts clip to their largest value
    if not is_concrete(result) or (is_finite(result) and not saturates) or not is_finite(w):
        return None
    largest = float(_run_on_device(_largest_difference if unfolded else _largest_sum, w, part))
    half_ulp = float(info.eps) * 2.0 ** (int(info.maxexp) - 2)
    return None if saturates and largest <= float(info.max) + half_ulp else largest


def _apply_wide(w: Array, part: Adapter) -> AdaptedKernel | Array:
    """Applies the variant in float32, or in the widest dtype of the leaf and its adapter."""
    wide = widest(jnp.float32, w.dtype, *(array.dtype for array in part.arrays.values()))
    return part.variant.apply(w.astype(wide), part.arrays, part.axes, "")


def add(w: Array, part: Adapter) -> Array:
    """Returns the leaf merged with its adapter, before the cast to its dtype."""
    kernel = _apply_wide(w, part)
    return materialize(kernel) if isinstance(kernel, AdaptedKernel) else kernel


def subtract(w: Array, part: Adapter) -> Array:
    """Returns the leaf minus the low-rank term, before the cast to its dtype."""
    kernel = _apply_wide(w, part)
    if isinstance(kernel, AdaptedKernel):
        return materialize(dataclasses.replace(kernel, scale=-kernel.scale, gain=None))
    added = _apply_wide(jnp.zeros_like(w), part)
    assert not isinstance(added, AdaptedKernel)
    return w.astype(added.dtype) - added


def _fold(w: Array, part: Adapter) -> Array:
    return add(w, part).astype(w.dtype)


def _is_fold(w: Array, part: Adapter, merged: Array) -> Array:
    total, dtype = add(w, part), merged.dtype
    finite = jnp.where(jnp.isfinite(total), jnp.abs(total), 0)
    # Before the cast, two sums may differ by this much, because of their order and of fused multiply-adds.
    slack = 4 * float(jnp.finfo(widest(dtype, jnp.float32)).eps) * jnp.max(finite, initial=0)
    low, high, merged = (x.astype(dtype).astype(total.dtype) for x in (total - slack, total + slack, merged))
    return jnp.all(((low <= merged) & (merged <= high)) | (jnp.isnan(total) & jnp.isnan(merged)))


def _unfold(w: Array, part: Adapter) -> Array:
    return subtract(w, part).astype(w.dtype)


def _largest_sum(w: Array, part: Adapter) -> Array:
    return jnp.max(jnp.abs(add(w, part)))


def _largest_difference(w: Array, part: Adapter) -> Array:
    return jnp.max(jnp.abs(subtract(w, part)))


def _rounding_errors(w: Array, part: Adapter, folded: Array) -> tuple[Array, Array, Array]:
    kernel = _apply_wide(w, part)
    if isinstance(kernel, AdaptedKernel) and kernel.gain is None:
        change = delta(kernel)
        total = kernel.w + change
        added = total - kernel.w
        residual = (kernel.w - (total - added)) + (change - added)  # the rounding error of `total` (Knuth's two-sum)
    else:
        total = materialize(kernel) if isinstance(kernel, AdaptedKernel) else kernel
        change, residual = total - w.astype(total.dtype), jnp.zeros_like(total)
    error = jnp.abs((total - folded.astype(total.dtype)) + residual)
    changed = change != 0
    lost = jnp.sum(changed & (folded == w)) / jnp.maximum(jnp.sum(changed), 1)
    return jnp.max(error), jnp.mean(error), lost


def _run_like_leaf(function: Callable[..., Array], w: Any, part: Adapter) -> Any:
    """Returns `function(w, part)` as an array of the leaf's type, sharding and memory kind."""
    if not all(map(is_concrete, (w, *part.arrays.values()))):
        in_host_memory = is_in_host_memory(w)
        result = function(to_device(w) if in_host_memory else jnp.asarray(w), part)
        return to_host(result) if in_host_memory else result
    with jax.ensure_compile_time_eval():  # under `jit`, for arrays that are not traced
        if isinstance(w, np.ndarray):
            with keep_float64(w):
                return np.array(_jitted(function, None)(w, part))
        leaf = in_device_memory(w)
        return jax.device_put(_jitted(function, leaf.sharding)(leaf, part), w.sharding)


def _run_on_device(function: Callable[..., Any], w: Any, part: Adapter, *others: Any) -> Any:
    """Returns `function(w, part, *others)`, with the leaves in device memory."""
    with jax.ensure_compile_time_eval(), keep_float64(w):
        return _jitted(function, None)(in_device_memory(w), part, *map(in_device_memory, others))


@functools.cache
def _jitted(function: Callable[..., Array], sharding: Any) -> Callable[..., Array]:
    return jax.jit(function, out_shardings=sharding)
