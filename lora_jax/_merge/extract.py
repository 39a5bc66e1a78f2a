"""Adapters from fully fine-tuned models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .._core.adapter import Adapter
from .._core.contract import widest
from .._core.linalg import SVD, as_factors, factors_from_svd, kernel_matrix, rank_for_energy, truncation_error
from .._core.paths import differences, flatten
from .._core.spec import Choice, Problem, Spec, fit, refuse
from .._core.stored import StoredLeaf, stored_among
from .._core.uses import Kernel
from .._core.values import equal
from .._core.variant import LowRank
from .._errors import AdapterError, counted, listed
from .._variants import Full
from .compress import check_energy


def extract(
    base: Any,
    tuned: Any,
    spec: Spec,
    *,
    kernels: Mapping[str, Kernel] | None = None,
    energy: float | None = None,
    param_dtype: Any = jnp.float32,
) -> tuple[dict[str, Adapter], dict[str, Array]]:
    """Approximates the change that full fine-tuning made by an adapter.

    The factors of a kernel are the truncated singular value decomposition of its change, the best approximation in the
    Frobenius norm (Eckart and Young 1936), with the root of the singular values in each factor. Rank and scale are
    those of the variant. A `Full` leaf gets the tuned values. Unchanged leaves are omitted. Does not work under `jit`.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> base = {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
    >>> tuned = {"kernel": jnp.eye(4, 3) * jnp.array([4.0, 3.0, 0.0]), "bias": jnp.ones(3)}
    >>> adapter, residual = lj.extract(base, tuned, {"kernel": lj.LoRA(rank=1, alpha=2)})
    >>> adapter, {path: round(float(left), 3) for path, left in residual.items()}
    ({'kernel': Adapter(LoRA(rank=1, alpha=2), 'io', a=float32[4, 1], b=float32[1, 3])}, {'bias': 1.0, 'kernel': 0.6})

    Args:
      base: the parameters before fine-tuning.
      tuned: the parameters after fine-tuning, with the same paths and shapes.
      spec: as for `init`, with `LoRA`, `RSLoRA`, `Full` and None as variants.
      kernels: as for `init`.
      energy: a fraction in (0, 1): each kernel gets the smallest rank that keeps this fraction of ‖ΔW‖² in the
        Frobenius norm, and at most the rank of its variant. The layers of a stack share the largest. The variant keeps
        its `alpha`, as in `compress`. None gives each kernel the rank of its variant.
      param_dtype: dtype of the adapter's arrays. They are computed in float32 or wider.

    Returns:
      The adapter; and for each changed leaf the relative error of the change in the Frobenius norm, before rounding to
      `param_dtype`, of shape (batch…). It is 0 if the adapter contains the whole change, and 1 for leaves that the spec
      does not adapt.

    Raises:
      AdapterError: if the trees differ in paths or shapes, or do not differ at all; if a changed leaf is quantized.
      SpecError: where `init` raises it; for a variant with arrays other than factors; for an energy outside (0, 1).
    """
    energy = None if energy is None else check_energy(energy)
    before, after = flatten(base)[0], flatten(tuned)[0]
    _check_same(before, after)
    changed = [path for path in before if not _equal(before[path], after[path])]
    if not changed:
        raise AdapterError(
            "Expected a fine-tuned tree; it equals the base in every leaf.\n"
            "  Call extract(base, tuned, spec) with two different trees."
        )
    _check_arrays(before, after, changed)
    adapter: dict[str, Adapter] = {}
    residual = {path: jnp.ones(()) for path in changed}
    chosen = fit(spec, before, kernels, only=changed)
    reasons = {path: _why_unsupported(choice) for path, choice in chosen.items()}
    refuse([Problem(path, before[path], chosen[path], why) for path, why in reasons.items() if why], len(chosen))
    for path, choice in chosen.items():
        adapter[path], residual[path] = _extracted(before[path], after[path], choice, energy, param_dtype)
    return adapter, residual


# One leaf


def _why_unsupported(choice: Choice) -> str:
    """Returns why the variant cannot represent a change of the kernel; empty if it can."""
    _, variant, axes = choice
    factored = isinstance(variant, LowRank) and set(variant.layout(axes)) == {"a", "b"} and variant.scale != 0
    if factored or isinstance(variant, Full):
        return ""
    return f"expected LoRA or RSLoRA, with a nonzero alpha, or Full; got {variant}"


def _extracted(before: Any, after: Any, choice: Choice, energy: float | None, dtype: Any) -> tuple[Adapter, Array]:
    _, variant, axes = choice
    if isinstance(variant, Full):
        return Adapter(variant, axes, value=jnp.asarray(after, dtype)), jnp.zeros(())
    assert isinstance(variant, LowRank)
    svd = SVD(*jnp.linalg.svd(_change(before, after, axes), full_matrices=False))
    if energy is not None:
        variant = dataclasses.replace(variant, rank=min(variant.rank, rank_for_energy(svd.s, energy)))
    factors = as_factors(*factors_from_svd(svd, variant.rank, variant.scale), axes, before.shape)
    arrays = {name: array.astype(dtype) for name, array in factors.items()}
    return Adapter(variant, axes, **arrays), truncation_error(svd.s, variant.rank)


def _change(before: Any, after: Any, axes: str) -> Array:
    """Returns the change of a kernel, (batch…, in, out)."""
    if isinstance(before, np.ndarray) and isinstance(after, np.ndarray):  # in NumPy: JAX may round float64 before
        wide = widest(before.dtype, after.dtype, jnp.float32)
        return kernel_matrix(after.astype(wide) - before.astype(wide), axes)
    first, second = (kernel_matrix(leaf, axes) for leaf in (before, after))
    return second - first


# Checks


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, StoredLeaf) or isinstance(other, StoredLeaf):
        kind: Any = jax.tree.structure(one)
        return kind == jax.tree.structure(other) and all(map(_equal, jax.tree.leaves(one), jax.tree.leaves(other)))
    if isinstance(one, Array) and isinstance(other, Array) and one.dtype == other.dtype:
        return bool(jnp.array_equal(one, other))  # also works for PRNG keys
    arrays = isinstance(one, Array | np.ndarray) and isinstance(other, Array | np.ndarray)
    return equal(one, other) if arrays else np.array_equal(one, other)


def _shape(leaf: Any) -> tuple[int, ...]:
    return leaf.shape if isinstance(leaf, StoredLeaf) else np.shape(leaf)


def _check_arrays(before: Mapping[str, Any], after: Mapping[str, Any], changed: Sequence[str]) -> None:
    quantized = [
        f"{line}, in {name}"
        for name, leaves in {"`base`": before, "`tuned`": after}.items()
        for line in stored_among(leaves, changed)
    ]
    if quantized:
        raise AdapterError(
            f"Expected the changed leaves to be arrays in both trees; {len(quantized)} are quantized.\n"
            f"{listed(quantized)}\n"
            "  For an adapter of the weights before they were quantized, pass these: extract(original, tuned, spec).\n"
            "  For one of the quantized weights, whose update includes their error: extract(quant.dequantize(base), …)."
        )


def _check_same(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    found = differences(
        *({repr(path): _shape(leaf) for path, leaf in leaves.items()} for leaves in (before, after)),
        only_one="is only in the base",
        only_other="is only in the tuned tree",
        unlike="has shape {one} in the base and {other} in the tuned tree",
    )
    if found:
        raise AdapterError(
            f"Expected two trees with the same paths and shapes; got {counted(len(found), 'difference')}.\n"
            f"{listed(found)}"
        )
