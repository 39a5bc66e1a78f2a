"""The interface of the models of the zoo."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import pytest

from lora_jax import LoRA

Spec = dict[str, Any]
LORA = LoRA(rank=2, alpha=4)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and a call of it.

    Attributes:
      apply: `apply(params, *args)`.
      params: the parameters.
      args: the other arguments; a batch first.
      spec: the spec of the adapter.
    """

    apply: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    spec: Spec


Make = Callable[[jax.Array, Any], Model]


def framework(name: str) -> Any:
    """Imports a module of the extra `models`; skips the test if it is missing."""
    return pytest.importorskip(name, reason=f"needs {name}, of the extra `models`")
