"""Quantizes leaves of a parameter tree, one after another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding

from .._core.base import dense
from .._core.memory import is_in_host_memory, to_device, to_host
from .._core.paths import Pattern, flatten, matching_paths, unflatten
from .._core.placement import explicit_sharding, with_auto_axes
from .._core.spec import Choice, fit
from .._core.stored import StoredLeaf
from .._core.targets import Rules
from .._core.uses import Kernel
from .._core.values import is_concrete, is_finite
from .._errors import SpecError, listed
from ._format import Format
from ._leaf import shardings_like


def quantize(
    params: Any,
    spec: Rules[Format | None],
    *,
    kernels: Mapping[str, Kernel] | None = None,
    donate: bool = False,
) -> Any:
    """Quantizes the leaves that a spec selects; the tree can be used wherever `params` can, also by the adapted model.

    A quantized leaf is one leaf with one path. It is dequantized in each use, and is constant in gradients. Batch axes
    that come first (scanned layers, experts) are quantized separately, so that a loop over them slices the leaf.
    Leaves are quantized one at a time; with `donate`, the device never holds more than one of them in both forms.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (128, 16))}
    >>> small = lj.quant.quantize(params, {"**/kernel": lj.quant.NF4()})
    >>> small["kernel"].shape, small["kernel"].codes.shape
    ((128, 16), (64, 16))

    Args:
      params: the parameter tree: arrays, on devices or in NumPy, or their `ShapeDtypeStruct`s. Leaves with a
        `NamedSharding` are quantized where they are, and the stored arrays are sharded as by `shardings`.
      spec: mapping from patterns and targets to formats, or to None for leaves that stay as they are; the first match
        decides.
      kernels: from `lora_jax.kernels(apply, params, *args)`, for targets and for the roles of axes. Without it, a
        matrix is (in, out), and other kernels need `axes=` in their format. An embedding table that is looked up is
        quantized along its rows.
      donate: whether each array of `params` is deleted once all leaves that hold it are quantized.

    Returns:
      A tree like `params`.

    Raises:
      SpecError: if a rule matches nothing, a leaf is not floating-point or not finite, or a format does not fit it;
        one error lists all leaves, and nothing is deleted. Under `jit`, where values are not known, a block with a
        value that is not finite is NaN.
    """
    leaves, treedef = flatten(params)
    for path, (_, format_, axes) in choose_formats(spec, leaves, kernels).items():
        leaf = leaves[path]
        leaves[path] = quantize_leaf(leaf, format_, axes)
        if donate and isinstance(leaf, Array) and is_concrete(leaf):
            jax.block_until_ready(leaves[path])
            if not any(other is leaf for other in leaves.values()):  # another path holds a tied array
                leaf.delete()
    return unflatten(treedef, leaves)


def choose_formats(
    spec: Rules[Format | None], leaves: Mapping[str, Any], kernels: Mapping[str, Kernel] | None
) -> dict[str, Choice]:
    """Returns the format and the roles of the axes for each leaf that a spec quantizes.

    Raises:
      SpecError: where `quantize` raises it.
    """
    fitted = fit(spec, leaves, None if kernels is None else _rows_as_outputs(kernels), kind=Format)
    check_arrays(leaves, fitted)
    return fitted


def dequantize(params: Any, patterns: Iterable[Pattern] = ("**",)) -> Any:
    """Returns the tree with its quantized leaves as arrays, in the dtype that they had before.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> small = lj.quant.quantize({"kernel": jnp.ones((64, 2))}, {"kernel": lj.quant.Int8()})
    >>> lj.quant.dequantize(small)["kernel"].dtype.name
    'float32'

    Args:
      params: a tree with quantized leaves.
      patterns: which leaves; by default all.

    Returns:
      A tree like `params`.

    Raises:
      SpecError: if a pattern matches no leaf.
    """
    leaves, treedef = flatten(params)
    chosen = {path for pattern in patterns for path in matching_paths(pattern, leaves, "every pattern to match a leaf")}
    return unflatten(
        treedef,
        {
            path: _dequantize(leaf) if path in chosen and isinstance(leaf, StoredLeaf) else leaf
            for path, leaf in leaves.items()
        },
    )


@jax.jit
def _dequantize(leaf: StoredLeaf) -> Array:
    array: Array = dense(leaf)
    return to_host(array) if any(map(is_in_host_memory, jax.tree.leaves(leaf))) else array


def _rows_as_outputs(kernels: Mapping[str, Kernel]) -> dict[str, Kernel]:
    """Makes the rows of tables that are looked up outputs, so that each row is stored by itself."""

    def swapped(kernel: Kernel) -> Kernel:
        if kernel.kind != "embedding" or kernel.axes is None:
            return kernel
        return dataclasses.replace(kernel, axes=kernel.axes.translate(str.maketrans("io", "oi")))

    return {path: swapped(kernel) for path, kernel in kernels.items()}


def check_arrays(leaves: Mapping[str, Any], fitted: Collection[str]) -> None:
    """Raises `SpecError` if one of the paths is of a leaf that is stored already, or is not finite."""
    if stored := [repr(path) for path in fitted if isinstance(leaves[path], StoredLeaf)]:
        raise SpecError(
            f"Expected arrays; {len(stored)} of the {len(fitted)} leaves that the spec matches are already quantized.\n"
            f"{listed(stored)}\n  Put a rule before it that leaves them as they are, {{path: None}}, or call "
            "quant.dequantize first. Nothing was quantized."
        )
    concrete = [
        path for path in fitted if isinstance(leaves[path], jax.Array | np.ndarray) and is_concrete(leaves[path])
    ]
    if bad := [repr(path) for path in concrete if not is_finite(leaves[path])]:
        raise SpecError(
            f"Expected finite kernels; {len(bad)} of {len(fitted)} contain NaN or infinity, for which there is no "
            f"scale.\n{listed(bad)}\n  Leave them out of the spec, or use another checkpoint. Nothing was quantized."
        )


def quantize_leaf(leaf: Any, format_: Format, axes: str) -> StoredLeaf:
    """Quantizes one leaf."""
    if isinstance(leaf, Array) and is_in_host_memory(leaf):
        moved: StoredLeaf = jax.tree.map(to_host, quantize_leaf(to_device(leaf), format_, axes))
        return moved
    jitted = functools.partial(_jitted, format_, axes)
    sharding = getattr(leaf, "sharding", None) if is_concrete(leaf) else explicit_sharding(jax.typeof(leaf))
    shardings = None
    if isinstance(leaf, jax.ShapeDtypeStruct) or isinstance(sharding, NamedSharding):
        abstract = jax.eval_shape(jitted(None), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        shardings = shardings_like(abstract, sharding) if isinstance(sharding, NamedSharding) else None
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return abstract if shardings is None else jax.tree.map(_struct, abstract, shardings)
    stored: StoredLeaf = jitted(shardings)(leaf)
    return stored


def _struct(array: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _jitted(format_: Format, axes: str, shardings: Any) -> Any:
    # The tree of shardings as a hashable value, so that equal kernels are compiled once.
    return _jitted_for(format_, axes, *map(_as_hashable, jax.tree.flatten(shardings)))


def _as_hashable(x: Any) -> Any:
    return tuple(x) if isinstance(x, list) else x


@functools.cache
def _jitted_for(format_: Format, axes: str, places: tuple[Any, ...], treedef: Any) -> Any:
    shardings = jax.tree.unflatten(treedef, places)
    batch = len(axes) - len(axes.lstrip("b"))
    has_explicit_axes = any(AxisType.Explicit in place.mesh.axis_types for place in places)

    def run(w: Any, depth: int) -> Any:
        if depth == 0:
            return format_.quantize(w, axes[batch:])
        return jax.lax.map(functools.partial(run, depth=depth - 1), w)

    def quantized(w: Any) -> Any:
        return run(jnp.asarray(w), batch)

    if has_explicit_axes:  # the types of the results have the shardings
        return jax.jit(with_auto_axes(quantized, shardings))
    return jax.jit(quantized, out_shardings=shardings)
