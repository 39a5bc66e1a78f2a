"""Folds an adapter into its base and takes it out again, and tells what rounding took."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Literal, overload

import jax

from .._core.adapter import Adapter, Adapters
from .._core.attach import check
from .._core.paths import flatten, unflatten
from .._core.values import is_concrete, is_finite
from .._core.variant import Variant
from .._errors import MergeError, listed
from .fold import Rounding, drift_bound, fold, is_fold, rounding, too_large, unfold


@overload
def merge(params: Any, adapter: Adapters, *, report: Literal[False] = ..., untie: bool = ...) -> Any: ...
@overload
def merge(
    params: Any, adapter: Adapters, *, report: Literal[True], untie: bool = ...
) -> tuple[Any, dict[str, Rounding]]: ...
def merge(params: Any, adapter: Adapters, *, report: bool = False, untie: bool = False) -> Any:
    """Folds an adapter into its base, such as `W = W0 + s·A·B`, for the unmodified model to serve.

    Each leaf is computed by itself, in float32 or wider, and cast once; its sharding and container stay. Nothing is
    changed in place; `jax.jit(merge, donate_argnums=0)` reuses the base's memory.

    Leaves count as tied if they are the same Python object. Equal copies, views of one buffer and leaves that became
    tracers of their own as arguments of `jit` are not found: there the leaf that has an adapter is merged, and the
    other keeps the base's values.

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
        adapter is in the leaves already. Under `jit` there are no values: none is checked, and `report` raises.
    """
    leaves, treedef = flatten(params)
    check(leaves, adapter)
    if report and not all(map(is_concrete, jax.tree.leaves((params, adapter)))):
        raise MergeError("Expected values to report on; got a trace, which has none.\n  Call merge outside `jit`.")
    _check_mergeable(adapter)
    _check_finite(adapter)
    _check_merged(leaves, adapter)
    if not untie:
        _check_tied(leaves, adapter)
    folded = {path: fold(leaves[path], part) for path, part in adapter.items()}
    _check_fits(leaves, adapter, folded)
    for path, part in adapter.items():
        _mark(folded[path], leaves[path], part)
    merged = unflatten(treedef, {path: folded.get(path, leaf) for path, leaf in leaves.items()})
    if not report:
        return merged
    return merged, {path: rounding(leaves[path], part, folded[path]) for path, part in adapter.items()}


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

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> restored = lj.unmerge(lj.merge(params, adapter), adapter, base=params)
    >>> restored["kernel"] is params["kernel"]
    True

    Args:
      params: what `merge` returned.
      adapter: the adapter that was merged.
      base: the base as it was before, or at least its adapted leaves' tree.
      report: also return, for each path, a bound on the distance of any element from the base's.

    Returns:
      A tree like `params`; with `report`, the tree and the bounds (0 with `base`).

    Raises:
      AdapterError: if the adapter does not fit `params`.
      MergeError: without `base` and `report`; if `params` is not the merge of `base` and `adapter`, as any program
        or processor may have rounded it; if a leaf was replaced whole, or scaled, and only the base can bring it back.
    """
    leaves, treedef = flatten(params)
    check(leaves, adapter)
    _check_mergeable(adapter)
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
        _check_fits(leaves, adapter, restored, taken=True)
        drift = {path: drift_bound(leaves[path], restored[path]) for path in adapter}
    tree = unflatten(treedef, {path: restored.get(path, leaf) for path, leaf in leaves.items()})
    return (tree, drift) if report else tree


# Checks


def _check_mergeable(adapter: Adapters) -> None:
    bad = [f"{path!r}: {part.variant}" for path, part in adapter.items() if part.variant.some_tokens]
    if bad:
        raise MergeError(
            f"Expected variants that act on every token; {len(bad)} act on some alone, and no one kernel does that.\n"
            f"{listed(bad)}\n  Serve the adapted function: lora(apply)(params, adapter, …, active_tokens=…)."
        )


def _check_finite(adapter: Adapters) -> None:
    bad = [
        f"{path!r}: {name}"
        for path, part in adapter.items()
        for name, array in part.arrays.items()
        if is_concrete(array) and not is_finite(array)
    ]
    if bad:
        raise MergeError(
            f"Expected finite factors; got NaN or infinity in {len(bad)} arrays.\n{listed(bad)}\n"
            "  Nothing was merged. Go back to a checkpoint from before the loss diverged."
        )


def _check_fits(
    leaves: Mapping[str, Any], adapter: Adapters, results: Mapping[str, Any], *, taken: bool = False
) -> None:
    if bad := too_large(leaves, adapter, results, taken=taken):
        raise MergeError(
            f"Expected {'the leaves' if taken else 'merged leaves'} to fit their dtype; {len(bad)} overflow.\n"
            f"{listed(bad)}\n  Cast the base to a wider dtype before merging, such as bfloat16 or float32."
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


# What was merged into which array: by the id of the array, a reference to it, and the adapters in it, each its variant
# and references to its arrays. They keep nothing alive.
_Mark = tuple[Variant, tuple[weakref.ref[Any], ...]]
_merged: dict[int, tuple[weakref.ref[Any], tuple[_Mark, ...]]] = {}


def _marks(leaf: Any) -> tuple[_Mark, ...]:
    reference, marks = _merged.get(id(leaf), (None, ()))
    return marks if reference is not None and reference() is leaf else ()


def _mark(folded: Any, leaf: Any, part: Adapter) -> None:
    arrays = tuple(part.arrays.values())
    if all(map(is_concrete, (folded, *arrays))):
        key = id(folded)
        earlier = _marks(leaf) if part.variant.needs_axes else ()  # of a leaf that was replaced nothing is left
        mark = (part.variant, tuple(map(weakref.ref, arrays)))
        _merged[key] = (weakref.ref(folded, lambda _: _merged.pop(key, None)), (*earlier, mark))


def _check_merged(leaves: Mapping[str, Any], adapter: Adapters) -> None:
    for path, part in adapter.items():
        arrays = list(part.arrays.values())
        for variant, references in _marks(leaves[path]):
            merged = [reference() for reference in references]
            if variant == part.variant and all(a is b for a, b in zip(arrays, merged, strict=True)):
                raise MergeError(
                    f"Expected the base; the adapter is merged already in {path!r}.\n"
                    "  Merge into the tree from before, or take it out first: unmerge(params, adapter, base=base)."
                )


def _kept(leaves: Mapping[str, Any], adapter: Adapters, base: Mapping[str, Any]) -> dict[str, Any]:
    """The base's own leaves, once it is sure that they are the ones that were merged."""
    check(base, adapter)
    wrong = [repr(path) for path, part in adapter.items() if not is_fold(leaves[path], base[path], part)]
    if wrong:
        raise MergeError(
            f"Expected `params` to be the merge of `base` and the adapter; {len(wrong)} of {len(adapter)} leaves are "
            f"not.\n{listed(wrong)}\n  Was it trained further, or merged with another adapter or base?"
        )
    return {path: base[path] for path in adapter}


def _without(path: str, leaf: Any, part: Adapter) -> Any:
    if not part.variant.adds:
        raise MergeError(
            f"Expected the kept base: {path!r} was replaced or scaled by {part.variant}; what it was is not in "
            "`params`.\n  Call unmerge(params, adapter, base=base)."
        )
    return unfold(leaf, part)
