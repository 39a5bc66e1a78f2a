"""Training state as an item of a checkpoint: optimizer state, step, PRNG key, position in the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from .._core.paths import differences
from .._errors import CheckpointError, counted, listed
from ._arrays import check_dtype, check_values, describe_array, restore_target, to_jax
from ._item import ItemHandler
from ._manifest import dumps, header, loads

_FORMAT = "lora_jax.state"
_PLAIN = (bool, int, float, str)  # stored in the description, because JSON preserves them exactly


class StateHandler(ItemHandler):
    """Orbax's handler for one state; Orbax selects it by `StateSave` and `StateRestore`."""

    description = "state.json"

    def parts(self, args: StateSave) -> tuple[dict[str, Any], str]:
        """Returns the arrays by path, PRNG keys as their data, and the description of each leaf."""
        leaves = _leaves(args.state)
        manifest = header(_FORMAT) | {"state": {path: _describe(leaf) | _value(leaf) for path, leaf in leaves.items()}}
        return {path: _data(leaf) for path, leaf in leaves.items() if not isinstance(leaf, _PLAIN)}, dumps(manifest)

    def restore(self, directory: epath.Path, args: StateRestore) -> Any:
        """Verifies the files, checks the structure, and reads the arrays to the shardings of `like`."""
        saved = loads(self.verified(directory), directory, _FORMAT)["state"]
        like = _leaves(args.like)
        _check(saved, like, directory)
        target = {path: _target(leaf, path, directory) for path, leaf in like.items() if not isinstance(leaf, _PLAIN)}
        read = self.read(directory, target)
        values = [_leaf(leaf, read.get(path), saved[path]) for path, leaf in like.items()]
        return jax.tree.unflatten(jax.tree.structure(args.like), values)

    def metadata(self, directory: epath.Path) -> Mapping[str, Any]:
        """Returns the description."""
        return loads((directory / self.description).read_bytes(), directory, _FORMAT)


@ocp.args.register_with_handler(StateHandler, for_save=True)
@dataclasses.dataclass(eq=False)
class StateSave(ocp.args.CheckpointArgs):  # type: ignore[misc]
    """Saves training state as one item of a `CheckpointManager`; see `AdapterSave`.

    Attributes:
      state: any tree of arrays, PRNG keys, and Python numbers and strings, such as optimizer state, step, key and
        position in the data.

    Raises:
      CheckpointError: if a leaf is of another type, was donated, or is an array without elements.
    """

    state: Any = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        """Checks the state now, because an error during Orbax's save would leave threads running."""
        arrays = {path: leaf for path, leaf in _leaves(self.state).items() if not isinstance(leaf, _PLAIN)}
        for path, leaf in arrays.items():
            check_values(leaf, path)
        if not arrays or (empty := [path for path, leaf in arrays.items() if not leaf.size]):
            got = f"empty arrays, {', '.join(empty)}" if arrays else "no arrays"
            raise CheckpointError(
                f"Expected a state with nonempty arrays, because Orbax cannot save others; got {got}.\n"
                "  Leave empty arrays out. Save a state of Python values only with Orbax's JsonSave."
            )


@ocp.args.register_with_handler(StateHandler, for_restore=True)
@dataclasses.dataclass(eq=False)
class StateRestore(ocp.args.CheckpointArgs):  # type: ignore[misc]
    """Restores training state bit for bit, with the shardings of `like`.

    Attributes:
      like: a state of the same structure, shapes and dtypes, such as the initial state of a run; arrays or
        `ShapeDtypeStruct`s. Each array gets the sharding of its counterpart in `like`, which may differ from the saved
        one, and is uncommitted if its counterpart is.
    """

    like: Any = dataclasses.field(repr=False)


def _leaves(state: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): _to_array(leaf) for path, leaf in leaves}


def _to_array(leaf: Any) -> Any:
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, _PLAIN):
        return {"type": type(leaf).__name__}
    return describe_array(leaf)


def _value(leaf: Any) -> dict[str, Any]:
    """Returns what a description has in addition for Python values and PRNG keys."""
    if isinstance(leaf, _PLAIN):
        return {"value": leaf}
    return {"impl": str(jax.random.key_impl(leaf))} if _is_key(leaf) else {}


def _data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _target(like: Any, path: str, where: object) -> Any:
    """Returns what Orbax reads an array to: the shape, dtype and, if committed, sharding of `like`."""
    array = jax.eval_shape(_data, like) if _is_key(like) else jax.ShapeDtypeStruct(like.shape, like.dtype)
    if not isinstance(like, np.ndarray):
        check_dtype(array.dtype, path, where)
    sharding = getattr(like, "sharding", None) if getattr(like, "committed", True) else None
    try:
        return restore_target(array, sharding)
    except ValueError as error:
        raise CheckpointError(
            f"Expected `like` to have a sharding on devices that divides the array at {path}; got {sharding}.\n"
            f"  {error}\n"
            "  Pass arrays, or `ShapeDtypeStruct`s with such a sharding or without any."
        ) from error


def _leaf(like: Any, read: Any, saved: Mapping[str, Any]) -> Any:
    if isinstance(like, _PLAIN):
        return saved["value"]
    if isinstance(like, np.ndarray):
        return read
    return jax.random.wrap_key_data(to_jax(read), impl=saved["impl"]) if _is_key(like) else to_jax(read)


def _check(saved: Mapping[str, Mapping[str, Any]], like: Mapping[str, Any], where: object) -> None:
    """Raises `CheckpointError` with the first differences between the saved state and `like`."""
    given = {path: _describe(leaf) for path, leaf in like.items()}
    types = {path: {k: v for k, v in leaf.items() if k not in ("value", "impl")} for path, leaf in saved.items()}
    if found := differences(
        types,
        given,
        only_one="is not in `like`",
        only_other="is in `like` and was not saved",
        unlike="was {one}; in `like` it is {other}",
    ):
        raise CheckpointError(
            f"Expected `like` to have the structure, shapes and dtypes of the state in {where}; got {len(given)} "
            f"leaves (saved: {len(saved)}) and {counted(len(found), 'difference')}.\n{listed(found)}\n"
            "  Create it as in the run that was saved: the same optimizer, for the same adapter."
        )
