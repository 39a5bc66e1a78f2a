"""Measures of every kernel of an adapter, by path."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from jax import Array

from .._core.adapter import Adapter, Adapters, check_adapter
from .._core.attach import as_jax, check
from .._core.linalg import has_factors
from .._core.paths import flatten
from .._errors import AdapterError
from . import _matrix as _measures
from ._matrix import Amplification, Intruders

Result = TypeVar("Result")


def singular_values(adapter: Adapters) -> dict[str, Array]:
    """Finds the singular values of each `s·A·B` from the factors alone; the product is never formed.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> part = lj.Adapter(lj.LoRA(rank=2, alpha=4), "io", a=jnp.eye(5, 2), b=jnp.eye(2, 3) * 3)
    >>> lj.analysis.singular_values({"kernel": part})["kernel"].tolist()
    [6.0, 6.0]

    Args:
      adapter: from `init`, training or `restore`.

    Returns:
      `{path: (batch…, rank)}`, the largest first.

    Raises:
      AdapterError: if it is no adapter.
    """
    return {path: _measures.singular_values(part) for path, part in _low_rank(adapter).items()}


def subspace_similarity(one: Adapters, other: Adapters, *, of: Literal["a", "b"] = "a") -> dict[str, Array]:
    """Compares the subspaces of two adapters' factors, direction by direction (Hu et al. 2021, arXiv:2106.09685, 7.2).

        φ(i, j) = ‖U_iᵀ·U'_j‖² / min(i, j), in [0, 1]

    `U_i` holds the first i singular vectors of a factor on the side of the kernel: left of `A`, right of `B`. For the
    paper's figure 3 the two are of rank 8 and 64, for figure 4 of two seeds. Independent ones in d dimensions come to
    about max(i, j)/d. Where a factor has a singular value of zero, as `B` has at the start, its vector means nothing.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> part = lj.Adapter(lj.LoRA(rank=2, alpha=4), "io", a=jnp.eye(5, 2) * jnp.array([2, 1]), b=jnp.eye(2, 3))
    >>> lj.analysis.subspace_similarity({"kernel": part}, {"kernel": part})["kernel"].tolist()
    [[1.0, 1.0], [1.0, 1.0]]

    Args:
      one: an adapter.
      other: another, of any rank, with the same axes; compared are the paths that both have.
      of: the factor to look at.

    Returns:
      `{path: (batch…, rank of one, rank of other)}`; φ(i, j) is at `[…, i - 1, j - 1]`.

    Raises:
      AdapterError: if the two have no path in common, or a path's kernels are of different shapes.
    """
    first, second = _low_rank(one), _low_rank(other)
    shared = [path for path in first if path in second]
    if not shared:
        raise AdapterError(
            f"Expected two adapters of the same kernels; none of the {len(first)} low-rank paths of the first is among "
            f"the {len(second)} of the second.\n  They start with {list(first)[:1]} and {list(second)[:1]}."
        )
    found = {}
    for path in shared:
        bases = [_measures.directions(part, of) for part in (first[path], second[path])]
        shapes = [basis.shape[:-1] for basis in bases]
        if shapes[0] != shapes[1]:
            raise AdapterError(
                f"Expected factors of one kernel; `{of}` of {path!r} has directions of shape {shapes[0]} in one "
                f"adapter and {shapes[1]} in the other.\n  Compare adapters of the same model."
            )
        found[path] = _measures.similarity(*bases)
    return found


def relative_norms(params: Any, adapter: Adapters) -> dict[str, Array]:
    """Measures each update against its kernel, ‖s·A·B‖ / ‖W0‖ in the Frobenius norm.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> part = lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=jnp.ones((4, 1)), b=jnp.ones((1, 4)))
    >>> norms = lj.analysis.relative_norms({"kernel": jnp.full((4, 4), 2.0)}, {"kernel": part})
    >>> round(float(norms["kernel"]), 3)
    0.5

    Args:
      params: the base that the adapter was made for.
      adapter: from training or `restore`.

    Returns:
      `{path: (batch…)}`.

    Raises:
      AdapterError: if the adapter does not fit `params`.
    """
    return _of_each(_measures.relative_norm, params, adapter)


def amplification(params: Any, adapter: Adapters) -> dict[str, Amplification]:
    """Measures how an update amplifies what it finds in the kernel (Hu et al. 2021, arXiv:2106.09685, table 7).

    W0 is projected onto the r directions of ΔW = s·A·B, and for comparison onto its own first r and onto random ones. A
    large factor says that ΔW raises directions that W0 has but does not emphasize. What random directions leave of W0
    has the mean square ‖W0‖²·r²/(in·out), so that none are drawn.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.diag(jnp.array([8.0, 4.0, 2.0, 1.0]))}
    >>> last = jnp.array([0.0, 0, 0, 1])
    >>> part = lj.Adapter(lj.LoRA(rank=1, alpha=20), "io", a=last[:, None], b=last[None])
    >>> found = lj.analysis.amplification(params, {"kernel": part})["kernel"]
    >>> float(found.along_delta), float(found.along_kernel), float(found.factor)
    (1.0, 8.0, 20.0)

    Args:
      params: the base that the adapter was made for.
      adapter: from training or `restore`.

    Returns:
      `{path: Amplification}`, each of its numbers of shape (batch…).

    Raises:
      AdapterError: if the adapter does not fit `params`.
    """
    return _of_each(_measures.amplification, params, adapter)


def intruders(params: Any, adapter: Adapters, *, top: int = 10, threshold: float = 0.5) -> dict[str, Intruders]:
    """Finds intruder dimensions: high-ranking singular vectors that the base has nothing like.

    A singular vector of the adapted kernel, among the first `top`, is an intruder if its |cos| with every singular
    vector of W0 is below the threshold (Shuttleworth et al. 2024, arXiv:2410.21228). The vectors are those on the side
    of the kernel's outputs: the left ones of the paper's (out, in) matrices. Here, unlike elsewhere, the adapted kernel
    is formed, whatever its variant. For a fully fine-tuned model take its adapter from `extract`, at full rank.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.diag(jnp.arange(1.0, 17))}
    >>> part = lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=jnp.ones((16, 1)), b=jnp.full((1, 16), 10.0))
    >>> found = lj.analysis.intruders(params, {"kernel": part}, top=3)["kernel"]
    >>> found.intruder.tolist()
    [True, False, False]

    Args:
      params: the base that the adapter was made for.
      adapter: from training or `restore`.
      top: how many singular vectors of the adapted kernel to look at.
      threshold: ε, in (0, 1).

    Returns:
      `{path: Intruders}`.

    Raises:
      AdapterError: if the adapter does not fit `params`.
    """
    measure = functools.partial(_measures.intruders, top=top, threshold=threshold)
    return _of_each(measure, params, adapter, has=lambda part: part.variant.needs_axes)


def _low_rank(adapter: Adapters) -> dict[str, Adapter]:
    check_adapter(adapter, "It is the adapter only; what also takes `params` takes them first.")
    return {path: part for path, part in adapter.items() if has_factors(part)}


def _of_each(
    measure: Callable[[Array, Adapter], Result],
    params: Any,
    adapter: Adapters,
    has: Callable[[Adapter], bool] = has_factors,
) -> dict[str, Result]:
    leaves = flatten(params)[0]
    check(leaves, adapter)
    return {path: measure(as_jax(leaves[path]), part) for path, part in adapter.items() if has(part)}
