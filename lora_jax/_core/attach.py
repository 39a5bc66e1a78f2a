"""Matches an adapter to its parameters, and checks that they belong together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import varying
from .._errors import SHOWN, AdapterError, SpecError, UnsupportedError, counted, listed
from .adapter import Adapter, Adapters, check_adapter
from .axes import axes_with
from .base import base_of
from .dropout import Dropout
from .kernel import AdaptedKernel
from .keys import key_for
from .paths import matches_any, matching_paths, nearest


def attach(
    leaves: Mapping[str, Any],
    adapter: Adapters,
    dropout_key: Any = None,
    token_weights: Any = None,
    *,
    only_shapes: bool = False,
) -> dict[str, AdaptedKernel | Any]:
    """Returns what the model receives in place of each adapted leaf.

    Args:
      leaves: the parameters, by path.
      adapter: from `init`, `restore` or training.
      dropout_key: PRNG key; each path is folded into it. Without a key there is no dropout.
      token_weights: the weights of experts for each token, from the caller.
      only_shapes: whether they may be missing.

    Raises:
      AdapterError: if a path is not among the leaves or a shape does not match, with the differences; if
        `token_weights` are missing, needless, of another dtype, or of another number of experts.
      UnsupportedError: if a leaf is a shard inside a `shard_map`, and its variant needs all of it.
    """
    check(leaves, adapter)
    weights = {} if only_shapes else _weights_by_path(adapter, token_weights)
    return {
        path: _attach_leaf(as_jax(leaves[path]), part, path, dropout_key, weights.get(path))
        for path, part in adapter.items()
    }


def _attach_leaf(leaf: Any, part: Adapter, path: str, dropout_key: Any, weights: Any) -> Any:
    replacement: Any = part.variant.apply(base_of(leaf), part.arrays, part.axes, path)
    if weights is not None:
        replacement = dataclasses.replace(replacement, given=weights)
    if dropout_key is not None and (rate := getattr(part.variant, "dropout", 0.0)):
        replacement = dataclasses.replace(replacement, dropout=Dropout(rate, key_for(dropout_key, path)))
    return replacement


def as_jax(leaf: Any) -> Any:
    """Converts a NumPy leaf to a JAX array: without `jax_enable_x64`, float64 becomes float32."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def check(leaves: Mapping[str, Any], adapter: Any, *, tree: str = "params") -> None:
    """Raises `AdapterError` unless `adapter` matches the parameters; both may be shapes only.

    Args:
      leaves: the parameters, by path.
      adapter: the candidate.
      tree: the caller's name for the parameters, for errors.

    Raises:
      UnsupportedError: if a leaf is a shard inside a `shard_map`, and its variant needs all of it.
    """
    check_adapter(adapter, f"The arguments come in this order: first `{tree}`, then the adapter.")
    differences: list[str] = []
    for path, part in adapter.items():
        # Comparing names is slow for a large model, and only the first differences are shown.
        differences += _differences(path, part, leaves, tree, hint=len(differences) < SHOWN)
    if differences:
        raise AdapterError(
            f"Expected an adapter of `{tree}`, with paths of its leaves and matching shapes; got "
            f"{counted(len(differences), 'difference')}.\n{listed(differences)}\n"
            "  Pass the tree that the adapter was initialized from (`variables` is not `variables['params']`)."
        )
    _check_shards(leaves, adapter)
    for path, part in adapter.items():
        try:
            part.variant.check_numbers(tuple(leaves[path].shape), part.axes)
        except SpecError as error:
            raise AdapterError(
                f"Expected an adapter of `{tree}`, whose leaves have the rows and layers that it adapts; at {path!r}, "
                f"{error}.\n  Pass the tree that the adapter was initialized from."
            ) from error


def _check_shards(leaves: Mapping[str, Any], adapter: Adapters) -> None:
    """Raises `UnsupportedError` if a leaf is a shard, inside a `shard_map`, and its variant needs all of it."""
    found = {path: axes for path, part in adapter.items() if (axes := _sharded_over(leaves[path], part))}
    if found:
        shards = [f"{path!r}, over {sorted(axes)}: {adapter[path].variant}" for path, axes in found.items()]
        raise UnsupportedError(
            "Expected kernels with all of their layers, inputs and outputs, which some variants need; got "
            f"{counted(len(shards), 'shard')} inside a `shard_map`.\n{listed(shards)}",
            None,
            "Call `lora` or `merge` outside of it: a model may contain a `shard_map`. Or use `jit` with shardings.",
        )


def _sharded_over(leaf: Any, part: Adapter) -> frozenset[str]:
    """Returns the mesh axes over which a leaf is sharded along axes that its variant needs all of.

    A factor is sharded as its kernel is. So the kernel is sharded along its inputs, and not along a batch axis, if an
    array without inputs does not vary. It is sharded along its layers, whose number its arrays do not have, if none of
    them varies. Nothing varies outside of a `shard_map`, or without `check_vma`.
    """
    kernel, sharded, layout = _varying(leaf), frozenset[str](), part.variant.layout(part.axes)
    for role in part.variant.needs_all if kernel else "":
        if role == "b":
            sharded |= kernel.difference(*map(_varying, part.arrays.values()))
            continue
        along = set(axes_with(part.axes, role))
        having = [_varying(array) for name, array in part.arrays.items() if along & {*layout[name]}]
        lacking = [_varying(array) for name, array in part.arrays.items() if not along & {*layout[name]}]
        sharded |= kernel.intersection(*having) - frozenset.intersection(*lacking)
    return sharded


def _varying(leaf: Any) -> frozenset[str]:
    arrays = [array for array in jax.tree.leaves(leaf) if isinstance(array, jax.Array)]
    return frozenset[str]().union(*(varying(jax.typeof(array)) for array in arrays))


def _differences(path: str, part: Adapter, leaves: Mapping[str, Any], tree: str, *, hint: bool) -> list[str]:
    if path not in leaves:
        near = nearest(path, list(leaves)) if hint else ()
        return [f"{path!r} is not in `{tree}`; the nearest are {', '.join(map(repr, near))}"]
    shape = tuple(leaves[path].shape)
    if not jnp.issubdtype(leaves[path].dtype, jnp.floating):
        return [f"{path!r} has dtype {leaves[path].dtype}; an adapter needs a floating-point leaf"]
    # JAX refuses another byte order, except where it has a compiled program for that shape: it then reads other values.
    for name, array in {path: leaves[path], **part.arrays}.items():
        if isinstance(array, np.ndarray) and not array.dtype.isnative:
            return [f"{path!r} has another byte order, {name!r} in {array.dtype}; use astype({array.dtype.name!r})"]
    if part.axes and len(part.axes) != len(shape):
        return [f"{path!r} has shape {shape}; the adapter was made for axes {part.axes!r}"]
    if getattr(part.variant, "clip_rank", False):  # the scale would be that of the rank before clipping
        fitted = part.variant.fitted(shape, part.axes)
        return [f"{path!r} has {part.variant}, which is only for a spec; the adapter of this kernel needs {fitted}"]
    expected = part.variant.shapes(shape, part.axes)
    got = {name: tuple(array.shape) for name, array in part.arrays.items()}
    if got == expected:
        return []
    return [f"{path!r} has shape {shape}, which needs {_shapes(expected)}; the adapter has {_shapes(got)}"]


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))


def _weights_by_path(adapter: Adapters, token_weights: Any) -> dict[str, Any]:
    """Returns the weights from the caller for each leaf that needs them, as in `AdaptedKernel.given`.

    Args:
      adapter: the adapter.
      token_weights: one array for all these leaves, or `{pattern: array}`, of which the first match decides.

    Raises:
      AdapterError: if they are missing, needless, of another dtype, or have another number of experts.
    """
    needing = {path: part for path, part in adapter.items() if part.variant.needs_weights}
    if token_weights is not None and not needing:
        raise AdapterError(
            "Expected no `token_weights`, because no leaf of the adapter takes weights from the caller, as ALoRA and "
            "`many.Given` do; got some."
        )
    by_pattern = token_weights if isinstance(token_weights, Mapping) else {"**": token_weights}
    for pattern in by_pattern:
        if needing:
            matching_paths(pattern, needing, error=AdapterError)
    found = {}
    for path, part in needing.items():
        weights = next((array for pattern, array in by_pattern.items() if matches_any(path, [pattern])), None)
        if weights is None:
            raise AdapterError(
                f"Expected `token_weights`: {path!r} has {part.variant}, whose effect on each token the caller decides."
                "\n  For ALoRA, call adapted(…, token_weights=lora_jax.active_tokens(adapter, ids)). If the model gets "
                "only a part of the tokens, as with a cache, pass the weights of that part."
            )
        found[path] = _checked_weights(path, part, weights)
    return found


def _checked_weights(path: str, part: Adapter, weights: Any) -> Any:
    """Returns weights with the axis of experts before those of tokens."""
    dtype, experts = getattr(weights, "dtype", None), part.variant.experts_given
    if dtype is None or not any(jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.floating)):
        got = type(weights).__name__ if dtype is None else dtype
        raise AdapterError(f"Expected `token_weights` to be a boolean or floating-point array; got {got} for {path!r}.")
    if experts is None:
        return jnp.expand_dims(weights, 0)
    batch = part.a.shape[: part.axes.count("b")] if part.variant.weights_per_layer else ()
    if weights.ndim <= len(batch) or (*weights.shape[: len(batch)], weights.shape[-1]) != (*batch, experts):
        expected = ", ".join(map(str, (*batch, "tokens…", experts)))
        raise AdapterError(
            f"Expected `token_weights` of shape ({expected}) for {path!r}, which has {experts} experts; got "
            f"{tuple(weights.shape)}."
        )
    return jnp.moveaxis(jnp.asarray(weights), -1, len(batch))
