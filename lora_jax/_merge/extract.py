"""Adapters from fully fine-tuned models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from .._core.adapter import Adapter
from .._core.attach import as_jax
from .._core.linalg import SVD, as_factors, factors_from_svd, kernel_matrix, truncation_error
from .._core.paths import differences, flatten
from .._core.spec import Choice, Problem, Spec, fit, refuse
from .._core.uses import Kernel
from .._core.values import equal
from .._core.variant import LowRank
from .._errors import AdapterError, listed
from .._variants import Full


def extract(
    base: Any,
    tuned: Any,
    spec: Spec,
    *,
    kernels: Mapping[str, Kernel] | None = None,
    param_dtype: Any = jnp.float32,
) -> tuple[dict[str, Adapter], dict[str, Array]]:
    """Makes the adapter that comes nearest to what full fine-tuning has changed.

    Each kernel's factors are the truncated singular value decomposition of its difference, the best in the Frobenius
    norm (Eckart and Young 1936), its root in either factor; the rank and the scale are the variant's. A `Full` leaf is
    the tuned one. Leaves that fine-tuning has not changed are left out. Outside `jit`, one leaf at a time.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> base = {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
    >>> tuned = {"kernel": jnp.eye(4, 3) * jnp.array([4.0, 3.0, 0.0]), "bias": jnp.ones(3)}
    >>> adapter, residual = lj.extract(base, tuned, {"kernel": lj.LoRA(rank=1, alpha=2)})
    >>> adapter, {path: round(float(left), 3) for path, left in residual.items()}
    ({'kernel': Adapter(LoRA(rank=1, alpha=2), 'io', a=float32[4, 1], b=float32[1, 3])}, {'bias': 1.0, 'kernel': 0.6})

    Args:
      base: the parameters before fine-tuning.
      tuned: those after it, a tree of the same paths and shapes.
      spec: as for `init`, of variants with factors alone (`LoRA`, `RSLoRA`), `Full` and None.
      kernels: as for `init`.
      param_dtype: dtype of the adapter's arrays; they are computed in float32 at least.

    Returns:
      The adapter; and for each leaf that fine-tuning has changed the share of the change that the adapter lacks, in the
      Frobenius norm, before rounding to `param_dtype`: 0 is all, 1 is nothing, for the leaves that the spec leaves
      alone. Of shape (batch…), as the layers of a stack differ.

    Raises:
      AdapterError: if the trees differ in paths or shapes, or in nothing.
      SpecError: as from `init`; for a variant with other arrays than factors.
    """
    before, after = flatten(base)[0], flatten(tuned)[0]
    _check_same(before, after)
    changed = [path for path in before if not _equal(before[path], after[path])]
    if not changed:
        raise AdapterError(
            "Expected a tuned tree; it equals the base in every leaf.\n  Give (base, tuned), in this order."
        )
    adapter: dict[str, Adapter] = {}
    residual = {path: jnp.ones(()) for path in changed}
    chosen = fit(spec, before, kernels, only=changed)
    refuse([Problem(path, before[path], its, _plain(its)) for path, its in chosen.items() if _plain(its)], len(chosen))
    for path, choice in chosen.items():
        adapter[path], residual[path] = _extracted(before[path], after[path], choice, param_dtype)
    return adapter, residual


# One leaf


def _plain(choice: Choice) -> str:
    """Why a change of the kernel cannot be put into the variant's arrays; empty if it can."""
    _, variant, axes = choice
    if isinstance(variant, LowRank) and set(variant.layout(axes)) == {"a", "b"} and variant.scale != 0:
        return ""
    wanted = "expected LoRA or RSLoRA, with an alpha that is not 0, or Full"
    return "" if isinstance(variant, Full) else f"{wanted}; got {variant}"


def _extracted(before: Any, after: Any, choice: Choice, dtype: Any) -> tuple[Adapter, Array]:
    _, variant, axes = choice
    if isinstance(variant, Full):
        return Adapter(variant, axes, value=jnp.asarray(after, dtype)), jnp.zeros(())
    assert isinstance(variant, LowRank)
    first, second = (kernel_matrix(as_jax(leaf), axes) for leaf in (before, after))
    svd = SVD(*jnp.linalg.svd(second - first, full_matrices=False))
    factors = as_factors(*factors_from_svd(svd, variant.rank, variant.scale), axes, before.shape)
    arrays = {name: array.astype(dtype) for name, array in factors.items()}
    return Adapter(variant, axes, **arrays), truncation_error(svd.s, variant.rank)


# Checks


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Array) and isinstance(other, Array):
        return bool(jnp.array_equal(one, other))  # of random keys, too
    arrays = isinstance(one, Array | np.ndarray) and isinstance(other, Array | np.ndarray)
    return equal(one, other) if arrays else np.array_equal(one, other)


def _check_same(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    found = differences(
        *({repr(path): np.shape(leaf) for path, leaf in leaves.items()} for leaves in (before, after)),
        only_one="is only in the base",
        only_other="is only in the tuned tree",
        unlike="has shape {one} in the base and {other} in the tuned tree",
    )
    if found:
        raise AdapterError(
            f"Expected two trees of the same paths and shapes; got {len(found)} differences.\n{listed(found)}"
        )
