"""Merges an adapter into its base, and reports the rounding errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from .._core.adapter import Adapter, Adapters
from .._core.attach import check
from .._core.paths import flatten, unflatten
from .._core.stored import StoredLeaf, stored_among
from .._core.table import Report
from .._core.values import is_concrete, is_finite
from .._errors import MergeError, listed
from .fold import Rounding, fold, is_fold, overflows, rounding


def merge(params: Any, adapter: Adapters, *, untie: bool = False) -> Any:
    """Merges an adapter into its base, such as `W = W0 + s·A·B`, for use with the unmodified model.

    Each leaf is computed in float32 or wider and cast once; its sharding and container stay the same. Nothing is
    changed in place; `jax.jit(merge, donate_argnums=0)` reuses the base's memory. `merge_report` measures the rounding
    errors of the cast. Merging an adapter twice adds it twice: a merged tree cannot be distinguished from a base.

    An adapted leaf must be an array; `QALoRA` is also merged into the zero points of a quantized one. Otherwise there
    are two choices, and which is better depends on the model: `merge(quant.dequantize(params), adapter)` merges into
    the weights that the adapter was trained on, and `merge(original, adapter)` into the weights before they were
    quantized. `quant.requantize` quantizes the result.
    Quantized leaves without an adapter stay as they are.

    Leaves are tied if they are the same Python object. Equal copies, views of one buffer and leaves that are separate
    tracers under `jit` are not detected. In that case only the leaf with an adapter is merged, and the others keep the
    base's values.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.ones((4, 3), jnp.bfloat16)}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> lj.merge(params, adapter)["kernel"].dtype.name
    'bfloat16'

    Args:
      params: the base that the adapter belongs to.
      adapter: from `init`, training or `restore`.
      untie: merge a leaf even if another path holds the same array; the two arrays are separate afterwards.

    Returns:
      A tree like `params`.

    Raises:
      AdapterError: if the adapter does not fit `params`.
      MergeError: if a factor is not finite or a merged leaf overflows its dtype, neither of which is checked under
        `jit`; if an adapted leaf is quantized; if leaves are tied; for a variant whose update differs
        between tokens.
    """
    leaves, treedef = flatten(params)
    check(leaves, adapter)
    check_mergeable(adapter)
    stored = {path: merged for path, part in adapter.items() if (merged := _merged_stored(leaves[path], part))}
    rest = {path: part for path, part in adapter.items() if path not in stored}
    check_arrays(leaves, rest, advice=_MERGE_ADVICE)
    check_finite(adapter)
    if not untie:
        check_tied(leaves, adapter, advice="merge(..., untie=True) changes only {path!r}; or adapt an untied tree.")
    folded = {path: fold(leaves[path], part) for path, part in rest.items()}
    check_fits(leaves, adapter, folded)
    return unflatten(treedef, leaves | folded | stored)


def _merged_stored(leaf: Any, part: Adapter) -> Any:
    """Returns a quantized leaf merged with its adapter, or None."""
    return part.variant.merged_into(leaf, part.arrays, part.axes) if isinstance(leaf, StoredLeaf) else None


def merge_report(params: Any, adapter: Adapters, merged: Any) -> Report[Rounding]:
    """Measures the rounding errors of `merge` in each leaf.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    >>> part = lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=jnp.full((2, 1), 2.0**-10), b=jnp.ones((1, 2)))
    >>> adapter = {"kernel": part}
    >>> lj.merge_report(params, adapter, lj.merge(params, adapter))["kernel"]
    Rounding(max_error=0.0009765625, mean_error=0.0009765625, lost=1.0)

    Args:
      params: the base before merging.
      adapter: the adapter that was merged.
      merged: what `merge` returned for them.

    Returns:
      `{path: Rounding}`: the largest and the mean error, and the share of the changed elements that were rounded back.
      The dict prints as a table.

    Raises:
      AdapterError: if the adapter does not fit `params` or `merged`.
      MergeError: if `merged` is not the merge of `params` and the adapter; if an adapted leaf is quantized; under
        `jit`.
    """
    leaves, results = flatten(params)[0], flatten(merged)[0]
    check(leaves, adapter)
    check(results, adapter, tree="merged")
    check_mergeable(adapter)
    for tree, given in {"params": leaves, "merged": results}.items():
        check_arrays(given, adapter, tree=tree, advice="Pass the tree that was merged into, and its merge.")
    if not all(map(is_concrete, jax.tree.leaves((params, adapter, merged)))):
        raise MergeError("Expected arrays with values; got traced arrays.\n  Call merge_report outside `jit`.")
    check_merge(leaves, adapter, results, base="params")
    return Report({path: rounding(leaves[path], part, results[path]) for path, part in adapter.items()})


# Checks

_MERGE_ADVICE = (
    "Merge into the weights that the adapter was trained on: merge(quant.dequantize(params), adapter);\n"
    "  or into the weights before they were quantized: merge(original, adapter)."
)


def check_arrays(leaves: Mapping[str, Any], adapter: Adapters, *, tree: str = "params", advice: str) -> None:
    """Raises `MergeError` if an adapted leaf is quantized; `tree` is the name of `leaves`."""
    if quantized := stored_among(leaves, adapter):
        raise MergeError(
            f"Expected the adapted leaves of `{tree}` to be arrays; {len(quantized)} of {len(adapter)} are quantized.\n"
            f"{listed(quantized)}\n  {advice}"
        )


def check_mergeable(adapter: Adapters) -> None:
    """Raises `MergeError` for variants whose update differs between tokens."""
    bad = [f"{path!r}: {part.variant}" for path, part in adapter.items() if part.variant.routed]
    if bad:
        raise MergeError(
            f"Expected variants with the same update for every token; {len(bad)} have another one for each, which no "
            f"kernel can.\n{listed(bad)}\n"
            "  Use the adapted function, lora(apply)(params, adapter, …); or merge a mixture with constant weights."
        )


def check_merge(leaves: Mapping[str, Any], adapter: Adapters, merged: Mapping[str, Any], *, base: str) -> None:
    """Raises `MergeError` if `merged` is not the merge of `leaves` and the adapter; `base` is the name of `leaves`."""
    wrong = [repr(path) for path, part in adapter.items() if not is_fold(merged[path], leaves[path], part)]
    if wrong:
        raise MergeError(
            f"Expected `merged` to be the merge of `{base}` and the adapter; {len(wrong)} of {len(adapter)} leaves are "
            f"not.\n{listed(wrong)}\n  It may have been trained further, or merged with another adapter or base."
        )


def check_finite(adapter: Adapters) -> None:
    """Raises `MergeError` if an array of the adapter has a value that is not finite."""
    bad = [
        f"{path!r}: {name}"
        for path, part in adapter.items()
        for name, array in part.arrays.items()
        if is_concrete(array) and not is_finite(array)
    ]
    if bad:
        raise MergeError(
            f"Expected finite factors; got NaN or infinity in {len(bad)} arrays.\n{listed(bad)}\n"
            "  Nothing was merged. Use a checkpoint from before the loss diverged."
        )


def check_fits(
    leaves: Mapping[str, Any], adapter: Adapters, results: Mapping[str, Any], *, unfolded: bool = False
) -> None:
    """Raises `MergeError` if a result of `fold`, or of `unfold` if `unfolded`, overflows its dtype."""
    if bad := overflows(leaves, adapter, results, unfolded=unfolded):
        raise MergeError(
            f"Expected {'the leaves' if unfolded else 'merged leaves'} to fit their dtype; {len(bad)} overflow.\n"
            f"{listed(bad)}\n  Cast the base to a wider dtype before merging, such as bfloat16 or float32."
        )


def check_tied(leaves: Mapping[str, Any], adapter: Adapters, *, advice: str) -> None:
    """Raises `MergeError` if another path holds the array of an adapted leaf. `advice` names its `path`."""
    paths: dict[int, list[str]] = {}
    for path, leaf in leaves.items():
        paths.setdefault(id(leaf), []).append(path)
    for path in adapter:
        others = [other for other in paths[id(leaves[path])] if other != path]
        if others:
            raise MergeError(
                f"Expected {path!r} to hold a separate array; {others[0]!r} holds the same one (tied weights).\n"
                f"  {advice.format(path=path)}"
            )
