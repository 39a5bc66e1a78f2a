"""Statistics of the input activations of each adapted kernel, for data-dependent initialization."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapters
from .._core.attach import as_jax
from .._core.base import base_of
from .._core.kernel import AdaptedKernel
from .._core.paths import flatten, matches_any, matching_paths
from .._core.routing import Experts
from .._core.uses import Use
from .._core.values import is_concrete
from .._errors import AdapterError, listed
from .._transform.boundary import check_keywords
from .._transform.interpreter import OBSERVED
from .._transform.program import trace
from .._transform.refusal import Refusal
from .._transform.settings import Settings
from .._transform.statistics import tap
from ._leaf import Leaf, low_rank_leaves


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Activations:
    """Sums over the input activations of one kernel: rows x of width d, separately for each layer of a stack.

    Add the sums of two batches elementwise: `jax.tree.map(jnp.add, one, other)`. In float32, directions whose variance
    is below about 1e-6 of the largest variance, or of the squared mean, are rounding errors.

    Attributes:
      gram: Σ xᵀx, `(layers, d, d)`.
      total: Σ x, `(layers, d)`.
      count: the number of rows, `(layers,)`; with `token_weights`, the sum of their weights, as in the other sums.
    """

    gram: Array
    total: Array
    count: Array

    def covariance(self, *, centered: bool) -> Array:
        """Returns Σ xᵀx / count, minus the outer product of the mean if `centered`."""
        count = jnp.where(self.count == 0, 1, self.count)[:, None, None]
        mean = self.total[:, :, None] / count
        return self.gram / count - (mean * mean.mT if centered else 0)


def activations(
    apply: Callable[..., Any], params: Any, adapter: Adapters, *args: Any, token_weights: Any = None, **kwargs: Any
) -> dict[str, Activations]:
    """Returns sums over the input activations of each adapted kernel in one call of the model, for `eva` and `corda`.

    The model is traced as in `lora`, and evaluated with the base only. The gradient of each factor `A` is defined as
    these sums, so reverse mode adds them over layers, uses, iterations of a scan and devices. Under `jit`, the rest of
    the backward pass is eliminated. Add the sums of several batches:

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

    Padding, and tokens without a label, are left out with `token_weights=(labels != -100)`.

    Args:
      apply: the model, `apply(params, *args, **kwargs)`. A floating-point result must depend on the kernels through
        operations that reverse mode can differentiate: not `stop_gradient`, `argmax`, or a `while_loop`.
      params: the parameter tree that the adapter was initialized for.
      adapter: determines the kernels and their input axes.
      *args: arguments of the model, such as a batch.
      token_weights: which tokens count, as booleans, or how much, as floats; as in the function that `lora` returns.
        One array for all kernels, or `{pattern: array}`, of which the first match decides; None, and a kernel that no
        pattern matches, count all tokens. The activations of the others must be finite, too.
      **kwargs: keyword arguments of the model.

    Returns:
      `Activations` by path, in float32 or wider. They have d² elements for each layer; for wide kernels, pass a part
      of the adapter at a time, `{path: adapter[path] for path in …}`.

    Raises:
      AdapterError: if the adapter does not fit `params`; if the model multiplies no activation with a kernel along its
        input axes, for example because it only looks up rows; if `token_weights` does not fit the tokens of a kernel.
      SpecError: if a parameter of `apply` is named `token_weights`.
    """
    check_keywords(apply, ("token_weights",), "`starts.activations`")
    leaves = {leaf.path: leaf for leaf in low_rank_leaves(adapter, flatten(params)[0])}
    taps = {path: tap(base_of(as_jax(leaf.w)), leaf.part.axes, path) for path, leaf in leaves.items()}
    taps |= {path: _weighted(taps[path], weights) for path, weights in _by_path(leaves, token_weights).items()}
    program, log, refusals = trace(apply, params, args, kwargs), list[Use](), list[Refusal]()
    # An operation without a rule, such as a penalty on the norm, reads the materialized kernel, which equals the base.
    # It is refused for a kernel with weights, because a product of its tokens may be among such operations.
    settings = Settings(materialize=("**",), observe=True, log=log, refusals=refusals)

    def run(columns: Mapping[str, Array]) -> list[Array]:
        kernels = {path: dataclasses.replace(kernel, a=columns[path]) for path, kernel in taps.items()}
        results = jax.tree.leaves(program.run(kernels, settings))
        return [leaf for leaf in results if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)]

    results, backward = jax.vjp(run, {path: kernel.a for path, kernel in taps.items()})
    _check_refusals(refusals)
    _check(leaves, log)
    (sums,) = backward([jnp.zeros_like(result) for result in results])
    return {path: _split_columns(leaf, sums[path]) for path, leaf in leaves.items()}


def _split_columns(leaf: Leaf, columns: Array) -> Activations:
    """Splits the gradient of a tap, `(batch…, in…, d + 2)`, into the three sums of the layers that are adapted."""
    sums = leaf.adapted_layers(columns).reshape(*leaf.shape[:2], -1)
    return Activations(sums[..., :-2], sums[..., -2], sums[..., -1].max(-1, initial=0))


def _by_path(leaves: Mapping[str, Leaf], token_weights: Any) -> dict[str, Any]:
    """Returns the weights of the kernels that have some."""
    if token_weights is None:
        return {}
    by_pattern = token_weights if isinstance(token_weights, Mapping) else {"**": token_weights}
    for pattern in by_pattern:
        matching_paths(pattern, leaves, error=AdapterError)
    found = {
        path: next((weights for pattern, weights in by_pattern.items() if matches_any(path, [pattern])), None)
        for path in leaves
    }
    found = {path: weights for path, weights in found.items() if weights is not None}
    for path, weights in found.items():
        dtype = getattr(weights, "dtype", None)
        if dtype is None or not any(jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.floating)):
            got = type(weights).__name__ if dtype is None else dtype
            raise AdapterError(
                f"Expected `token_weights` to be a boolean or floating-point array; got {got} for {path!r}.\n"
                "  Make it boolean: attention_mask == 1, or labels != -100."
            )
    return found


def _weighted(kernel: AdaptedKernel, weights: Any) -> AdaptedKernel:
    """Returns a tap that sums its activations with these weights, (tokens…)."""
    experts = (Experts((kernel.a.shape[-1],), "caller"),)
    return dataclasses.replace(kernel, experts=experts, given=jnp.asarray(weights)[None])


def _check_refusals(refusals: list[Refusal]) -> None:
    if refusals:
        lines = [f"{r.paths[0]!r}, passed to `{r.primitive}`: {r.reason}.\n    at {r.line}" for r in refusals]
        raise AdapterError(
            "Expected `token_weights` with a weight for each token that the adapted kernels are multiplied with; "
            f"{len(refusals)} uses have other tokens, or none.\n{listed(lines)}\n"
            "  Pass weights by path, {pattern: weights}: others for these kernels, or None to count all their tokens."
        )


def _check(leaves: Mapping[str, Leaf], log: list[Use]) -> None:
    observed = {use.path for use in log if use.kind == OBSERVED}
    if missing := [f"{path!r}, axes {leaf.part.axes!r}" for path, leaf in leaves.items() if path not in observed]:
        raise AdapterError(
            "Expected the model to multiply each adapted kernel with an activation along the kernel's input axes; "
            f"this call does not do so for {len(missing)} kernels.\n{listed(missing)}\n"
            "  Embedding lookups and materialized kernels cannot be measured.\n"
            "  Leave these kernels out, {path: part for path, part in adapter.items() if …}, and initialize them in "
            "another way."
        )


def check_activations(leaves: Iterable[Leaf], activations: Mapping[str, Activations]) -> None:
    """Raises if there are no activations for a kernel, or for one of its layers."""
    paths = [leaf.path for leaf in leaves]
    if missing := [repr(path) for path in paths if path not in activations]:
        raise AdapterError(
            f"Expected the activations of every adapted kernel; {len(missing)} are not in `activations`.\n"
            f"{listed(missing)}\n  activations(apply, params, adapter, *args) returns them."
        )
    empty = [
        f"{path!r}: {int((count == 0).sum())} of {count.size}"
        for path in paths
        if is_concrete(count := activations[path].count) and bool((count == 0).any())
    ]
    if empty:
        raise AdapterError(
            f"Expected activations of every layer; {len(empty)} kernels have layers without any.\n{listed(empty)}\n"
            "  Add more batches. If that does not help, the model's results depend on these layers only through "
            "operations that reverse mode cannot differentiate."
        )
