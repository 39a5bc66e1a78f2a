"""Quantizes a merged tree again, and measures how much of the update is left."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .._core.base import dense
from .._core.contract import widest
from .._core.paths import differences, flatten, unflatten
from .._core.stored import StoredLeaf
from .._core.table import Report
from .._core.targets import Rules
from .._core.uses import Kernel
from .._core.values import in_device_memory, is_concrete
from .._errors import MergeError, SpecError, counted, listed
from ._format import Format
from ._leaf import QuantizedLeaf
from ._quantize import check_arrays, choose_formats, quantize_leaf


class Survival(NamedTuple):
    """How much of the update of one leaf is left after the leaf is quantized again.

    Attributes:
      survived: ⟨ΔQ, Δ⟩ / ‖Δ‖², where Δ is the update before and ΔQ after quantization. 1 if the update is kept, on
        average; 0 if it is lost.
      error: ‖ΔQ - Δ‖ / ‖Δ‖; 1 if all of the update is lost, and more if rounding adds more noise than that.
    """

    survived: float
    error: float

    def cells(self) -> dict[str, str]:
        """Returns the text of each column of a table."""
        return {"survived": f"{self.survived:.2%}", "error": f"{self.error:.3g}"}


def requantize(
    base: Any,
    merged: Any,
    spec: Rules[Format | None] | None = None,
    *,
    kernels: Mapping[str, Kernel] | None = None,
) -> tuple[Any, Report[Survival]]:
    """Quantizes a merged tree again, and reports how much of the update survives in each leaf.

        Q' = quantize(Q + Δ),   ΔQ = Q' - Q

    Small updates vanish: all elements of a dequantized kernel are values of its format, and an element that moves by
    less than half of the step to the next value is rounded back. In NF4 the steps are about a tenth of the largest
    weight of a block, and updates are usually smaller. Unlike with kernels that were not quantized before, these errors
    do not average out. Look at the report before serving the result; if too little survives, keep the merged kernels as
    arrays, choose a format with more bits, or serve the quantized base with the adapter, which loses nothing.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}
    >>> base = lj.quant.quantize(params, {"kernel": lj.quant.NF4()})
    >>> part = lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=jnp.full((64, 1), 1e-3), b=jnp.ones((1, 8)))
    >>> merged = lj.merge(lj.quant.dequantize(base), {"kernel": part})
    >>> tree, report = lj.quant.requantize(base, merged)
    >>> tree["kernel"].format, abs(report["kernel"].survived) < 0.1
    (NF4(axes='io'), True)

    Args:
      base: the tree with quantized leaves, before the merge.
      merged: what `merge(dequantize(base), adapter)` returned, or any tree like it.
      spec: formats by pattern, as for `quantize`, in place of the formats of `base`; leaves that it does not match stay
        arrays.
      kernels: as for `quantize`; only for `spec`.

    Returns:
      A tree like `merged`, with the leaves quantized again; leaves that equal those of `base`, dequantized, are those
      of `base`. And for each other quantized leaf its `Survival`, by path, which prints as a table.

    Raises:
      MergeError: if the trees differ in paths or shapes; if `base` has no quantized leaf and there is no `spec`; under
        `jit`, where values are not known.
      SpecError: where `quantize` raises it, as for leaves that are not finite; if no format made a leaf of `base`, and
        there is no `spec`.
    """
    before, (leaves, treedef) = flatten(base)[0], flatten(merged)
    _check(before, leaves)
    if spec is None:
        found = _formats(before)
        check_arrays(leaves, [path for path in found if not isinstance(leaves[path], StoredLeaf)])
    else:
        found = _chosen(spec, leaves, kernels)
    report: Report[Survival] = Report()
    for path, (format_, axes) in found.items():
        old, leaf = before[path], leaves[path]
        if isinstance(leaf, StoredLeaf):
            continue
        array = jnp.asarray(in_device_memory(leaf))
        unchanged = bool(_is_unchanged(old, array))
        if unchanged and isinstance(old, QuantizedLeaf) and _without_axes(old.format) == format_:
            leaves[path] = old
            continue
        new = leaves[path] = quantize_leaf(leaf, format_, axes)
        if not unchanged:
            report[path] = Survival(*map(float, _measure(old, array, new)))
    return unflatten(treedef, leaves), report


def _formats(before: Mapping[str, Any]) -> dict[str, tuple[Format, str]]:
    """Returns the format and the axes of each quantized leaf."""
    quantized = {path: leaf for path, leaf in before.items() if isinstance(leaf, QuantizedLeaf)}
    if not quantized:
        raise MergeError(
            "Expected `base` to have quantized leaves, whose formats to use again; got none.\n"
            "  Pass the quantized tree, as in requantize(base, merge(dequantize(base), adapter)); or formats in `spec`."
        )
    if unknown := [f"{path!r}: {leaf!r}" for path, leaf in quantized.items() if leaf.format is None]:
        raise SpecError(
            f"Expected leaves that a format of `lora_jax.quant` made; {len(unknown)} of {len(quantized)} are not.\n"
            f"{listed(unknown)}\n  Choose formats: requantize(base, merged, spec)."
        )
    formats = {path: leaf.format for path, leaf in quantized.items()}
    return {path: (_without_axes(format_), format_.axes or "") for path, format_ in formats.items() if format_}


def _chosen(spec: Any, leaves: Mapping[str, Any], kernels: Any) -> dict[str, tuple[Format, str]]:
    return {path: (format_, axes) for path, (_, format_, axes) in choose_formats(spec, leaves, kernels).items()}


def _without_axes(format_: Any) -> Any:
    return None if format_ is None else dataclasses.replace(format_, axes=None)


@jax.jit
def _is_unchanged(old: Any, merged: Array) -> Array:
    """Returns whether a leaf is that of the base, up to the rounding of any program that dequantizes it."""
    start = dense(old)
    wide = widest(start.dtype, merged.dtype, jnp.float32)
    eps = max(float(jnp.finfo(dtype).eps) for dtype in (start.dtype, merged.dtype))
    start, merged = start.astype(wide), merged.astype(wide)
    # Programs differ in the rounding of scales, relative to the largest, and of each element to its dtype.
    slack = 4 * float(jnp.finfo(jnp.float32).eps) * abs(start).max(initial=0)
    return jnp.all(abs(merged - start) <= slack + eps * abs(start))


@jax.jit
def _measure(old: Any, merged: Array, new: StoredLeaf) -> tuple[Array, Array]:
    wide = widest(merged.dtype, jnp.float32)
    start = dense(old).astype(wide)
    update, left = merged.astype(wide) - start, dense(new).astype(wide) - start
    square = jnp.sum(update * update)
    return jnp.sum(left * update) / square, jnp.sqrt(jnp.sum((left - update) ** 2) / square)


def _check(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    if not all(map(is_concrete, jax.tree.leaves((before, after)))):
        raise MergeError("Expected arrays with values; got traced arrays.\n  Call requantize outside `jit`.")
    found = differences(
        *({repr(path): getattr(leaf, "shape", None) for path, leaf in leaves.items()} for leaves in (before, after)),
        only_one="is only in `base`",
        only_other="is only in `merged`",
        unlike="has shape {one} in `base` and {other} in `merged`",
    )
    if found:
        raise MergeError(
            f"Expected two trees with the same paths and shapes; got {counted(len(found), 'difference')}.\n"
            f"{listed(found)}\n"
            "  The arguments come in this order: requantize(base, merged)."
        )
