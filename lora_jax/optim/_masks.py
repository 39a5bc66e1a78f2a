"""The arrays of an adapter by their names and paths: masks for optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from .._core.adapter import Adapter, check_adapter
from .._core.paths import Pattern, matches_any, matching_paths
from .._errors import AdapterError

Mask = Callable[[Any], Any]
Patterns = Pattern | Sequence[Pattern]

ONLY_ADAPTER = "Give the optimizer the adapter only; in one tree with the base, wrap it: freeze_base(tx)."


def select(*names: str, paths: Patterns = "**", exclude: Patterns = ()) -> Mask:
    """Selects some of an adapter's arrays, by name and by path, for whatever in optax takes a mask.

    Weight decay of the factors only: `optax.adamw(1e-3, weight_decay=0.1, mask=select("a", "b"))`. Some leaves at a
    tenth of the learning rate: `optax.chain(tx, optax.masked(optax.scale(0.1), select(paths="**/embedding")))`.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    >>> spec = {"**/kernel": lj.LoRA(rank=1, alpha=1), "**/bias": lj.Full()}
    >>> adapter = lj.init(jax.random.key(0), params, spec)
    >>> mask = lj.optim.select("a", "b")(adapter)
    >>> mask["dense/kernel"].a, mask["dense/bias"].value
    (True, False)

    Args:
      *names: of arrays: `"a"`, `"b"`, `"value"` of a `Full` leaf; any, if none is given.
      paths: one or more patterns of the paths to select from.
      exclude: patterns of paths that are not selected.

    Returns:
      A function of an adapter, or of a tree like it, such as its gradient; it returns a tree of the same structure with
      True at each selected array.

    Raises:
      AdapterError: from that function, if a name or a pattern fits nothing in the adapter, or if it is no adapter.
    """
    wanted, unwanted = _listed(paths), _listed(exclude)

    def mask(adapter: Any) -> Any:
        check_adapter(adapter, ONLY_ADAPTER)
        _check_names(names, adapter)
        for pattern in (*wanted, *unwanted):
            matching_paths(pattern, adapter, error=AdapterError)

        def selected(path: str, name: str) -> bool:
            return (not names or name in names) and matches_any(path, wanted) and not matches_any(path, unwanted)

        return labelled(adapter, selected)

    return mask


def labelled(adapter: Any, label: Callable[[str, str], Any]) -> Any:
    """A tree like the adapter, with `label(path, name)` at each array."""

    def of_part(keys: Any, part: Adapter) -> Any:
        path = str(keys[-1].key)
        return jax.tree_util.tree_map_with_path(lambda inner, _: label(path, inner[0].name), part)

    return jax.tree_util.tree_map_with_path(of_part, adapter, is_leaf=lambda node: isinstance(node, Adapter))


def _listed(patterns: Patterns) -> tuple[Pattern, ...]:
    return tuple(patterns) if isinstance(patterns, Sequence) and not isinstance(patterns, str) else (patterns,)


def _check_names(names: Sequence[str], adapter: Mapping[str, Adapter]) -> None:
    there = sorted({name for part in adapter.values() for name in part.arrays})
    strange = [name for name in names if name not in there]
    if strange:
        raise AdapterError(f"Expected names of the adapter's arrays, which are {there}; got {strange[0]!r}.")
