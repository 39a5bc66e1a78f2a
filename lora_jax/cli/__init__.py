"""The `lora-jax` command, which looks into adapters, compares, verifies, converts and merges them.

`main` is its entry point. The command line needs the extra `cli`, `pip install "lora_jax[cli]"`; importing this module
does not.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence

import jax

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    >>> main(["--version"])
    0.1.0
    0

    Args:
      arguments: those of the command, such as `["inspect", "my_adapter"]`. None takes them from the command line, and
        computes on the CPU unless `JAX_PLATFORMS` is set, so that no accelerator is occupied.

    Returns:
      The exit code: 0 if all is well, 1 if adapters differ or one is invalid, 2 for wrong arguments.
    """
    if missing := [name for name in ("cyclopts", "rich") if importlib.util.find_spec(name) is None]:
        print(f'lora-jax needs {" and ".join(missing)}: pip install "lora_jax[cli]"', file=sys.stderr)
        return 2
    from ._app import run

    if arguments is None:
        if "JAX_PLATFORMS" not in os.environ:
            jax.config.update("jax_platforms", "cpu")
        arguments = sys.argv[1:]
    return run(arguments)
