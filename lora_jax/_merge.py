"""Folds an adapter into its base and takes it out again, and tells what rounding took."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from ._adapter import AdaptedKernel, Adapter, Adapters, materialise
from ._attach import attach
from ._errors import MergeError, listed
from ._paths import flatten, unflatten


class Rounding(NamedTuple):
    """What the cast to the base's dtype took from one merged leaf.

    Attributes:
      max_error: largest distance of an element from the exact sum.
      mean_error: mean distance.
      lost: share of the elements that the adapter changes and that rounded back to the base's value, in [0, 1].
    """

    max_error: float
    mean_error: float
    lost: float


@overload
def merge(params: Any, adapter: Adapters, *, report: Literal[False] = ..., untie: bool = ...) -> Any: ...
@overload
def merge(
    params: Any, adapter: Adapters, *, report: Literal[True], untie: bool = ...
) -> tuple[Any, dict[str, Rounding]]: ...
def merge(params: Any, adapter: Adapters, *, report: bool = False, untie: bool = False) -> Any:
    """Folds an adapter into its base, `W = W0 + s·A·B`, for the unmodified model to serve.

    Each leaf is computed by itself, in float32 or wider, and cast once; its sharding and container stay. Nothing is
    changed in place; `jax.jit(merge, donate_argnums=0)` reuses the base's memory.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.ones((4, 3), jnp.bfloat16)}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> merged, report = lj.merge(params, adapter, report=True)
    >>> merged["kernel"].dtype.name, report["kernel"].max_error
    ('bfloat16', 0.0)

    Args:
      params: the base that the adapter was made for.
      adapter: from `init`, training or `restore`.
      report: also return what rounding took from each leaf.
      untie: merge into a leaf although another path holds the same array; the two are separate afterwards.

    Returns:
      A tree like `params`; with `report`, the tree and a `Rounding` for each path.

    Raises:
      AdapterError: if the adapter does not fit `params`.
      MergeError: if a factor is not finite or a merged leaf would overflow its dtype; if leaves are tied; if this very
        adapter is in the leaves already. Values are not checked under `jit`, where there are none.
    """
    leaves, treedef = flatten(params)
    attach(leaves, adapter)
    _check_finite(adapter)
    _check_merged(leaves, adapter)
    if not untie:
        _check_tied(leaves, adapter)
    folded = {path: _on_leaf(_fold, leaves[path], part) for path, part in adapter.items()}
    _check_overflow(leaves, folded)
    for path, part in adapter.items():
        _mark(folded[path], part)
    merged = unflatten(treedef, {path: folded.get(path, leaf) for path, leaf in leaves.items()})
    if not report:
        return merged
    measure = jax.jit(_measure)
    return merged, {
        path: Rounding(*map(float, measure(leaves[path], folded[path], part))) for path, part in adapter.items()
    }


@overload
def unmerge(params: Any, adapter: Adapters, *, base: Any, report: Literal[False] = ...) -> Any: ...
@overload
def unmerge(
    params: Any, adapter: Adapters, *, base: Any = ..., report: Literal[True]
) -> tuple[Any, dict[str, float]]: ...
def unmerge(params: Any, adapter: Adapters, *, base: Any = None, report: bool = False) -> Any:
    """Takes a merged adapter out again.

    What rounding took in `merge` cannot be had back from the merged tree. With the kept `base` the result is exact;
    without it, `report=True` is required, and says how far each leaf may have drifted.

    Args:
      params: what `merge` returned.
      adapter: the adapter that was merged.
      base: the base as it was before, or at least its adapted leaves' tree.
      report: also return, for each path, a bound on the distance of any element from the base's.

    Returns:
      A tree like `params`; with `report`, the tree and the bounds (0 with `base`).

    Raises:
      AdapterError: if the adapter does not fit `params`.
      MergeError: without `base` and `report`; if `params` is not the merge of `base` and `adapter`; if a leaf was
        replaced whole, and only the base can bring it back.
    """
    leaves, treedef = flatten(params)
    attach(leaves, adapter)
    if base is None and not report:
        raise MergeError(
            "Expected the kept base, or a wish to know the drift: what rounding took when merging is not in `params`.\n"
            "  Call unmerge(params, adapter, base=base), or unmerge(params, adapter, report=True)."
        )
    if base is not None:
        restored = _kept(leaves, adapter, flatten(base)[0])
        drift = dict.fromkeys(adapter, 0.0)
    else:
        restored = {path: _without(path, leaves[path], part) for path, part in adapter.items()}
        drift = {path: _drift(leaves[path], restored[path]) for path in adapter}
    tree = unflatten(treedef, {path: restored.get(path, leaf) for path, leaf in leaves.items()})
    return (tree, drift) if report else tree


# One leaf


def _exact(w: Array, part: Adapter, sign: int = 1) -> Array:
    """The leaf with its adapter, in float32 or wider; with `sign` -1, the leaf that it was added to."""
    wide = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    kernel = part.variant.apply(wide, part.arrays, part.axes, "")
    if not isinstance(kernel, AdaptedKernel):
        return kernel
    return materialise(dataclasses.replace(kernel, scale=sign * kernel.scale))


def _fold(w: Array, part: Adapter) -> Array:
    return _exact(w, part).astype(w.dtype)


def _unfold(w: Array, part: Adapter) -> Array:
    return _exact(w, part, sign=-1).astype(w.dtype)


def _measure(w: Array, folded: Array, part: Adapter) -> tuple[Array, Array, Array]:
    exact = _exact(w, part)
    error = jnp.abs(folded.astype(exact.dtype) - exact)
    changed = exact != w.astype(exact.dtype)
    lost = jnp.sum(changed & (folded == w)) / jnp.maximum(jnp.sum(changed), 1)
    return jnp.max(error), jnp.mean(error), lost


def _on_leaf(function: Callable[..., Array], w: Any, part: Adapter) -> Any:
    """One leaf's result, in the container and with the sharding of `w`; one leaf's temporaries live at a time."""
    if isinstance(w, Tracer):
        return function(w, part)
    if isinstance(w, np.ndarray):
        return np.array(_jitted(function, None)(w, part))
    return _jitted(function, w.sharding)(w, part)


@functools.cache
def _jitted(function: Callable[..., Array], sharding: Any) -> Callable[..., Array]:
    return jax.jit(function, out_shardings=sharding)


def _drift(merged: Array, restored: Array) -> float:
    """A bound on what two casts took: half a unit in the last place of the largest element, each."""
    half_unit = float(jnp.finfo(merged.dtype).eps) / 2
    return half_unit * (float(jnp.max(jnp.abs(merged))) + float(jnp.max(jnp.abs(restored))))


# Checks


def _is_concrete(x: Any) -> bool:
    return not isinstance(x, Tracer)


def _check_finite(adapter: Adapters) -> None:
    bad = [
        f"{path!r}: {name}"
        for path, part in adapter.items()
        for name, array in part.arrays.items()
        if _is_concrete(array) and not bool(jnp.isfinite(array).all())
    ]
    if bad:
        raise MergeError(
            f"Expected finite factors; got NaN or infinity in {len(bad)} arrays.\n{listed(bad)}\n"
            "  Nothing was merged. Go back to a checkpoint from before the loss diverged."
        )


def _check_overflow(leaves: Mapping[str, Any], folded: Mapping[str, Any]) -> None:
    bad = [
        f"{path!r} ({leaf.dtype})"
        for path, leaf in folded.items()
        if _is_concrete(leaf) and not bool(jnp.isfinite(leaf).all()) and bool(jnp.isfinite(leaves[path]).all())
    ]
    if bad:
        raise MergeError(
            f"Expected merged leaves to fit their dtype; {len(bad)} overflow.\n{listed(bad)}\n"
            "  Cast the base to a wider dtype before merging, such as bfloat16 or float32."
        )


def _check_tied(leaves: Mapping[str, Any], adapter: Adapters) -> None:
    holders: dict[int, list[str]] = {}
    for path, leaf in leaves.items():
        holders.setdefault(id(leaf), []).append(path)
    for path in adapter:
        others = [other for other in holders[id(leaves[path])] if other != path]
        if others:
            raise MergeError(
                f"Expected {path!r} to hold an array of its own; {others[0]!r} holds the same array (tied weights).\n"
                f"  merge(..., untie=True) changes {path!r} alone; or adapt the array under one path of an untied tree."
            )


# Which array came from merging which adapter: references to both, by the id of the merged one. They keep nothing alive.
_merged: dict[int, tuple[weakref.ref[Any], weakref.ref[Any]]] = {}


def _mark(leaf: Any, part: Adapter) -> None:
    factor = next(iter(part.arrays.values()))
    if _is_concrete(leaf) and _is_concrete(factor):
        key = id(leaf)
        _merged[key] = (weakref.ref(leaf, lambda _: _merged.pop(key, None)), weakref.ref(factor))


def _check_merged(leaves: Mapping[str, Any], adapter: Adapters) -> None:
    for path, part in adapter.items():
        leaf, factor = _merged.get(id(leaves[path]), (lambda: None, lambda: None))
        if leaf() is leaves[path] and factor() is next(iter(part.arrays.values())):
            raise MergeError(
                f"Expected the base; the adapter is merged already in {path!r}.\n"
                "  Merge into the tree from before, or take it out first: unmerge(params, adapter, base=base)."
            )


def _kept(leaves: Mapping[str, Any], adapter: Adapters, base: Mapping[str, Any]) -> dict[str, Any]:
    """The base's own leaves, once it is sure that they are the ones that were merged."""
    attach(base, adapter)
    wrong = [
        repr(path)
        for path, part in adapter.items()
        if _is_concrete(leaves[path]) and not np.array_equal(leaves[path], _on_leaf(_fold, base[path], part))
    ]
    if wrong:
        raise MergeError(
            f"Expected `params` to be the merge of `base` and the adapter; {len(wrong)} of {len(adapter)} leaves are "
            f"not.\n{listed(wrong)}\n  Was it trained further, or merged with another adapter or base?"
        )
    return {path: base[path] for path in adapter}


def _without(path: str, leaf: Any, part: Adapter) -> Any:
    if not part.variant.needs_axes:
        raise MergeError(
            f"Expected the kept base: {path!r} was replaced whole by {part.variant}; what it was is not in `params`.\n"
            "  Call unmerge(params, adapter, base=base)."
        )
    return _on_leaf(_unfold, leaf, part)
