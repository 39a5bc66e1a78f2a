"""Initializations that quantize the base: quantizing and approximating the error alternate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array

from .._core.adapter import Adapter, Adapters
from .._core.attach import check
from .._core.base import dense
from .._core.numbers import integer
from .._core.paths import flatten, unflatten
from .._core.stored import StoredLeaf
from .._core.targets import Rules
from .._core.uses import Kernel
from .._errors import SpecError, listed
from .._merge.fold import unfold
from .._variants import Full
from ..quant import Format
from ..quant._quantize import choose_formats, quantize_leaf
from ._leaf import Leaf, Start, check_variant, low_rank_leaves, unwrapped
from ._pissa import approximation


def alternate(
    params: Any,
    adapter: Adapters,
    formats: Rules[Format | None],
    *,
    factors_first: bool,
    iterations: int,
    kernels: Mapping[str, Kernel] | None,
    niter: int | None,
    key: Array | None,
) -> Start:
    """Quantizes the leaves that `formats` selects, with factors for those that are adapted.

    Args:
      params: the base.
      adapter: from `init`.
      formats: as for `quant.quantize`.
      factors_first: whether each iteration approximates before it quantizes (QPiSSA), or after (LoftQ).
      iterations: the number of iterations.
      kernels: as for `quant.quantize`.
      niter: as for `pissa`.
      key: as for `pissa`.
    """
    iterations = integer("iterations", iterations, least=1)
    approximate = approximation(niter, key)
    leaves, treedef = flatten(params)
    check(leaves, adapter)
    chosen = choose_formats(formats, leaves, kernels)
    selected = {path: adapter[path] for path in chosen if path in adapter}
    _check_selected(adapter, selected)
    adapted = {leaf.path: leaf for leaf in low_rank_leaves(selected, leaves)}
    for leaf in adapted.values():
        check_variant(leaf, changes_base=True)
    new: dict[str, Any] = dict(adapter)
    with jax.default_matmul_precision("highest"):  # accelerators multiply float32 in bfloat16 by default
        for path, (_, format_, axes) in chosen.items():
            if path not in adapted:
                leaves[path] = quantize_leaf(leaves[path], format_, axes)
                continue
            leaf, part, stored = adapted[path], None, None
            for step in range(2 * iterations):
                if (step % 2 == 0) == factors_first:
                    part = leaf.adapter(*approximate(leaf, _error(leaf, stored)))
                else:
                    stored = quantize_leaf(_residual(leaf, part), format_, axes)
            leaves[path], new[path] = stored, part
    return Start(unflatten(treedef, leaves), new)


def _error(leaf: Leaf, stored: StoredLeaf | None) -> Array:
    """Returns the kernel minus the stored leaf, `(layers, in, out)`."""
    return leaf.matrices if stored is None else leaf.matrices - leaf.as_matrices(_dequantize(stored))


def _residual(leaf: Leaf, part: Adapter | None) -> Any:
    """Returns the kernel minus its low-rank part, in the dtype of the kernel."""
    return leaf.w if part is None else unfold(leaf.w, part)


_dequantize: Callable[[StoredLeaf], Array] = jax.jit(dense)


def _check_selected(adapter: Adapters, selected: Adapters) -> None:
    """Raises if `formats` selects no adapted leaf, or one that is trained itself."""
    if not selected:
        raise SpecError(
            "Expected formats for at least one adapted leaf, because the factors are to correct its error; they select "
            f"none of {len(adapter)}.\n{listed([repr(path) for path in adapter])}\n"
            "  To quantize other leaves only: quant.quantize(params, formats)."
        )
    trained = [repr(path) for path, part in selected.items() if isinstance(unwrapped(part.variant), Full)]
    if trained:
        raise SpecError(
            f"Expected formats for leaves that stay frozen; {len(trained)} are trained with Full().\n"
            f"{listed(trained)}\n  Put a rule before it that leaves them as they are: {{{trained[0]}: None}}."
        )
