"""Puts an adapter to the parameters it was made for, or says why it does not belong to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._errors import SHOWN, AdapterError, listed
from .adapter import Adapter, Adapters, check_adapter
from .base import base_of
from .dropout import Dropout
from .kernel import AdaptedKernel
from .keys import key_for
from .paths import nearest


def attach(
    leaves: Mapping[str, Any], adapter: Adapters, dropout_key: Any = None, active: Any = None
) -> dict[str, AdaptedKernel | Any]:
    """What the model sees in place of each adapted leaf.

    Args:
      leaves: the parameters, by path.
      adapter: from `init`, `restore` or training.
      dropout_key: a PRNG key, each path folds its name into it; without it there is no dropout.
      active: which tokens the variants that act on some alone act on.

    Raises:
      AdapterError: if a path is not among the leaves, or a shape disagrees; lists the differences.
    """
    check(leaves, adapter)
    return {path: _attached(as_jax(leaves[path]), part, path, dropout_key, active) for path, part in adapter.items()}


def _attached(leaf: Any, part: Adapter, path: str, dropout_key: Any, active: Any) -> Any:
    seen: Any = part.variant.apply(base_of(leaf), part.arrays, part.axes, path)
    if part.variant.some_tokens:
        seen = dataclasses.replace(seen, active=active)
    if dropout_key is not None and (rate := getattr(part.variant, "dropout", 0.0)):
        seen = dataclasses.replace(seen, dropout=Dropout(rate, key_for(dropout_key, path)))
    return seen


def as_jax(leaf: Any) -> Any:
    """A leaf of the dtype that JAX sees: without 64 bits, NumPy's float64 is float32."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def check(leaves: Mapping[str, Any], adapter: Any, *, tree: str = "params") -> None:
    """Raises what `attach` would, for parameters and arrays that may be shapes only.

    Args:
      leaves: the parameters, by path.
      adapter: what should be one.
      tree: what the caller calls the parameters.
    """
    check_adapter(adapter, f"The arguments come in this order: first `{tree}`, then the adapter.")
    differences: list[str] = []
    for path, part in adapter.items():
        # To compare names takes long in a large model, and only the first differences are shown.
        differences += _differences(path, part, leaves, tree, hint=len(differences) < SHOWN)
    if differences:
        raise AdapterError(
            f"Expected the adapter to belong to `{tree}`: each path one of its leaves, each array of a shape that "
            f"fits; got {len(differences)} differences.\n{listed(differences)}\n"
            "  Give the tree that the adapter was made from (`variables` is not `variables['params']`)."
        )


def _differences(path: str, part: Adapter, leaves: Mapping[str, Any], tree: str, *, hint: bool) -> list[str]:
    if path not in leaves:
        near = nearest(path, list(leaves)) if hint else ()
        return [f"{path!r} is not in `{tree}`; the nearest are {', '.join(map(repr, near))}"]
    shape = tuple(leaves[path].shape)
    if not jnp.issubdtype(leaves[path].dtype, jnp.floating):
        return [f"{path!r} holds {leaves[path].dtype}; an adapter is of a floating-point leaf"]
    if part.axes and len(part.axes) != len(shape):
        return [f"{path!r} has shape {shape}; the adapter was made for axes {part.axes!r}"]
    if getattr(part.variant, "clip_rank", False):  # its scale would be that of another rank
        fitted = part.variant.fitted(shape, part.axes)
        return [f"{path!r} has {part.variant}, which is for a spec; the adapter of this kernel has {fitted}"]
    expected = part.variant.shapes(shape, part.axes)
    got = {name: tuple(array.shape) for name, array in part.arrays.items()}
    if got == expected:
        return []
    return [f"{path!r} has shape {shape}, which needs {_shapes(expected)}; the adapter has {_shapes(got)}"]


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))


def check_active(adapter: Adapters, active: Any) -> None:
    """Raises if an adapter needs to be told which tokens are active and is not, or is told and does not need to be."""
    waiting = [path for path, part in adapter.items() if part.variant.some_tokens]
    if waiting and active is None:
        raise AdapterError(
            f"Expected `active_tokens`: {waiting[0]!r} has {adapter[waiting[0]].variant}, which acts on some tokens "
            "alone.\n  Call adapted(…, active_tokens=lora_jax.active_tokens(adapter, ids)), or say it by hand where "
            "the model gets a part of the tokens, as with a cache."
        )
    if active is not None and not waiting:
        raise AdapterError("Expected no `active_tokens`: all of the adapter acts on every token, as none is ALoRA.")
    if active is not None and (got := str(getattr(active, "dtype", type(active).__name__))) != "bool":
        raise AdapterError(f"Expected `active_tokens` to be an array of booleans, one for each token; got {got}.")
