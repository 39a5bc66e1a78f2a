"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation (Wang et al. 2024, arXiv:2407.05000)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapters
from .._core.contract import widest
from .._core.paths import flatten, unflatten
from .._errors import AdapterError, listed
from ._leaf import Leaf, Start, low_rank_leaves, start


def lora_ga(params: Any, adapter: Adapters, gradient: Mapping[str, Array], *, gamma: float = 16.0) -> Start:
    """Takes the factors from the gradient of the kernel, so that the first step goes where full fine-tuning's would.

        G = U·S·Vᵀ,   A = c·U[:, 1…r],   B = c·V[:, r+1…2r]ᵀ,   c = out^¼/√γ,   W = W0 - s·A·B

    (Wang et al. 2024, arXiv:2407.05000). After one step of gradient descent the kernel has changed by -η·s²·c² times
    the best approximation of G of rank 2r. The model computes what it did. The scaling c, on both factors alike, is
    that of the paper's own code. PEFT's differs: it multiplies `B` by S, whose size is that of the loss, and leaves
    `A` without c, so that the step is no multiple of an approximation of G.

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
      params: the parameter tree that the adapter was made for. Not changed.
      adapter: from `init`; its factors are replaced.
      gradient: that of each adapted kernel, by path, as `gradients` returns it; its size does not matter, so a sum
        over a few batches is as good as their mean.
      gamma: γ, the smaller the larger the factors.

    Returns:
      The base without the adapter, rounded as `pissa` says, and the adapter.

    Raises:
      SpecError: if 2r is more than the kernel's inputs or outputs.
      AdapterError: if the adapter does not fit `params`, or `gradient` not the adapter.
    """
    leaves = low_rank_leaves(adapter, flatten(params)[0])
    if missing := [repr(leaf.path) for leaf in leaves if leaf.path not in gradient]:
        raise AdapterError(
            f"Expected the gradient of every adapted kernel; {len(missing)} are not in `gradient`.\n{listed(missing)}\n"
            "  gradients(loss, params, adapter, *args) returns them."
        )

    def method(leaf: Leaf) -> tuple[Array, Array]:
        rank, (_, d_in, d_out) = leaf.variant.rank, leaf.shape
        if 2 * rank > min(d_in, d_out):
            raise leaf.error(
                f"expected a rank of at most {min(d_in, d_out) // 2}, half of what the gradient has; got rank={rank}"
            )
        u, _, vt = jnp.linalg.svd(leaf.as_matrices(gradient[leaf.path]), full_matrices=False)
        c = d_out**0.25 / math.sqrt(gamma)
        return c * u[:, :, :rank], c * vt[:, rank : 2 * rank]

    return start(params, adapter, method, moves=True)


def gradients(
    loss: Callable[..., Array], params: Any, adapter: Adapters, *args: Any, **kwargs: Any
) -> dict[str, Array]:
    """The gradient of the adapted kernels alone, for `lora_ga`; the rest of the tree gets none.

    Those of several batches may be added: `jax.tree.map(jnp.add, one, other)`. They are float32 also where the base is
    in 16 bits, so that no batch is rounded away.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import starts
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=1, alpha=4)})
    >>> starts.gradients(lambda p, x: jnp.sum(x @ p["kernel"] + p["bias"]), params, adapter, jnp.ones((3, 2)))
    {'kernel': Array([[3., 3.],
           [3., 3.]], dtype=float32)}

    Args:
      loss: `loss(params, *args, **kwargs)`, a number: the loss of the unmodified model.
      params: the parameter tree that the adapter was made for.
      adapter: says which kernels.
      *args: as the loss takes them, such as a batch.
      **kwargs: likewise.

    Returns:
      The gradients, by path.

    Raises:
      AdapterError: if the adapter does not fit `params`.
    """
    leaves, treedef = flatten(params)
    kernels = {leaf.path: jnp.asarray(leaf.w) for leaf in low_rank_leaves(adapter, leaves)}
    wide = {path: w.astype(widest(w.dtype, jnp.float32)) for path, w in kernels.items()}

    def of_kernels(wide: Mapping[str, Array]) -> Array:
        own = {path: w.astype(kernels[path].dtype) for path, w in wide.items()}
        return loss(unflatten(treedef, leaves | own), *args, **kwargs)

    return jax.grad(of_kernels)(wide)
