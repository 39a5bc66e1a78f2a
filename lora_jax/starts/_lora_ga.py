"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation (Wang et al. 2024, arXiv:2407.05000)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapters
from .._core.contract import widest
from .._core.keys import key_for
from .._core.numbers import chosen
from .._core.paths import flatten, unflatten
from .._errors import AdapterError, SpecError, listed
from ._leaf import Leaf, Start, check_arrays, initialize, low_rank_leaves, positive_scale

Direction = Literal["ArB2r", "A2rBr", "ArBr", "random"]
Scale = Literal["stable", "unit", "gd", "weight_svd"]


def lora_ga(
    params: Any,
    adapter: Adapters,
    gradient: Mapping[str, Array],
    *,
    direction: Direction = "ArB2r",
    scale: Scale = "stable",
    gamma: float = 16.0,
    key: Array | None = None,
) -> Start:
    """Initializes the factors so that the first step approximates a step of full fine-tuning.

        G = U·S·Vᵀ,   A = c·U[:, I],   B = c·V[:, J]ᵀ,   I ∪ J = {1…2r},   W = W0 - s·A·B

    (Wang et al. 2024, arXiv:2407.05000), where G is the gradient of the kernel. One step of gradient descent changes
    the kernel by -η·s²·c² times the best approximation of G of rank 2r, for any I and J. The choices are those of the
    authors' code:

        direction:   "ArB2r":  I = 1…r, J = r+1…2r       "A2rBr":  the reverse
                     "ArBr":   I = 2, 4…2r, J = 1, 3…2r-1   "random": a random half each, of each kernel
        scale:       "stable": c = out^¼/√γ              "unit":   c = 1
                     "gd":     c = 1/s                   "weight_svd": c = mean √(σⱼ(W0)/s) over j = 1…r

    Both factors are scaled by c. PEFT scales only one of them in most cases, multiplies `B` by S, which depends on the
    scale of the loss, and uses the same half for both in `"random"`; its first step is not a multiple of the best
    approximation.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import starts
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (6, 5))}
    >>> loss = lambda params, x: jnp.sum((x @ params["kernel"]) ** 2)
    >>> adapter = lj.init(jax.random.key(1), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> gradient = starts.gradients(loss, params, adapter, jnp.ones((3, 6)))
    >>> moved, adapter = starts.lora_ga(params, adapter, gradient)
    >>> adapter["kernel"].a.shape, adapter["kernel"].b.shape
    ((6, 2), (2, 5))

    Args:
      params: the parameter tree that the adapter was initialized for; not modified.
      adapter: from `init`; its factors are replaced.
      gradient: the gradient of each adapted kernel, by path, from `gradients`. The result does not depend on its norm,
        so a sum over a few batches works like their mean.
      direction: which directions each factor gets.
      scale: what both factors are multiplied with.
      gamma: γ of `"stable"`; a smaller value gives larger factors.
      key: PRNG key for `direction="random"`; consumed. Folded with each path.

    Returns:
      The changed base `W0 - s·A·B`, rounded as in `pissa`, and the adapter.

    Raises:
      SpecError: if 2r is more than the number of inputs or outputs of a kernel; if `direction` or `scale` has another
        value; if `key` is missing for `"random"`, or given for another direction; if the scale of a variant is not
        positive where c depends on it.
      AdapterError: if the adapter does not fit `params` or adapts only some layers of a stack; if `gradient` does not
        fit the adapter; if an adapted kernel is quantized.
    """
    chosen("direction", direction, get_args(Direction))
    chosen("scale", scale, get_args(Scale))
    if (direction == "random") != (key is not None):
        raise SpecError(
            f"Expected a `key` for direction='random', and none for another; got direction={direction!r} and "
            f"{'no key' if key is None else 'a key'}."
        )
    leaves = low_rank_leaves(adapter, flatten(params)[0])
    check_arrays(leaves)
    if missing := [repr(leaf.path) for leaf in leaves if leaf.path not in gradient]:
        raise AdapterError(
            f"Expected the gradient of every adapted kernel; {len(missing)} are not in `gradient`.\n{listed(missing)}\n"
            "  gradients(loss, params, adapter, *args) returns them."
        )

    def method(leaf: Leaf) -> tuple[Array, Array]:
        rank, (_, d_in, d_out) = leaf.variant.rank, leaf.shape
        if 2 * rank > min(d_in, d_out):
            raise leaf.error(
                f"expected a rank of at most {min(d_in, d_out) // 2}, half of the gradient's; got rank={rank}"
            )
        u, _, vt = jnp.linalg.svd(leaf.as_matrices(gradient[leaf.path]), full_matrices=False)
        of_a, of_b = _directions(direction, rank, None if key is None else key_for(key, leaf.path))
        c = _size(leaf, scale, gamma)
        return c * u[:, :, of_a], c * vt[:, of_b]

    return initialize(params, adapter, method, changes_base=True)


def _directions(direction: Direction, rank: int, key: Array | None) -> tuple[Any, Any]:
    """Returns the indices of the singular vectors in `A` and in `B`."""
    if key is not None:
        order = jax.random.permutation(key, 2 * rank)
        return order[:rank], order[rank:]
    if direction == "ArBr":
        return slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)
    halves = slice(rank), slice(rank, 2 * rank)
    return halves if direction == "ArB2r" else halves[::-1]


def _size(leaf: Leaf, scale: Scale, gamma: float) -> float | Array:
    """Returns c, for `"weight_svd"` of each layer."""
    match scale:
        case "stable":
            return leaf.shape[2] ** 0.25 / math.sqrt(gamma)
        case "unit":
            return 1.0
        case "gd":
            return 1 / positive_scale(leaf)
        case "weight_svd":
            largest = jnp.linalg.svd(leaf.matrices, compute_uv=False)[:, : leaf.variant.rank]
            return jnp.sqrt(largest / positive_scale(leaf)).mean(1)[:, None, None]


def gradients(
    loss: Callable[..., Array], params: Any, adapter: Adapters, *args: Any, **kwargs: Any
) -> dict[str, Array]:
    """Returns the gradients of the adapted kernels of the base, for `lora_ga`; other leaves are not differentiated.

    Add the gradients of several batches: `jax.tree.map(jnp.add, one, other)`. They are in float32 or wider, also for a
    base in 16 bits, so that small gradients are not rounded away in the sum.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import starts
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=1, alpha=4)})
    >>> starts.gradients(lambda p, x: jnp.sum(x @ p["kernel"] + p["bias"]), params, adapter, jnp.ones((3, 2)))
    {'kernel': Array([[3., 3.],
           [3., 3.]], dtype=float32)}

    Args:
      loss: `loss(params, *args, **kwargs)`, the scalar loss of the unmodified model.
      params: the parameter tree that the adapter was initialized for.
      adapter: determines the kernels.
      *args: arguments of the loss, such as a batch.
      **kwargs: keyword arguments of the loss.

    Returns:
      The gradients by path, each of the shape of its kernel.

    Raises:
      AdapterError: if the adapter does not fit `params` or adapts only some layers of a stack, or an adapted kernel is
        quantized.
    """
    leaves, treedef = flatten(params)
    adapted = low_rank_leaves(adapter, leaves)
    check_arrays(adapted)
    kernels = {leaf.path: jnp.asarray(leaf.w) for leaf in adapted}
    wide = {path: w.astype(widest(w.dtype, jnp.float32)) for path, w in kernels.items()}

    def loss_of_kernels(wide: Mapping[str, Array]) -> Array:
        cast = {path: w.astype(kernels[path].dtype) for path, w in wide.items()}
        return loss(unflatten(treedef, leaves | cast), *args, **kwargs)

    return jax.grad(loss_of_kernels)(wide)
