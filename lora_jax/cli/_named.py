"""Objects that an argument names: mappings, and parameters of a base."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import peft
from .._errors import CheckpointError
from ..peft._sites import MappingOfRows
from ._report import UsageError


def mapping(name: str | None) -> MappingOfRows:
    """Returns a mapping: a preset such as `smollm2`, or `package.module:function`."""
    if name is None:
        raise UsageError(f"Expected --mapping: {', '.join(peft.presets.__all__)}, or package.module:function.")
    if ":" not in name and name not in peft.presets.__all__:
        raise UsageError(f"Expected {', '.join(peft.presets.__all__)} or package.module:function; got {name!r}.")
    rows = _object(name) if ":" in name else getattr(peft.presets, name)()
    if not isinstance(rows, Mapping):
        raise UsageError(f"Expected {name!r} to return a mapping to rows; got {type(rows).__name__}.")
    return rows


def params(name: str) -> Any:
    """Returns parameters: of the Orbax checkpoint in a directory, or those that `package.module:function` returns."""
    if Path(name).exists() or ":" not in name:
        return _restored(Path(name))
    return _object(name)


def _object(name: str) -> Any:
    """Returns what a function returns, or a value; modules of the working directory are found, too."""
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"Expected package.module:function; {name!r} cannot be imported ({error}).") from error
    finally:
        sys.path.remove(os.getcwd())
    return found() if callable(found) else found


def _restored(directory: Path) -> Any:
    import jax
    import orbax.checkpoint as ocp

    path = directory.absolute()
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path).item_metadata.tree
            targets = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            return checkpointer.restore(path, ocp.args.PyTreeRestore(restore_args=targets))
    except Exception as error:  # Orbax raises many types for what is not a checkpoint
        raise CheckpointError(
            f"Expected parameters that Orbax saved, in {directory}; they cannot be read.\n"
            f"  {type(error).__name__}: {str(error)[:300]}\n  package.module:function can return them, too."
        ) from error
