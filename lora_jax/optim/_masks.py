"""The arrays of an adapter by their names and paths: masks for optimisers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from .._core.adapter import Adapter
from .._core.paths import Pattern, matcher, matches_any, nearest, pattern_text
from .._errors import AdapterError, listed

Mask = Callable[[Any], Any]
Patterns = Pattern | Sequence[Pattern]


def only(*names: str, paths: Patterns = "**", but: Patterns = ()) -> Mask:
    """Picks some of an adapter's arrays, by name and by path, for whatever in optax takes a mask.

    Weight decay of the factors alone: `optax.adamw(1e-3, weight_decay=0.1, mask=only("a", "b"))`. Some leaves at a
    tenth of the learning rate: `optax.chain(tx, optax.masked(optax.scale(0.1), only(paths="**/embedding")))`.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    >>> spec = {"**/kernel": lj.LoRA(rank=1, alpha=1), "**/bias": lj.Full()}
    >>> adapter = lj.init(jax.random.key(0), params, spec)
    >>> mask = lj.optim.only("a", "b")(adapter)
    >>> mask["dense/kernel"].a, mask["dense/bias"].value
    (True, False)

    Args:
      *names: of arrays: `"a"`, `"b"`, `"value"` of a `Full` leaf; any, if none is given.
      paths: one or more patterns of the paths to pick from.
      but: patterns of paths that are not picked.

    Returns:
      A function of an adapter, or of a tree like it, such as its gradient; it returns a tree of the same structure with
      True at each picked array.

    Raises:
      AdapterError: from that function, if a name or a pattern fits nothing in the adapter, or if it is no adapter.
    """
    wanted, unwanted = _listed(paths), _listed(but)

    def mask(adapter: Any) -> Any:
        check_adapter(adapter)
        _check_names(names, adapter)
        _check_patterns((*wanted, *unwanted), adapter)

        def picked(path: str, name: str) -> bool:
            return (not names or name in names) and matches_any(path, wanted) and not matches_any(path, unwanted)

        return labelled(adapter, picked)

    return mask


def labelled(adapter: Any, label: Callable[[str, str], Any]) -> Any:
    """A tree like the adapter, with `label(path, name)` at each array."""

    def of_part(keys: Any, part: Adapter) -> Any:
        path = str(keys[-1].key)
        return jax.tree_util.tree_map_with_path(lambda inner, _: label(path, inner[0].name), part)

    return jax.tree_util.tree_map_with_path(of_part, adapter, is_leaf=lambda node: isinstance(node, Adapter))


def check_adapter(adapter: Any) -> None:
    """Raises if something is not an adapter, nor a tree like one."""
    if isinstance(adapter, Mapping):
        strangers = [f"{type(x).__name__} at {path!r}" for path, x in adapter.items() if not isinstance(x, Adapter)]
    else:
        strangers = [type(adapter).__name__]
    if strangers:
        raise AdapterError(
            f"Expected an adapter, or its gradient: a dict from paths to `Adapter`; got {strangers[0]}.\n"
            "  Give the optimiser the adapter alone; in one tree with the base, wrap it: freeze_base(tx)."
        )


def _listed(patterns: Patterns) -> tuple[Pattern, ...]:
    return tuple(patterns) if isinstance(patterns, Sequence) and not isinstance(patterns, str) else (patterns,)


def _check_names(names: Sequence[str], adapter: Mapping[str, Adapter]) -> None:
    there = sorted({name for part in adapter.values() for name in part.arrays})
    strange = [name for name in names if name not in there]
    if strange:
        raise AdapterError(f"Expected names of the adapter's arrays, which are {there}; got {strange[0]!r}.")


def _check_patterns(patterns: Sequence[Pattern], adapter: Mapping[str, Adapter]) -> None:
    for pattern in patterns:
        if not any(matcher(pattern).fullmatch(path) for path in adapter):
            raise AdapterError(
                f"Expected every pattern to match a path of the adapter; {pattern_text(pattern)!r} matches none of "
                f"{len(adapter)}.\n  The nearest paths:\n{listed(nearest(pattern, list(adapter)))}"
            )
