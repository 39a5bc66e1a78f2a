"""Interpolates between a base and an adapted model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .._core.adapter import Adapter, Adapters, check_adapter
from .._core.attach import as_jax, check
from .._core.base import dense
from .._core.contract import widest
from .._core.numbers import number
from .._core.paths import flatten
from .._errors import AdapterError, SpecError, listed
from .._variants import Full

# The update is linear in each of these arrays. `scale` is that of a leaf of a stack.
_LINEAR = ("scale", "b", "lambda_b", "rows", "bias", "r")


def interpolate(adapter: Adapters, weight: Any, *, base: Any = None) -> dict[str, Adapter]:
    """Scales the update of an adapter: 0 is the base, 1 the adapted model (WiSE-FT, arXiv:2109.01903).

        W = (1 - λ)·W0 + λ·(W0 + ΔW) = W0 + λ·ΔW

    The weight may be an argument of a jitted function, in which other weights compile nothing. It is multiplied into
    one small array of each leaf, in its dtype, and is not restricted to [0, 1]. The model between two adapters is
    `combine({"one": (one, 1 - weight), "other": (other, weight)}, "concat")`.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params, apply = {"kernel": jnp.ones((2, 2))}, lambda params, x: x @ params["kernel"]
    >>> adapter = {"kernel": lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=jnp.ones((2, 1)), b=jnp.ones((1, 2)))}
    >>> run = jax.jit(lambda weight, x: lj.lora(apply)(params, lj.many.interpolate(adapter, weight), x))
    >>> run(0.0, jnp.ones(2)), run(0.5, jnp.ones(2))
    (Array([2., 2.], dtype=float32), Array([3., 3.], dtype=float32))

    Args:
      adapter: from training, `restore` or `select`.
      weight: λ, a number or a scalar array.
      base: the base that the adapter belongs to; needed for leaves of `Full` only.

    Returns:
      An adapter of the same structure, shapes and dtypes.

    Raises:
      AdapterError: if a leaf's update is not linear in an array, as for DoRA; for `Full` without `base`, or unlike it.
      SpecError: for a weight that is not a scalar.
    """
    check_adapter(adapter, "The arguments come in this order: interpolate(adapter, weight).")
    if isinstance(weight, jax.Array):
        if weight.shape:
            raise SpecError(f"Expected a number for `weight`; got {weight.dtype}{list(weight.shape)}.")
    else:
        weight = number("weight", weight)
    full = {path: part for path, part in adapter.items() if isinstance(part.variant, Full)}
    bad = [f"{path!r}: {why}" for path, part in adapter.items() if (why := _why_not(part, base))]
    if bad:
        raise AdapterError(
            f"Expected leaves whose update can be scaled; got {len(bad)} that cannot.\n{listed(bad)}\n"
            "  Interpolate the merged weights, or take the change as LoRA with extract(base, merged, spec)."
        )
    leaves = flatten(base)[0] if full else {}
    check(leaves, full, tree="base")
    return {path: _scaled(part, weight, leaves.get(path)) for path, part in adapter.items()}


def _why_not(part: Adapter, base: Any) -> str:
    if isinstance(part.variant, Full):
        return "a change of Full is relative to the base; pass base=params" if base is None else ""
    if not (part.variant.adds or part.variant.routed) or not any(name in part.arrays for name in _LINEAR):
        return f"{part.variant} replaces or normalizes the kernel"
    return ""


def _scaled(part: Adapter, weight: Any, leaf: Any) -> Adapter:
    name = next(name for name in (*_LINEAR, "value") if name in part.arrays)
    array = jnp.asarray(part.arrays[name])
    dtype = widest(array.dtype, jnp.float32)
    factor = jnp.asarray(weight).astype(dtype)
    scaled = factor * array.astype(dtype)
    if name == "value":
        scaled += (1 - factor) * dense(as_jax(leaf)).astype(dtype)
    return Adapter(part.variant, part.axes, **{**part.arrays, name: scaled.astype(array.dtype)})
