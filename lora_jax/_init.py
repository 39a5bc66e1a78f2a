"""Makes an adapter: for each leaf that the spec names, its variant's arrays at the start."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from ._adapter import Adapter
from ._errors import SpecError
from ._keys import key_for
from ._paths import flatten
from ._spec import Spec, resolve
from ._use import Kernel
from ._variants import Variant


def init(
    key: Array, params: Any, spec: Spec, *, kernels: Mapping[str, Kernel] | None = None, param_dtype: Any = jnp.float32
) -> dict[str, Adapter]:
    """Makes the adapter that a spec describes; the model behaves as before until its first update.

    For a low-rank variant `a` is uniform in ±1/√fan_in and `b` is zero, so that `W0 + s·A·B` is `W0` (the start of
    Hu et al.'s own code, arXiv:2106.09685). Works under `jit` and `eval_shape`.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"query": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    >>> lj.init(jax.random.key(0), params, {"**/kernel": lj.LoRA(rank=2, alpha=4)})
    {'query/kernel': Adapter(LoRA(rank=2, alpha=4), 'io', a=float32[4, 2], b=float32[2, 3])}

    Args:
      key: PRNG key, typed or raw; consumed. Each path folds its name into it: one more layer changes no other's start.
      params: the parameter tree, or its `ShapeDtypeStruct`s. Not changed.
      spec: ordered mapping of patterns on `/`-joined paths (`*` one segment, `**` any number, `{a,b}` either, or a
        compiled regular expression) to a variant, or to None for "leave alone". The first that matches a path decides.
      kernels: from `kernels(apply, params, *args)`: the roles of the axes. Without it a matrix is `(in, out)`, and a
        kernel of more axes needs `axes=` in its variant. `axes=` outranks it.
      param_dtype: dtype of all the adapter's arrays, whatever the base's is.

    Returns:
      `{path: Adapter}`.

    Raises:
      SpecError: for a rule that decides nothing or cannot be meant, axes that are not known, a rank out of range.
    """
    leaves = flatten(params)[0]
    adapters = {}
    for path, variant in resolve(spec, leaves).items():
        leaf = leaves[path]
        axes = axes_for(path, leaf, variant, kernels)
        try:
            variant.check(leaf.shape, axes)
            arrays = variant.start(key_for(key, path), leaf, axes, param_dtype)
        except SpecError as error:
            raise SpecError(f"At {path!r}: {error}.") from None
        # From here on the adapter's own axes count; those of the rule may have been left open.
        adapters[path] = Adapter(dataclasses.replace(variant, axes=None) if variant.axes else variant, axes, **arrays)
    return adapters


def axes_for(path: str, leaf: Any, variant: Variant, kernels: Mapping[str, Kernel] | None) -> str:
    """The roles of a leaf's axes: from its variant, or from the traced model, or those of a matrix."""
    if not variant.needs_axes:
        return ""
    if variant.axes is not None:
        if len(variant.axes) != leaf.ndim or not set(variant.axes) <= set("bio"):
            raise SpecError(
                f"Expected axes of one letter each (`b` batch, `i` input, `o` output) for the {leaf.ndim} axes of "
                f"{path!r}, shape {tuple(leaf.shape)}; got axes={variant.axes!r}."
            )
        return variant.axes
    if kernels is not None and path in kernels and (traced := kernels[path].axes) is not None:
        if len(traced) != leaf.ndim:
            raise SpecError(
                f"Expected `kernels` traced with these parameters; {path!r} has shape {tuple(leaf.shape)}, and had "
                f"{kernels[path].shape} when traced."
            )
        return traced
    if leaf.ndim == 2:
        return "io"
    raise SpecError(
        f"Expected to know which axes of {path!r}, shape {tuple(leaf.shape)}, are inputs, outputs or batch; a kernel "
        f"of {leaf.ndim} axes does not say.\n"
        "  Let the model say: init(..., kernels=lora_jax.kernels(apply, params, *args)),\n"
        f"  or say it in the spec: {type(variant).__name__}(..., axes=...), such as 'ioo' for a query kernel "
        "(d, heads, head_dim) or 'bio' for a stack of layers."
    )
