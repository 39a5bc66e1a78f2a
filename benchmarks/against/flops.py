"""The library's FLOP counter, also for JAX versions that the library does not support."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import jax

if jax.__version_info__ < (0, 10):
    # The counter imports only three types of `_compat`, which older versions have in another module.
    package, compat = types.ModuleType("lora_jax"), types.ModuleType("lora_jax._compat")
    package.__path__ = [str(Path(__file__).parents[2] / "lora_jax")]
    compat.ClosedJaxpr, compat.Jaxpr, compat.JaxprEqn = jax.core.ClosedJaxpr, jax.core.Jaxpr, jax.core.JaxprEqn
    sys.modules |= {"lora_jax": package, "lora_jax._compat": compat}

count = importlib.import_module("lora_jax._report.flops").flops


def flops(fn: Any, *args: Any) -> int:
    """Returns the FLOPs of a call, counted on its jaxpr, loop bodies times their number of iterations."""
    return int(count(jax.make_jaxpr(fn)(*args)))
