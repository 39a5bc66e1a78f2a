"""Takes an adapter out of a merged tree: exactly with the base, approximately without."""

from __future__ import annotations

from typing import Any

from .._core.adapter import Adapter, Adapters
from .._core.attach import check
from .._core.paths import flatten, unflatten
from .._errors import MergeError
from .fold import drift_bound, unfold
from .merge import check_fits, check_merge, check_mergeable


def unmerge(merged: Any, adapter: Adapters, *, base: Any) -> Any:
    """Takes a merged adapter out again, exactly: the adapted leaves are those of the kept base.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> restored = lj.unmerge(lj.merge(params, adapter), adapter, base=params)
    >>> restored["kernel"] is params["kernel"]
    True

    Args:
      merged: what `merge` returned.
      adapter: the adapter that was merged.
      base: the base as it was before, or at least its adapted leaves' tree.

    Returns:
      A tree like `merged`.

    Raises:
      AdapterError: if the adapter does not fit `merged` or `base`.
      MergeError: if `merged` is not the merge of `base` and `adapter`, as any program or processor may have rounded it.
    """
    leaves, treedef = flatten(merged)
    check(leaves, adapter, tree="merged")
    check_mergeable(adapter)
    kept = flatten(base)[0]
    check(kept, adapter, tree="base")
    check_merge(kept, adapter, leaves, base="base")
    return unflatten(treedef, {path: kept[path] if path in adapter else leaf for path, leaf in leaves.items()})


def unmerge_approximately(merged: Any, adapter: Adapters) -> tuple[Any, dict[str, float]]:
    """Takes a merged adapter out again without the base, as nearly as the merged tree tells: `W - s·A·B`.

    What rounding took in `merge` cannot be had back. `unmerge` is exact where the base is still there.

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
      A tree like `merged`; and for each path a bound on the distance of any element from the base's.

    Raises:
      AdapterError: if the adapter does not fit `merged`.
      MergeError: if a leaf was replaced, or scaled, and only the base can bring it back.
    """
    leaves, treedef = flatten(merged)
    check(leaves, adapter, tree="merged")
    check_mergeable(adapter)
    restored = {path: _without(path, leaves[path], part) for path, part in adapter.items()}
    check_fits(leaves, adapter, restored, taken=True)
    tree = unflatten(treedef, {path: restored.get(path, leaf) for path, leaf in leaves.items()})
    return tree, {path: drift_bound(leaves[path], leaf) for path, leaf in restored.items()}


def _without(path: str, leaf: Any, part: Adapter) -> Any:
    if not part.variant.adds:
        raise MergeError(
            f"Expected a kept base: {path!r} was replaced or scaled by {part.variant}; what it was is not in "
            "`merged`.\n  Call unmerge(merged, adapter, base=base)."
        )
    return unfold(leaf, part)
