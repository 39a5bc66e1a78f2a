"""Saves and restores an adapter: by itself, or as one item of an Orbax `CheckpointManager`."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from .._core.adapter import Adapter, Adapters
from .._errors import CheckpointError
from ._arrays import settled
from ._checksums import LATER
from ._item import ItemHandler, nothing_there
from ._manifest import Manifest, check_base, check_savable, describe, dumps, loads, placed, skeleton

Path = str | os.PathLike[str]

_ITEM = "adapter"


def save(path: Path, adapter: Adapters, *, base: Any) -> None:
    """Saves an adapter, and what it takes to restore it without a template and to the right base only.

    The new checkpoint is complete before the one that was at `path` is deleted: a save that is killed loses nothing.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"query": {"kernel": jnp.ones((4, 3))}}
    >>> adapter = lj.init(jax.random.key(0), params, {"**/kernel": lj.LoRA(rank=2, alpha=4)})
    >>> with tempfile.TemporaryDirectory() as path:
    ...     save(path, adapter, base=params)
    ...     restore(path, base=params)
    {'query/kernel': Adapter(LoRA(rank=2, alpha=4), 'io', a=float32[4, 2], b=float32[2, 3])}

    Args:
      path: a directory, on any file system that Orbax can write; made if it is missing. An adapter that is saved there
        already is replaced.
      adapter: from `init`, `restore` or training.
      base: the tree that the adapter was made from. A few dozen values of each weight are looked up, once for each
        array; of `ShapeDtypeStruct`s, only paths, shapes and dtypes are recorded.

    Raises:
      CheckpointError: if it is no adapter, or not one of `base`; if something else is saved at `path`; if it cannot
        be written, as on a full disk.
    """
    args = AdapterSave(adapter, base=base)
    _ = args.manifest  # if anything is wrong, it shows before a file is touched
    root = _absolute(path)
    step = _newest(root)
    _refuse_others(root)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(1),
        cleanup_tmp_directories=True,  # of saves that were killed
        enable_async_checkpointing=False,
        # All managers name their barriers alike, and one of the user's may be saving in the background.
        multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix="lora_jax"),
    )
    try:
        with ocp.CheckpointManager(root, options=options) as manager:
            manager.save(0 if step is None else step + 1, args=ocp.args.Composite(**{_ITEM: args}))
    except (OSError, ValueError) as error:  # TensorStore says by a ValueError that the disk is full
        raise CheckpointError(
            f"Expected to write a checkpoint; it could not be written, to {root}.\n  {type(error).__name__}: {error}\n"
            "  What was saved there before is whole. Make it possible to write there, and save again."
        ) from error


def restore(path: Path, *, base: Any, shardings: Any = None, allow_base_mismatch: bool = False) -> dict[str, Adapter]:
    """Restores an adapter that `save` wrote, bit for bit.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"query": {"kernel": jnp.ones((4, 3))}}
    >>> adapter = lj.init(jax.random.key(0), params, {"**/kernel": lj.LoRA(rank=2, alpha=4)})
    >>> with tempfile.TemporaryDirectory() as path:
    ...     save(path, adapter, base=params)
    ...     restore(path, base={"query": {"kernel": jnp.zeros((4, 3))}})
    Traceback (most recent call last):
    lora_jax._errors.CheckpointError: Expected `base` to be the one that the adapter in ... was saved with; got another,
    of 1 leaves (it was 1), differences: 1.
      'query/kernel' holds other values
      Load the weights that it was trained on. If others are meant: allow_base_mismatch=True.

    Args:
      path: the path that `save` was given, or the directory of a `CheckpointManager` that keeps an `AdapterSave` as its
        item `adapter`; its newest step counts.
      base: the tree that the adapter will be used with, to be checked against the one that it was saved with: paths,
        shapes, dtypes in JAX and sampled values of adapted leaves and of all floating-point leaves. None: it is not
        checked.
      shardings: one `Sharding` for all arrays, or a tree of them that is a prefix of the adapter, such as
        `{path: sharding, …}` or `jax.tree.map(lambda x: x.sharding, adapter)`. None, in it or instead of it, puts an
        array where `init` does: on the default device, committed to none.
      allow_base_mismatch: takes a base of other values or dtypes (never one of other paths or shapes).

    Returns:
      `{path: Adapter}`.

    Raises:
      CheckpointError: if there is no complete adapter at `path`; if one of its files has changed; if it is of a newer
        format or for another base; if `shardings` do not fit.
    """
    root = _absolute(path)
    args = AdapterRestore(base=base, shardings=shardings, allow_base_mismatch=allow_base_mismatch)
    while True:
        step = _newest(root)
        try:
            return _read(root if step is None else root / str(step) / _ITEM, args)
        except (OSError, ValueError):
            # If another process has saved meanwhile, then what was being read is gone, and there is a newer one.
            if _newest(root) == step:
                raise


class AdapterHandler(ItemHandler):
    """Writes and reads one adapter for Orbax.

    Orbax finds it by `AdapterSave` and `AdapterRestore`; there is no need to name it.
    """

    description = "adapter.json"

    def parts(self, args: AdapterSave) -> tuple[dict[str, Any], str]:
        """The adapter and its manifest."""
        return dict(args.adapter), dumps(args.manifest)

    def restore(self, directory: epath.Path, args: AdapterRestore) -> dict[str, Adapter]:
        """Checks the files, then the base, and reads the arrays to where they shall be."""
        manifest = loads(self.verified(directory), directory)
        if args.base is not None:
            check_base(manifest, args.base, allow_base_mismatch=args.allow_base_mismatch, where=directory)
        target = placed(skeleton(manifest, directory), args.shardings, directory)
        adapter: dict[str, Adapter] = jax.tree.map(settled, self.read(directory, target))
        return adapter

    def metadata(self, directory: epath.Path) -> Manifest:
        """The manifest."""
        return loads((directory / self.description).read_bytes(), directory)


@ocp.args.register_with_handler(AdapterHandler, for_save=True)
@dataclasses.dataclass(eq=False)
class AdapterSave(ocp.args.CheckpointArgs):  # type: ignore[misc]
    """Saves an adapter as one item of a `CheckpointManager`, beside optimizer state, step and key.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax as lj, optax, orbax.checkpoint as ocp
    >>> from lora_jax.checkpoint import AdapterRestore, AdapterSave, StateRestore, StateSave
    >>> params = {"query": {"kernel": jnp.ones((4, 3))}}
    >>> adapter = lj.init(jax.random.key(0), params, {"**/kernel": lj.LoRA(rank=2, alpha=4)})
    >>> state = {"opt_state": optax.adam(1e-3).init(adapter), "step": 7, "key": jax.random.key(1)}
    >>> with tempfile.TemporaryDirectory() as path, ocp.CheckpointManager(path) as manager:
    ...     items = {"adapter": AdapterSave(adapter, base=params), "state": StateSave(state)}
    ...     _ = manager.save(7, args=ocp.args.Composite(**items))
    ...     manager.wait_until_finished()
    ...     items = {"adapter": AdapterRestore(base=params), "state": StateRestore(state)}
    ...     restored = manager.restore(7, args=ocp.args.Composite(**items))
    >>> restored.adapter["query/kernel"], restored.state["step"]
    (Adapter(LoRA(rank=2, alpha=4), 'io', a=float32[4, 2], b=float32[2, 3]), 7)

    Attributes:
      adapter: from `init`, `restore` or training.
      base: the tree that the adapter was made from, as in `save`.

    Raises:
      CheckpointError: if it is no adapter, or not one of `base`.
    """

    adapter: Adapters
    base: Any = dataclasses.field(kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Checks the adapter here: an error in the middle of Orbax's save would leave threads behind."""
        check_savable(self.adapter, self.base)

    @functools.cached_property
    def manifest(self) -> Manifest:
        """What is written beside the arrays; made when first asked for, as a manager skips most of the steps."""
        return describe(self.adapter, self.base)


@ocp.args.register_with_handler(AdapterHandler, for_restore=True)
@dataclasses.dataclass(eq=False, kw_only=True)
class AdapterRestore(ocp.args.CheckpointArgs):  # type: ignore[misc]
    """Restores an adapter that is an item of a `CheckpointManager`; see `AdapterSave`.

    Attributes:
      base: as in `restore`.
      shardings: as in `restore`.
      allow_base_mismatch: as in `restore`.
    """

    base: Any = dataclasses.field(repr=False)
    shardings: Any = None
    allow_base_mismatch: bool = False


def _read(item: epath.Path, args: AdapterRestore) -> dict[str, Adapter]:
    if not item.is_dir():
        raise nothing_there(item)
    with ocp.Checkpointer(AdapterHandler()) as checkpointer:
        restored: dict[str, Adapter] = checkpointer.restore(item, args=args)
    return restored


def _absolute(path: Path) -> epath.Path:
    return epath.Path(path).expanduser().absolute()


def _newest(root: epath.Path) -> int | None:
    """The newest complete step in a directory."""
    if not root.is_dir():
        return None
    newest = ocp.path.step.latest_step_metadata(root, ocp.path.step.standard_name_format())
    return None if newest is None else int(newest.step)


def _refuse_others(root: epath.Path) -> None:
    """Raises if a save to `root` would delete what `save` has not written."""
    if root.exists() and not root.is_dir():
        raise CheckpointError(f"Expected a directory to save to; got a file, {root}.\n  Give another path.")
    steps = [entry for entry in root.iterdir() if entry.name.isdigit() and entry.is_dir()] if root.exists() else []
    others = sorted({name for step in steps for name in _strangers(step)})
    if others:
        raise CheckpointError(
            f"Expected a directory for this adapter alone; {root} holds numbered directories with "
            f"{', '.join(map(repr, others))}, which this save would delete.\n"
            "  Give another path, or put `lora_jax.checkpoint.AdapterSave` into the CheckpointManager that wrote them."
        )


def _strangers(step: epath.Path) -> set[str]:
    """What `save` has not put into a step; of a step whose deletion was cut short, anything may be left."""
    whole = (step / _ITEM).exists()
    names = {entry.name for entry in step.iterdir() if entry.is_dir() or not whole}
    return names - {_ITEM, *LATER}
