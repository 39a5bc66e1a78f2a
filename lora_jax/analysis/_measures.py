"""Measures of all kernels of an adapter, by path."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from jax import Array

from .._core.adapter import Adapter, Adapters, check_adapter
from .._core.attach import as_jax, check
from .._core.base import dense
from .._core.linalg import has_factors
from .._core.paths import flatten
from .._errors import AdapterError
from . import _matrix
from ._matrix import Amplification, Intruders

Result = TypeVar("Result")


def singular_values(adapter: Adapters) -> dict[str, Array]:
    """Computes the singular values of each `s·A·B` from the factors, without materializing the product.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> part = lj.Adapter(lj.LoRA(rank=2, alpha=4), "io", a=jnp.eye(5, 2), b=jnp.eye(2, 3) * 3)
    >>> lj.analysis.singular_values({"kernel": part})["kernel"].tolist()
    [6.0, 6.0]

    Args:
      adapter: from `init`, training or `restore`.

    Returns:
      `{path: (batch…, rank)}`, the largest first.

    Raises:
      AdapterError: if the argument is not an adapter.
    """
    return {path: _matrix.singular_values(part) for path, part in _low_rank(adapter).items()}


def subspace_similarity(one: Adapters, other: Adapters, *, of: Literal["a", "b"] = "a") -> dict[str, Array]:
    """Compares the subspaces of two adapters' factors, direction by direction (Hu et al. 2021, arXiv:2106.09685, 7.2).

        φ(i, j) = ‖U_iᵀ·U'_j‖² / min(i, j), in [0, 1]

    `U_i` holds the first i singular vectors of a factor, left ones of `A` or right ones of `B`. The paper's figure 3
    compares ranks 8 and 64, figure 4 two seeds. For independent subspaces of d dimensions, φ is about max(i, j)/d. The
    singular vectors of a singular value of zero, such as those of `B` at initialization, are arbitrary.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> part = lj.Adapter(lj.LoRA(rank=2, alpha=4), "io", a=jnp.eye(5, 2) * jnp.array([2, 1]), b=jnp.eye(2, 3))
    >>> lj.analysis.subspace_similarity({"kernel": part}, {"kernel": part})["kernel"].tolist()
    [[1.0, 1.0], [1.0, 1.0]]

    Args:
      one: an adapter.
      other: another one, of any rank, with the same axes. The paths that both contain are compared.
      of: the factor to compare.

    Returns:
      `{path: (batch…, rank of one, rank of other)}`; φ(i, j) is at `[…, i - 1, j - 1]`.

    Raises:
      AdapterError: if the two have no path in common, or kernels of the same path differ in shape.
    """
    first, second = _low_rank(one), _low_rank(other)
    shared = [path for path in first if path in second]
    if not shared:
        raise AdapterError(
            f"Expected two adapters of the same kernels; none of the {len(first)} low-rank paths of the first is among "
            f"the {len(second)} of the second.\n  Their first paths are {list(first)[:1]} and {list(second)[:1]}."
        )
    found = {}
    for path in shared:
        bases = [_matrix.directions(part, of) for part in (first[path], second[path])]
        shapes = [basis.shape[:-1] for basis in bases]
        if shapes[0] != shapes[1]:
            raise AdapterError(
                f"Expected factors of one kernel; `{of}` of {path!r} has directions of shape {shapes[0]} in one "
                f"adapter and {shapes[1]} in the other.\n  Compare adapters of the same model."
            )
        found[path] = _matrix.similarity(*bases)
    return found


def relative_norms(params: Any, adapter: Adapters) -> dict[str, Array]:
    """Computes the norm of each update relative to its kernel, ‖s·A·B‖ / ‖W0‖ in the Frobenius norm.

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
    return _by_path(_matrix.relative_norm, params, adapter)


def amplification(params: Any, adapter: Adapters) -> dict[str, Amplification]:
    """Computes the amplification factor of each update (Hu et al. 2021, arXiv:2106.09685, table 7).

    W0 is projected onto the r directions of ΔW = s·A·B and, for comparison, onto its own first r directions and onto
    random ones. A large factor means that ΔW amplifies directions that W0 has but does not emphasize. For random
    directions the expected square, ‖W0‖²·r²/(in·out), is used; none are drawn.

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
      `{path: Amplification}`, each field of shape (batch…).

    Raises:
      AdapterError: if the adapter does not fit `params`.
    """
    return _by_path(_matrix.amplification, params, adapter)


def intruders(params: Any, adapter: Adapters, *, top: int = 10, threshold: float = 0.5) -> dict[str, Intruders]:
    """Finds intruder dimensions: leading singular vectors that are unlike all singular vectors of the base.

    A singular vector of the adapted kernel, among the first `top`, is an intruder if its |cos| with every singular
    vector of W0 is below the threshold (Shuttleworth et al. 2024, arXiv:2410.21228). The vectors are those of the
    output axes, which are the left ones of the paper's (out, in) matrices. Unlike the other measures, this one
    materializes the adapted kernel. For a fully fine-tuned model, pass the adapter of full rank from `extract`.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.diag(jnp.arange(1.0, 17))}
    >>> part = lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=jnp.ones((16, 1)), b=jnp.full((1, 16), 10.0))
    >>> found = lj.analysis.intruders(params, {"kernel": part}, top=3)["kernel"]
    >>> found.intruder.tolist()
    [True, False, False]

    Args:
      params: the base that the adapter was made for.
      adapter: from training or `restore`.
      top: the number of singular vectors of the adapted kernel to compare.
      threshold: ε, in (0, 1).

    Returns:
      `{path: Intruders}`.

    Raises:
      AdapterError: if the adapter does not fit `params`.
    """
    measure = functools.partial(_matrix.intruders, top=top, threshold=threshold)
    return _by_path(measure, params, adapter, applies=lambda part: part.variant.needs_axes)


def _low_rank(adapter: Adapters) -> dict[str, Adapter]:
    check_adapter(adapter, "This function takes only adapters; those that also take `params` take it first.")
    return {path: part for path, part in adapter.items() if has_factors(part)}


def _by_path(
    measure: Callable[[Array, Adapter], Result],
    params: Any,
    adapter: Adapters,
    applies: Callable[[Adapter], bool] = has_factors,
) -> dict[str, Result]:
    leaves = flatten(params)[0]
    check(leaves, adapter)
    return {path: measure(dense(as_jax(leaves[path])), part) for path, part in adapter.items() if applies(part)}
