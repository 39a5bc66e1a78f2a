"""Removes an adapter from a merged tree: exactly with the base, approximately without it."""

from __future__ import annotations

from typing import Any

import jax

from .._core.adapter import Adapter, Adapters
from .._core.attach import check
from .._core.paths import flatten, unflatten
from .._core.values import is_concrete
from .._errors import MergeError
from .fold import rounding_bound, unfold
from .merge import check_arrays, check_fits, check_merge, check_mergeable

_ADVICE = "Pass what `merge` got and returned: both are arrays, such as those of quant.dequantize(params)."


def unmerge(merged: Any, adapter: Adapters, *, base: Any) -> Any:
    """Removes a merged adapter exactly, by restoring the adapted leaves from the base.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> restored = lj.unmerge(lj.merge(params, adapter), adapter, base=params)
    >>> restored["kernel"] is params["kernel"]
    True

    Args:
      merged: what `merge` returned.
      adapter: the adapter that was merged.
      base: the base before merging; a tree of only the adapted leaves is enough.

    Returns:
      A tree like `merged`.

    Raises:
      AdapterError: if the adapter does not fit `merged` or `base`.
      MergeError: if `merged` is not the merge of `base` and `adapter`, up to rounding; if an adapted leaf is quantized.
    """
    leaves, treedef = flatten(merged)
    check(leaves, adapter, tree="merged")
    check_mergeable(adapter)
    base_leaves = flatten(base)[0]
    check(base_leaves, adapter, tree="base")
    for tree, given in {"merged": leaves, "base": base_leaves}.items():
        check_arrays(given, adapter, tree=tree, advice=_ADVICE)
    check_merge(base_leaves, adapter, leaves, base="base")
    return unflatten(treedef, {path: base_leaves[path] if path in adapter else leaf for path, leaf in leaves.items()})


def unmerge_approximately(merged: Any, adapter: Adapters) -> tuple[Any, dict[str, float]]:
    """Removes a merged adapter without the base, by computing `W - s·A·B`.

    The rounding errors of `merge` remain. If the base is available, use `unmerge`, which is exact.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> part = lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=jnp.full((4, 1), 2.0), b=jnp.ones((1, 3)))
    >>> restored, bounds = lj.unmerge_approximately(lj.merge(params, {"kernel": part}), {"kernel": part})
    >>> bool(abs(restored["kernel"] - params["kernel"]).max() <= bounds["kernel"])
    True

    Args:
      merged: what `merge` returned.
      adapter: the adapter that was merged.

    Returns:
      A tree like `merged`; and for each path a bound on the absolute error of its elements.

    Raises:
      AdapterError: if the adapter does not fit `merged`.
      MergeError: if the variant replaces or scales a leaf, which only `unmerge` can undo; if an adapted leaf is
        quantized; under `jit`.
    """
    leaves, treedef = flatten(merged)
    check(leaves, adapter, tree="merged")
    check_mergeable(adapter)
    check_arrays(leaves, adapter, tree="merged", advice=_ADVICE)
    if not all(map(is_concrete, jax.tree.leaves(([leaves[path] for path in adapter], adapter)))):
        raise MergeError("Expected arrays with values; got traced arrays.\n  Call unmerge_approximately outside `jit`.")
    restored = {path: _without(path, leaves[path], part) for path, part in adapter.items()}
    check_fits(leaves, adapter, restored, unfolded=True)
    tree = unflatten(treedef, {path: restored.get(path, leaf) for path, leaf in leaves.items()})
    return tree, {path: rounding_bound(leaves[path], leaf) for path, leaf in restored.items()}


def _without(path: str, leaf: Any, part: Adapter) -> Any:
    if not part.variant.adds:
        raise MergeError(
            f"Cannot unmerge {path!r} without the base: {part.variant} replaces or scales the leaf.\n"
            "  Call unmerge(merged, adapter, base=base)."
        )
    return unfold(leaf, part)
