"""What a member of the zoo is."""

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
      params: what it is called with.
      args: the rest of the call; a batch first.
      spec: what is adapted.
    """

    apply: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    spec: Spec


Make = Callable[[jax.Array, Any], Model]


def framework(name: str) -> Any:
    """A module of the extra `models`; without it, the test is skipped."""
    return pytest.importorskip(name, reason=f"needs {name}, of the extra `models`")
