"""How a model uses its leaves: data that `kernels` and `explain` gather, and that `init` takes axes from."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Use:
    """How one equation consumes a leaf.

    Attributes:
      path: the leaf.
      primitive: the equation's primitive.
      kind: the form of a contraction, `"factored"`, `"hybrid"` or `"merged"`; `"dense"` (formed on request), or
        `"opaque"` (read whole, by an operation without a rule).
      axes: for each axis of the kernel as it stood there, its label in `AdaptedKernel.roles` and its role in this use;
        None where the use gives no roles.
      times: how often it runs in one call; a `while` body counts once.
      operations: floating-point operations that the factors add, all times together.
      line: the user's line.
    """

    path: str
    primitive: str
    kind: str
    axes: tuple[tuple[str, str], ...] | None
    times: int
    operations: int
    line: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A leaf, as the traced model uses it.

    Attributes:
      shape: of the leaf.
      dtype: of the leaf.
      axes: the role of each axis (`b` batch, `i` input, `o` output), by the first use that says; None if none does.
      uses: every use, in the order of the program.
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: str | None
    uses: tuple[Use, ...]
