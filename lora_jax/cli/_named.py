"""Objects that an argument names: mappings, and parameters of a base."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import peft
from ..peft._orbax import orbax_leaves
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
    if next(Path(name).glob("*.safetensors"), None):
        raise UsageError(
            "Expected parameters for a checkpoint: the directory of an Orbax checkpoint, or package.module:function; "
            f"{name} is a torch model."
        )
    if Path(name).exists() or ":" not in name:
        return {path: leaf.read() for path, leaf in orbax_leaves(Path(name)).items()}
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
