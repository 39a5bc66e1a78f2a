"""The library's count of operations, on the versions of JAX that the library itself does not run on, too."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import jax

if jax.__version_info__ < (0, 10):
    # The count needs three types of JAX's and nothing else; older versions have them in another place.
    package, compat = types.ModuleType("lora_jax"), types.ModuleType("lora_jax._compat")
    package.__path__ = [str(Path(__file__).parents[2] / "lora_jax")]
    compat.ClosedJaxpr, compat.Jaxpr, compat.JaxprEqn = jax.core.ClosedJaxpr, jax.core.Jaxpr, jax.core.JaxprEqn
    sys.modules |= {"lora_jax": package, "lora_jax._compat": compat}

count = importlib.import_module("lora_jax._report.flops").flops


def flops(fn: Any, *args: Any) -> int:
    """Counts a call's floating-point operations on its jaxpr, the bodies of loops times their length."""
    return int(count(jax.make_jaxpr(fn)(*args)))
