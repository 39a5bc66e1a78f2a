"""Reads the leaves of a tree in an Orbax checkpoint one at a time."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from .._core.paths import flatten
from .._errors import CheckpointError
from ._layout import Values


class OrbaxLeaf(NamedTuple):
    """A leaf of a tree in a checkpoint.

    Attributes:
      directory: of the checkpoint.
      at: the position of the leaf in the tree.
      tree: the tree of Orbax's metadata, as its leaves and their treedef.
    """

    directory: Path
    at: int
    tree: tuple[list[Any], Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(self.tree[0][self.at].shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the array."""
        return np.dtype(self.tree[0][self.at].dtype)

    def read(self) -> Values:
        """Reads the leaf, and no other."""
        import orbax.checkpoint as ocp

        leaves, treedef = self.tree
        places = [ocp.PLACEHOLDER] * len(leaves)
        places[self.at] = np.zeros((), self.dtype)
        args = ocp.args.PyTreeRestore(
            item=jax.tree.unflatten(treedef, places),
            restore_args=jax.tree.unflatten(treedef, [ocp.RestoreArgs(restore_type=np.ndarray)] * len(leaves)),
        )
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                restored = checkpointer.restore(self.directory, args=args)
        except Exception as error:  # Orbax and TensorStore raise many types for missing or damaged files
            raise _unreadable(self.directory, error) from error
        return np.asarray(jax.tree.leaves(restored)[self.at])


def orbax_leaves(directory: Path) -> dict[str, OrbaxLeaf]:
    """Returns the leaves of a tree by path. Orbax stores the `value` of an NNX Variable as a segment, which is omitted.

    Raises:
      CheckpointError: if there is no checkpoint of a tree.
    """
    import orbax.checkpoint as ocp

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(directory.absolute()).item_metadata.tree
    except Exception as error:  # as above
        raise _unreadable(directory, error) from error
    metadata, treedef = flatten(tree)
    end = "/value" if all(path.endswith("/value") for path in metadata) else ""
    leaves = (list(metadata.values()), treedef)
    return {path.removesuffix(end): OrbaxLeaf(directory.absolute(), at, leaves) for at, path in enumerate(metadata)}


def _unreadable(directory: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"Expected an Orbax checkpoint of a tree in {directory}; it cannot be read.\n"
        f"  {type(error).__name__}: {textwrap.shorten(str(error), 300)}\n"
        "  Pass the directory of the tree itself, such as <step>/params of a CheckpointManager."
    )
