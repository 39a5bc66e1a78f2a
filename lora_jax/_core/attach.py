"""Matches an adapter to its parameters, and checks that they belong together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._errors import SHOWN, AdapterError, counted, listed
from .adapter import Adapter, Adapters, check_adapter
from .base import base_of
from .dropout import Dropout
from .kernel import AdaptedKernel
from .keys import key_for
from .paths import nearest


def attach(
    leaves: Mapping[str, Any], adapter: Adapters, dropout_key: Any = None, active: Any = None
) -> dict[str, AdaptedKernel | Any]:
    """Returns what the model receives in place of each adapted leaf.

    Args:
      leaves: the parameters, by path.
      adapter: from `init`, `restore` or training.
      dropout_key: PRNG key; each path is folded into it. Without a key there is no dropout.
      active: which tokens are active, for variants that act on some tokens only.

    Raises:
      AdapterError: if a path is not among the leaves or a shape does not match; lists the differences.
    """
    check(leaves, adapter)
    return {path: _attach_leaf(as_jax(leaves[path]), part, path, dropout_key, active) for path, part in adapter.items()}


def _attach_leaf(leaf: Any, part: Adapter, path: str, dropout_key: Any, active: Any) -> Any:
    replacement: Any = part.variant.apply(base_of(leaf), part.arrays, part.axes, path)
    if part.variant.some_tokens:
        replacement = dataclasses.replace(replacement, active=active)
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


def _differences(path: str, part: Adapter, leaves: Mapping[str, Any], tree: str, *, hint: bool) -> list[str]:
    if path not in leaves:
        near = nearest(path, list(leaves)) if hint else ()
        return [f"{path!r} is not in `{tree}`; the nearest are {', '.join(map(repr, near))}"]
    shape = tuple(leaves[path].shape)
    if not jnp.issubdtype(leaves[path].dtype, jnp.floating):
        return [f"{path!r} has dtype {leaves[path].dtype}; an adapter needs a floating-point leaf"]
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


def check_active(adapter: Adapters, active: Any) -> None:
    """Raises `AdapterError` if a variant needs `active_tokens` and none are given, or the other way round."""
    needing = [path for path, part in adapter.items() if part.variant.some_tokens]
    if needing and active is None:
        raise AdapterError(
            f"Expected `active_tokens`: {needing[0]!r} has {adapter[needing[0]].variant}, which acts on some tokens "
            "only.\n  Call adapted(…, active_tokens=lora_jax.active_tokens(adapter, ids)). If the model gets only a "
            "part of the tokens, as with a cache, pass the booleans of that part."
        )
    if active is not None and not needing:
        raise AdapterError("Expected no `active_tokens`, because no variant of the adapter is ALoRA; got some.")
    if active is not None and (got := str(getattr(active, "dtype", type(active).__name__))) != "bool":
        raise AdapterError(f"Expected `active_tokens` to be a boolean array with one element per token; got {got}.")
