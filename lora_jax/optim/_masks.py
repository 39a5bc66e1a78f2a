"""Masks for optimizers: selects arrays of an adapter by name and path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from .._core.adapter import Adapter, check_adapter
from .._core.paths import Patterns, as_tuple, matches_any, matching_paths
from .._errors import AdapterError

Mask = Callable[[Any], Any]

ONLY_ADAPTER = "Pass only the adapter to the optimizer. If one tree holds both, wrap the optimizer: freeze_base(tx)."


def select(*names: str, paths: Patterns = "**", exclude: Patterns = ()) -> Mask:
    """Returns a mask function for optax that selects arrays of an adapter by name and by path.

    Weight decay of the factors only: `optax.adamw(1e-3, weight_decay=0.1, mask=select("a", "b"))`. A tenth of the
    learning rate for embeddings: `optax.chain(tx, optax.masked(optax.scale(0.1), select(paths="**/embedding")))`.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    >>> spec = {"**/kernel": lj.LoRA(rank=1, alpha=1), "**/bias": lj.Full()}
    >>> adapter = lj.init(jax.random.key(0), params, spec)
    >>> mask = lj.optim.select("a", "b")(adapter)
    >>> mask["dense/kernel"].a, mask["dense/bias"].value
    (True, False)

    Args:
      *names: names of arrays: `"a"`, `"b"`, `"value"` of a `Full` leaf; all arrays if empty.
      paths: one pattern, or several, for the paths to select from.
      exclude: patterns for paths that are not selected.

    Returns:
      A function that maps an adapter, or a tree like it such as its gradient, to a tree of the same structure: True for
      each selected array, False for the others.

    Raises:
      AdapterError: from that function, if its argument is not an adapter, or a name or pattern matches nothing in it.
    """
    included, excluded = as_tuple(paths), as_tuple(exclude)

    def mask(adapter: Any) -> Any:
        check_adapter(adapter, ONLY_ADAPTER)
        _check_names(names, adapter)
        for pattern in (*included, *excluded):
            matching_paths(pattern, adapter, error=AdapterError)

        def selected(path: str, name: str) -> bool:
            return (not names or name in names) and matches_any(path, included) and not matches_any(path, excluded)

        return label_arrays(adapter, selected)

    return mask


def label_arrays(adapter: Any, label: Callable[[str, str], Any]) -> Any:
    """Returns a tree like the adapter, with `label(path, name)` in place of each array."""

    def label_part(keys: Any, part: Adapter) -> Any:
        path = str(keys[-1].key)
        return jax.tree_util.tree_map_with_path(lambda inner, _: label(path, inner[0].name), part)

    return jax.tree_util.tree_map_with_path(label_part, adapter, is_leaf=lambda node: isinstance(node, Adapter))


def _check_names(names: Sequence[str], adapter: Mapping[str, Adapter]) -> None:
    known = sorted({name for part in adapter.values() for name in part.arrays})
    unknown = [name for name in names if name not in known]
    if unknown:
        raise AdapterError(f"Expected names of the adapter's arrays, which are {known}; got {unknown[0]!r}.")
