"""Saves and restores an adapter, by itself or as an item of an Orbax `CheckpointManager`."""

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
from ._arrays import to_jax
from ._checksums import UNCHECKED
from ._item import ItemHandler, no_checkpoint
from ._manifest import Manifest, abstract, check_base, check_savable, describe, dumps, loads, restore_targets

Path = str | os.PathLike[str]

_ITEM = "adapter"


def save(path: Path, adapter: Adapters, *, base: Any) -> None:
    """Saves an adapter, with a manifest to restore it without a template and a fingerprint of its base.

    An existing checkpoint at `path` is deleted only after the new one is complete.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"query": {"kernel": jnp.ones((4, 3))}}
    >>> adapter = lj.init(jax.random.key(0), params, {"**/kernel": lj.LoRA(rank=2, alpha=4)})
    >>> with tempfile.TemporaryDirectory() as path:
    ...     save(path, adapter, base=params)
    ...     restore(path, base=params)
    {'query/kernel': Adapter(LoRA(rank=2, alpha=4), 'io', a=float32[4, 2], b=float32[2, 3])}

    Args:
      path: a directory on any file system that Orbax can write; created if missing. An adapter that was saved there
        is replaced.
      adapter: from `init`, `restore` or training.
      base: the tree that the adapter was initialized for. Up to 64 values of each weight are read, once per array. Of
        `ShapeDtypeStruct`s, only paths, shapes and dtypes are recorded.

    Raises:
      CheckpointError: if `adapter` is not an adapter, or does not belong to `base`; if `path` contains other data; if
        writing fails, for example because the disk is full.
    """
    args = AdapterSave(adapter, base=base)
    _ = args.manifest  # raises before any file is written
    root = _absolute(path)
    step = _latest(root)
    _refuse_others(root)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(1),
        cleanup_tmp_directories=True,  # from saves that were killed
        enable_async_checkpointing=False,
        # Barriers of all managers have the same names by default, and another manager may save in the background.
        multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix="lora_jax"),
    )
    try:
        with ocp.CheckpointManager(root, options=options) as manager:
            manager.save(0 if step is None else step + 1, args=ocp.args.Composite(**{_ITEM: args}))
    except (OSError, ValueError) as error:  # TensorStore raises ValueError if the disk is full
        raise CheckpointError(
            f"Cannot write a checkpoint to {root}.\n  {type(error).__name__}: {error}\n"
            "  A previous checkpoint is still complete. Make the directory writable or free space, and save again."
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
    lora_jax._errors.CheckpointError: Expected `base` to be the base that the adapter in ... was saved with; got another
    one, with 1 leaves (saved: 1) and 1 difference.
      'query/kernel' has other values
      Load the base that the adapter was trained on, or pass allow_base_mismatch=True to use this one.

    Args:
      path: the path that `save` wrote to, or the directory of a `CheckpointManager` with an `AdapterSave` as item
        `adapter`, whose latest step is restored.
      base: the tree that the adapter will be used with. It is compared with the base that the adapter was saved with:
        paths, shapes, dtypes in JAX, and sampled values of the adapted and all floating-point leaves; for quantized
        leaves the format, and sampled codes and scales. None skips the comparison.
      shardings: one `Sharding` for all arrays, or a tree of them that is a prefix of the adapter, such as
        `{path: sharding, …}` or `jax.tree.map(lambda x: x.sharding, adapter)`. Arrays without a sharding (None) are
        uncommitted on the default device, like those of `init`.
      allow_base_mismatch: allows a base with other values, dtypes or formats, but not with other paths or shapes.

    Returns:
      `{path: Adapter}`.

    Raises:
      CheckpointError: if there is no complete adapter at `path`; if one of its files has changed; if it has a newer
        format or belongs to another base; if `shardings` do not fit.
    """
    root = _absolute(path)
    args = AdapterRestore(base=base, shardings=shardings, allow_base_mismatch=allow_base_mismatch)
    while True:
        step = _latest(root)
        try:
            return _read(_item(root, step), args)
        except (OSError, ValueError):
            # Another process may have saved a newer step and deleted this one in the meantime.
            if _latest(root) == step:
                raise


def manifest(path: Path) -> dict[str, Any]:
    """Reads what a checkpoint states about its adapter and its base, without the arrays.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"query": {"kernel": jnp.ones((4, 3))}}
    >>> adapter = lj.init(jax.random.key(0), params, {"**/kernel": lj.LoRA(rank=2, alpha=4)})
    >>> with tempfile.TemporaryDirectory() as path:
    ...     save(path, adapter, base=params)
    ...     found = manifest(path)
    >>> found["adapter"]["query/kernel"]["axes"], found["base"]["query/kernel"]["shape"]
    ('io', [4, 3])

    Args:
      path: as in `restore`.

    Returns:
      The manifest: `"adapter"` has the variant, the axes, and the shapes and dtypes of the arrays for each path;
      `"base"` the shape and dtype of each leaf, and a digest of samples of its values.

    Raises:
      CheckpointError: if there is no adapter at `path`, or the manifest is damaged or has a newer format.
    """
    root = _absolute(path)
    item = _item(root, _latest(root))
    if not (text := item / AdapterHandler.description).exists():
        raise no_checkpoint(item)
    return loads(text.read_bytes(), item)


class AdapterHandler(ItemHandler):
    """Orbax's handler for one adapter; Orbax selects it by `AdapterSave` and `AdapterRestore`."""

    description = "adapter.json"

    def parts(self, args: AdapterSave) -> tuple[dict[str, Any], str]:
        """Returns the arrays and the manifest."""
        return dict(args.adapter), dumps(args.manifest)

    def restore(self, directory: epath.Path, args: AdapterRestore) -> dict[str, Adapter]:
        """Verifies the files, checks the base, and reads the arrays to their devices."""
        manifest = loads(self.verified(directory), directory)
        if args.base is not None:
            check_base(manifest, args.base, allow_base_mismatch=args.allow_base_mismatch, where=directory)
        target = restore_targets(abstract(manifest, directory), args.shardings, directory)
        adapter: dict[str, Adapter] = jax.tree.map(to_jax, self.read(directory, target))
        return adapter

    def metadata(self, directory: epath.Path) -> Manifest:
        """Returns the manifest."""
        return loads((directory / self.description).read_bytes(), directory)


@ocp.args.register_with_handler(AdapterHandler, for_save=True)
@dataclasses.dataclass(eq=False)
class AdapterSave(ocp.args.CheckpointArgs):  # type: ignore[misc]
    """Saves an adapter as one item of a `CheckpointManager`.

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
      base: the tree that the adapter was initialized for, as in `save`.

    Raises:
      CheckpointError: if `adapter` is not an adapter, or does not belong to `base`.
    """

    adapter: Adapters
    base: Any = dataclasses.field(kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Checks the adapter now, because an error during Orbax's save would leave threads running."""
        check_savable(self.adapter, self.base)

    @functools.cached_property
    def manifest(self) -> Manifest:
        """The manifest; computed on first use, because a manager skips most steps."""
        return describe(self.adapter, self.base)


@ocp.args.register_with_handler(AdapterHandler, for_restore=True)
@dataclasses.dataclass(eq=False, kw_only=True)
class AdapterRestore(ocp.args.CheckpointArgs):  # type: ignore[misc]
    """Restores an adapter from an item of a `CheckpointManager`; see `AdapterSave`.

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
        raise no_checkpoint(item)
    with ocp.Checkpointer(AdapterHandler()) as checkpointer:
        restored: dict[str, Adapter] = checkpointer.restore(item, args=args)
    return restored


def _absolute(path: Path) -> epath.Path:
    return epath.Path(path).expanduser().absolute()


def _latest(root: epath.Path) -> int | None:
    """Returns the latest complete step in a directory."""
    if not root.is_dir():
        return None
    latest = ocp.path.step.latest_step_metadata(root, ocp.path.step.standard_name_format())
    return None if latest is None else int(latest.step)


def _item(root: epath.Path, step: int | None) -> epath.Path:
    """Returns the directory of the adapter of a step; without a step, `root` may be it."""
    return root if step is None else root / str(step) / _ITEM


def _refuse_others(root: epath.Path) -> None:
    """Raises if a save to `root` would delete data that `save` did not write."""
    if root.exists() and not root.is_dir():
        raise CheckpointError(f"Expected a directory to save to; got a file, {root}.\n  Use another path.")
    steps = [entry for entry in root.iterdir() if entry.name.isdigit() and entry.is_dir()] if root.exists() else []
    others = sorted({name for step in steps for name in _other_entries(step)})
    if others:
        raise CheckpointError(
            f"Expected a directory that only `save` writes to; {root} contains numbered directories with "
            f"{', '.join(map(repr, others))}, which this save would delete.\n"
            "  Use another path, or add a `lora_jax.checkpoint.AdapterSave` to the CheckpointManager that wrote them."
        )


def _other_entries(step: epath.Path) -> set[str]:
    """Returns the entries of a step that `save` did not write. A step without the adapter may contain loose files."""
    has_adapter = (step / _ITEM).exists()
    names = {entry.name for entry in step.iterdir() if entry.is_dir() or not has_adapter}
    return names - {_ITEM, *UNCHECKED}
