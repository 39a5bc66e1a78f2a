"""Takes back a start that moved the base: what was trained, as an adapter on the base as it was."""

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
from .._core.values import equal, is_concrete, on_same_devices
from .._errors import AdapterError, listed
from .._merge.fold import fold, keep_float64
from ._leaf import Leaf, low_rank_leaves


def as_plain(params: Any, adapter: Adapters, started_params: Any, started_adapter: Adapters) -> dict[str, Adapter]:
    """Turns an adapter on a moved base into one of twice the rank on the base as it was, which it can share.

        W + s·A·B = (W0 - s·A₀·B₀) + s·A·B = W0 + s·[A, A₀]·[B; -B₀]

    After `pissa`, `olora` or `lora_ga` an adapter belongs to a base of its own; this makes it one for the public base.
    It is exact: α is set so that the scale stays the same at rank 2r, 2α for LoRA and √2·α for rsLoRA. Leaves whose
    base did not move keep their adapter.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import starts
    >>> params = {"kernel": jnp.eye(4)}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=1, alpha=4)})
    >>> started = starts.pissa(params, adapter)
    >>> trained = jax.tree.map(lambda x: x + 0.1, started.adapter)
    >>> starts.as_plain(params, trained, *started)
    {'kernel': Adapter(LoRA(rank=2, alpha=8.0), 'io', a=float32[4, 2], b=float32[2, 4])}

    Args:
      params: the base as it was before the start.
      adapter: after training.
      started_params: the base that the start returned.
      started_adapter: the adapter that it returned, before training.

    Returns:
      The adapter for `params`. Where rounding moved a base in 16 bits, the sum is that of the exact residue.

    Raises:
      AdapterError: if the adapters do not fit the bases or each other, or `started_params` with `started_adapter` are
        not `params`: the start was that of another base. Under `jit` there are no values, and this is not checked.
    """
    leaves, moved = flatten(params)[0], flatten(started_params)[0]
    check(moved, started_adapter, tree="started_params")
    check(moved, adapter, tree="started_params")
    starts = {leaf.path: leaf for leaf in low_rank_leaves(started_adapter, leaves)}
    _check(adapter, starts, moved)
    plain = dict(adapter)
    for path, leaf in starts.items():
        if path in adapter and not _equal(leaf.w, moved[path]):
            plain[path] = _joined(adapter[path], leaf.part)
    return plain


def _joined(trained: Adapter, started: Adapter) -> Adapter:
    """The trained factors beside those of the start, with a minus before one."""
    variant: Any = started.variant
    place = axes_of_b(started.axes).index(RANK)
    a = jnp.concatenate([trained.a, started.a], -1)
    b = jnp.concatenate([trained.b, -started.b], place)
    return Adapter(variant.at_rank(2 * variant.rank), started.axes, **{**trained.arrays, "a": a, "b": b})


def _check(adapter: Adapters, starts: dict[str, Leaf], moved: dict[str, Any]) -> None:
    wrong = [
        f"{path!r}: {adapter[path].variant} after training, {leaf.part.variant} at the start"
        for path, leaf in starts.items()
        if path in adapter and adapter[path].variant != leaf.part.variant
    ]
    wrong += [
        f"{path!r}: not in the start" for path in adapter if adapter[path].variant.needs_axes and path not in starts
    ]
    wrong += [
        f"{path!r}: the start and its base are not `params`"
        for path, leaf in starts.items()
        if not _equal(leaf.w, moved[path]) and not _restores(leaf, moved[path])
    ]
    if wrong:
        raise AdapterError(
            f"Expected an adapter that was trained from this start of this base; {len(wrong)} kernels differ.\n"
            f"{listed(wrong)}\n  Give what the start was given, and what it returned: "
            "started = pissa(params, adapter); as_plain(params, trained, *started)."
        )


def _equal(one: Any, other: Any) -> bool:
    return one is other or (is_concrete(one) and is_concrete(other) and equal(one, other))


def _restores(leaf: Leaf, moved: Any) -> bool:
    """Whether a moved kernel with its start is the base, up to the roundings of both."""
    if not (is_concrete(leaf.w) and is_concrete(moved)):
        return True
    with jax.ensure_compile_time_eval(), keep_float64(leaf.w):
        return bool(_near_base(*on_same_devices(leaf.w, moved, fold(moved, leaf.part))))


@jax.jit
def _near_base(base: Array, residue: Array, restored: Array) -> Array:
    eps = max(float(jnp.finfo(dtype).eps) for dtype in (base.dtype, jnp.float32))
    wide = widest(jnp.float32, base.dtype, residue.dtype)
    base, residue, restored = (array.astype(wide) for array in (base, residue, restored))
    largest = jnp.maximum(abs(base).max(), abs(residue).max())
    return abs(restored - base).max() <= 8 * eps * largest
