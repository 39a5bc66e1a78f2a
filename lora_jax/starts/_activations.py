"""What the activations that meet each adapted kernel are like: sums over a call, as a start by data needs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapters
from .._core.attach import as_jax
from .._core.base import base_of
from .._core.paths import flatten
from .._core.uses import Use
from .._errors import AdapterError, listed
from .._transform.interpreter import OBSERVED
from .._transform.program import trace
from .._transform.settings import Settings
from .._transform.statistics import tap
from ._leaf import Leaf, low_rank_leaves


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Activations:
    """Sums over the rows x, of the width d of its input axes, that meet one kernel; each layer of a stack has its own.

    Those of two batches are added number by number: `jax.tree.map(jnp.add, one, other)`. Of what is summed in float32,
    a direction is rounding where its variance is below about 1e-6 of the largest, or of the square of the mean.

    Attributes:
      gram: Σ xᵀx, `(layers, d, d)`.
      total: Σ x, `(layers, d)`.
      count: how many there are, `(layers,)`.
    """

    gram: Array
    total: Array
    count: Array

    def covariance(self, *, centered: bool) -> Array:
        """The gram matrix, from which the mean has been taken if it is to be centered, for each row."""
        count = jnp.maximum(self.count, 1)[:, None, None]
        mean = self.total[:, :, None] / count
        return self.gram / count - (mean * mean.mT if centered else 0)


def activations(
    apply: Callable[..., Any], params: Any, adapter: Adapters, *args: Any, **kwargs: Any
) -> dict[str, Activations]:
    """Sums up what one call of a model multiplies each adapted kernel with, for `eva`; the base alone computes.

    The model is traced as `lora` does, and need not know. In place of the gradient of each factor `A` the call's
    transpose returns the sums: reverse mode adds them up over layers, uses, iterations of a scan and devices. The
    backward pass computes nothing else, and under `jit` nothing of it is left but the sums. Streams of batches are
    added:

        seen = jax.tree.map(jnp.add, seen, measure(params, batch))

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import starts
    >>> params = {"kernel": jnp.ones((2, 3))}
    >>> apply = lambda params, x: jnp.tanh(x @ params["kernel"])
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=1, alpha=1)})
    >>> seen = starts.activations(apply, params, adapter, jnp.array([[1.0, 2.0], [3.0, 0.0]]))["kernel"]
    >>> seen.gram[0], seen.total[0], seen.count
    (Array([[10.,  2.],
           [ 2.,  4.]], dtype=float32), Array([4., 2.], dtype=float32), Array([2.], dtype=float32))

    Args:
      apply: the model, `apply(params, *args, **kwargs)`. Some result must be floating-point, and depend on the kernels
        in a way that reverse mode follows: not through `stop_gradient`, `argmax`, or a `while_loop`.
      params: the parameter tree that the adapter was made for.
      adapter: says which kernels, and which of their axes are inputs.
      *args: as the model takes them, such as a batch; padding counts as what it is.
      **kwargs: likewise.

    Returns:
      `Activations` by path, in float32 or what is wider. They take d² numbers for each layer: give a part of the
      adapter, `{path: adapter[path] for path in …}`, where that is much.

    Raises:
      AdapterError: if the adapter does not fit `params`; if a kernel meets no activation in this call, as one from
        which rows are looked up, or which is multiplied from its output side alone.
    """
    leaves = {leaf.path: leaf for leaf in low_rank_leaves(adapter, flatten(params)[0])}
    taps = {path: tap(base_of(as_jax(leaf.w)), leaf.part.axes, path) for path, leaf in leaves.items()}
    program, log = trace(apply, params, args, kwargs), list[Use]()
    # Where a kernel is read whole, as by a penalty on its norm, it is formed: with its tap it is what it was.
    settings = Settings(materialize=("**",), observe=True, log=log)

    def run(columns: Mapping[str, Array]) -> list[Array]:
        kernels = {path: dataclasses.replace(kernel, a=columns[path]) for path, kernel in taps.items()}
        results = jax.tree.leaves(program.run(kernels, settings))
        return [its for its in results if isinstance(its, jax.Array) and jnp.issubdtype(its.dtype, jnp.inexact)]

    results, transposed = jax.vjp(run, {path: kernel.a for path, kernel in taps.items()})
    _check(leaves, log)
    (sums,) = transposed([jnp.zeros_like(its) for its in results])
    return {path: _activations(found.reshape(*leaves[path].shape[:2], -1)) for path, found in sums.items()}


def _activations(sums: Array) -> Activations:
    """The sums that the columns of a tap are for, `(layers, d, d + 2)`."""
    return Activations(sums[..., :-2], sums[..., -2], sums[..., -1].max(-1, initial=0))


def _check(leaves: Mapping[str, Leaf], log: list[Use]) -> None:
    met = {use.path for use in log if use.kind == OBSERVED}
    if unmet := [f"{path!r}, axes {leaf.part.axes!r}" for path, leaf in leaves.items() if path not in met]:
        raise AdapterError(
            f"Expected each adapted kernel to be multiplied with activations along its input axes; {len(unmet)} are "
            f"not in this call.\n{listed(unmet)}\n"
            "  Rows that are looked up, and kernels that are formed, meet none that can be seen.\n"
            "  Leave them out here, and let them start otherwise: {path: part for path, part in adapter.items() if …}."
        )
