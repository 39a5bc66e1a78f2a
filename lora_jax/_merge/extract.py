"""Adapters by singular values: from a fully fine-tuned model, and from an adapter of a higher rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from .._core.adapter import Adapter, Adapters
from .._core.attach import as_jax
from .._core.axes import axes_of_a, axes_of_b
from .._core.linalg import SVD, cut_as, factors_from, has_factors, kernel_matrix, share_left, svd_of_delta
from .._core.paths import Pattern, flatten, matcher, nearest, pattern_text
from .._core.spec import Choice, Problem, Spec, fit, refuse
from .._core.uses import Kernel
from .._core.values import equal
from .._core.variant import LowRank
from .._errors import AdapterError, SpecError, listed
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


def compress(adapter: Adapters, rank: int | Mapping[Pattern, int]) -> tuple[dict[str, Adapter], dict[str, Array]]:
    """Brings an adapter to a lower rank, from its factors alone.

    Each `s·A·B` is replaced by its best approximation in the Frobenius norm (Eckart and Young 1936), from QR
    decompositions of the factors; the product is never formed. The variant keeps its `alpha`, so that its scale is that
    of the new rank; the factors are made for it. Leaves of that rank or lower, and all other arrays, stay as they are.
    Works under `jit`.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> a, b = jnp.eye(5, 2), jnp.eye(2, 3) * jnp.array([[4.0], [3.0]])
    >>> adapter = {"kernel": lj.Adapter(lj.LoRA(rank=2, alpha=4), "io", a=a, b=b)}
    >>> smaller, residual = lj.compress(adapter, 1)
    >>> smaller["kernel"], round(float(residual["kernel"]), 3)
    (Adapter(LoRA(rank=1, alpha=4), 'io', a=float32[5, 1], b=float32[1, 3]), 0.6)

    Args:
      adapter: from training, `restore` or `extract`.
      rank: for every leaf; or for those that match a pattern, of which the first that matches a path decides.

    Returns:
      The adapter, its arrays in the dtypes that they had; and for each leaf with factors the share of `s·A·B` that is
      lost, in the Frobenius norm, before rounding to that dtype; of shape (batch…).

    Raises:
      SpecError: for a rank below 1, a pattern that matches no leaf with factors, or a leaf of `AdaLoRA`, which
        `adaptive.compact` makes plain first.
    """
    factored = {path: part for path, part in adapter.items() if has_factors(part)}
    ranks = _ranks(rank, list(factored))
    smaller, residual = dict(adapter), {}
    for path, part in factored.items():
        smaller[path], residual[path] = _compressed(path, part, ranks.get(path, part.a.shape[-1]))
    return smaller, residual


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
    arrays = {name: array.astype(dtype) for name, array in factors_from(svd, variant, axes, before.shape).items()}
    return Adapter(variant, axes, **arrays), share_left(svd.s, variant.rank)


def _compressed(path: str, part: Adapter, rank: int) -> tuple[Adapter, Array]:
    assert isinstance(part.variant, LowRank)
    if part.variant.diagonal(part.arrays) is not None:
        raise SpecError(
            f"Expected leaves whose update is s·A·B alone; got {part.variant} at {path!r}.\n"
            "  Make plain adapters of such leaves first: lora_jax.adaptive.compact(adapter)."
        )
    batch = part.a.shape[: part.axes.count("b")]
    if rank >= part.a.shape[-1] or part.variant.scale == 0:
        return part, jnp.zeros(batch)
    svd = svd_of_delta(part)
    variant = dataclasses.replace(part.variant, rank=rank)
    sizes = dict(zip((*axes_of_a(part.axes), *axes_of_b(part.axes)), (*part.a.shape, *part.b.shape), strict=True))
    shape = [sizes[axis] for axis in range(len(part.axes))]
    new = {
        name: cut_as(array.astype(part.arrays[name].dtype), part.arrays[name])
        for name, array in factors_from(svd, variant, part.axes, shape).items()
    }
    return Adapter(variant, part.axes, **{**part.arrays, **new}), share_left(svd.s, rank)


# Checks


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Array) and isinstance(other, Array):
        return bool(jnp.array_equal(one, other))  # of random keys, too
    arrays = isinstance(one, Array | np.ndarray) and isinstance(other, Array | np.ndarray)
    return equal(one, other) if arrays else np.array_equal(one, other)


def _check_same(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    differences = [f"{path!r} is only in the base" for path in before if path not in after]
    differences += [f"{path!r} is only in the tuned tree" for path in after if path not in before]
    differences += [
        f"{path!r} has shape {np.shape(leaf)} in the base and {np.shape(after[path])} in the tuned tree"
        for path, leaf in before.items()
        if path in after and np.shape(leaf) != np.shape(after[path])
    ]
    if differences:
        raise AdapterError(
            f"Expected two trees of the same paths and shapes; got {len(differences)} differences.\n"
            f"{listed(differences)}"
        )


def _ranks(rank: int | Mapping[Pattern, int], paths: list[str]) -> dict[str, int]:
    """The rank of each path that is to have one."""
    rules = rank if isinstance(rank, Mapping) else {"**": rank}
    for pattern, its in rules.items():
        if its < 1:
            raise SpecError(f"Expected a rank of at least 1; got {its}, for {pattern_text(pattern)!r}.")
        if not any(matcher(pattern).fullmatch(path) for path in paths):
            near = nearest(pattern, paths)
            raise SpecError(
                f"Expected every pattern to match a leaf with factors; {pattern_text(pattern)!r} matches none of "
                f"{len(paths)}.\n  The nearest paths:\n{listed(near)}"
            )
    deciding = {path: [its for pattern, its in rules.items() if matcher(pattern).fullmatch(path)] for path in paths}
    return {path: ranks[0] for path, ranks in deciding.items() if ranks}
