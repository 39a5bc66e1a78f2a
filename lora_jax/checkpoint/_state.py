"""What training needs besides the adapter, as an item of a checkpoint: optimizer state, step, key, data position."""

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
from .._errors import CheckpointError, listed
from ._arrays import check_values, check_width, described, place, settled
from ._item import ItemHandler
from ._manifest import dumps, header, loads

_FORMAT = "lora_jax.state"
_PLAIN = (bool, int, float, str)  # kept in the description: JSON gives them back as they were


class StateHandler(ItemHandler):
    """Writes and reads one state for Orbax.

    Orbax finds it by `StateSave` and `StateRestore`; there is no need to name it.
    """

    description = "state.json"

    def parts(self, args: StateSave) -> tuple[dict[str, Any], str]:
        """The arrays by path, keys as their data, and what each leaf is."""
        leaves = _leaves(args.state)
        manifest = header(_FORMAT) | {"state": {path: _describe(leaf) | _value(leaf) for path, leaf in leaves.items()}}
        return {path: _data(leaf) for path, leaf in leaves.items() if not isinstance(leaf, _PLAIN)}, dumps(manifest)

    def restore(self, directory: epath.Path, args: StateRestore) -> Any:
        """Checks the files, then the structure, and reads each array to where the one that it shall be like lies."""
        saved = loads(self.verified(directory), directory, _FORMAT)["state"]
        like = _leaves(args.like)
        _check(saved, like, directory)
        target = {path: _target(leaf, path, directory) for path, leaf in like.items() if not isinstance(leaf, _PLAIN)}
        read = self.read(directory, target)
        values = [_leaf(leaf, read.get(path), saved[path]) for path, leaf in like.items()]
        return jax.tree.unflatten(jax.tree.structure(args.like), values)

    def metadata(self, directory: epath.Path) -> Mapping[str, Any]:
        """The description."""
        return loads((directory / self.description).read_bytes(), directory, _FORMAT)


@ocp.args.register_with_handler(StateHandler, for_save=True)
@dataclasses.dataclass(eq=False)
class StateSave(ocp.args.CheckpointArgs):  # type: ignore[misc]
    """Saves the state of training as one item of a `CheckpointManager`, beside the adapter.

    Attributes:
      state: any tree of arrays, random keys, and Python numbers and texts, such as optimizer state, step, key and
        position in the data.

    Raises:
      CheckpointError: if a leaf is none of these, was donated, or is an array without elements.
    """

    state: Any = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        """Checks the state here: an error in the middle of Orbax's save would leave threads behind."""
        arrays = {path: leaf for path, leaf in _leaves(self.state).items() if not isinstance(leaf, _PLAIN)}
        for path, leaf in arrays.items():
            check_values(leaf, path)
        if not arrays or (empty := [path for path, leaf in arrays.items() if not leaf.size]):
            got = f"empty ones, {', '.join(empty)}" if arrays else "none"
            raise CheckpointError(
                f"Expected a state with arrays that hold something, as Orbax cannot save others; got {got}.\n"
                "  Leave them out; for Python values alone there is Orbax's JsonSave."
            )


@ocp.args.register_with_handler(StateHandler, for_restore=True)
@dataclasses.dataclass(eq=False)
class StateRestore(ocp.args.CheckpointArgs):  # type: ignore[misc]
    """Restores the state of training, bit for bit, to where the state that it shall be like lies.

    Attributes:
      like: a state of the same structure, shapes and dtypes, such as that of a run that begins. An array is restored
        with the sharding of the one in its place, which may differ from the one that was saved; it is committed to no
        device if that one is not. `ShapeDtypeStruct`s serve as well.
    """

    like: Any = dataclasses.field(repr=False)


def _leaves(state: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): _array(leaf) for path, leaf in leaves}


def _array(leaf: Any) -> Any:
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, _PLAIN):
        return {"type": type(leaf).__name__}
    return described(leaf)


def _value(leaf: Any) -> dict[str, Any]:
    """What a description says besides of a leaf that has a value."""
    if isinstance(leaf, _PLAIN):
        return {"value": leaf}
    return {"impl": str(jax.random.key_impl(leaf))} if _is_key(leaf) else {}


def _data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _target(like: Any, path: str, where: object) -> Any:
    """What to read: the same shape and dtype, in the same place, if anybody has said where that one lies."""
    array = jax.eval_shape(_data, like) if _is_key(like) else jax.ShapeDtypeStruct(like.shape, like.dtype)
    if not isinstance(like, np.ndarray):
        check_width(array.dtype, path, where)
    sharding = getattr(like, "sharding", None) if getattr(like, "committed", True) else None
    try:
        return place(array, sharding)
    except ValueError as error:
        raise CheckpointError(
            f"Expected `like` to say where an array shall lie; at {path} it says {sharding}.\n"
            f"  {error}\n"
            "  Give arrays that lie there, or `ShapeDtypeStruct`s with a sharding over devices, or with none."
        ) from error


def _leaf(like: Any, read: Any, saved: Mapping[str, Any]) -> Any:
    if isinstance(like, _PLAIN):
        return saved["value"]
    if isinstance(like, np.ndarray):
        return read
    return jax.random.wrap_key_data(settled(read), impl=saved["impl"]) if _is_key(like) else settled(read)


def _check(saved: Mapping[str, Mapping[str, Any]], like: Mapping[str, Any], where: object) -> None:
    """Raises `CheckpointError` with the first differences between what was saved and what it shall be like."""
    given = {path: _describe(leaf) for path, leaf in like.items()}
    was = {path: {name: its[name] for name in its if name not in ("value", "impl")} for path, its in saved.items()}
    if found := differences(
        was,
        given,
        only_one="is not in `like`",
        only_other="is in `like` and was not saved",
        unlike="was {one}; in `like` it is {other}",
    ):
        raise CheckpointError(
            f"Expected `like` to be a state as the one in {where}; got one of {len(given)} leaves (it was {len(was)}), "
            f"differences: {len(found)}.\n{listed(found)}\n"
            "  Make it as it was made for the run that was saved: the same optimizer, for the same adapter."
        )
