"""How a model uses its leaves: the data that `kernels` and `explain` collect. `init` reads the axes from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Evidence(NamedTuple):
    """How reliably a use shows the roles of the axes of a leaf. A greater value is more reliable.

    Attributes:
      operand: what the leaf is multiplied with: 2 for activations; 1 for activations that depend on the leaf itself, as
        with a head that is tied to an embedding; 0 for anything else, as in a power iteration for a norm of the leaf.
      forward: whether the use is in the forward pass. Reverse-mode derivatives inside the model contract the outputs.
    """

    operand: int
    forward: bool


_CONSTANT = Evidence(0, forward=True)


@dataclasses.dataclass(frozen=True)
class Use:
    """How one equation consumes a leaf.

    Attributes:
      path: the leaf.
      primitive: the equation's primitive.
      kind: `"factored"`, `"hybrid"` or `"merged"` for a contraction; `"materialized"`, or `"opaque"` for an operation
        without a rule that reads the whole leaf.
      axes: for each axis of the kernel at this equation, its entry of `TrackedKernel.roles` and its role in this use;
        None if the use shows no roles.
      times: how often the equation runs in one call; a `while` body counts once.
      flops: FLOPs that the factors add, for all runs.
      line: the user's line.
      evidence: how reliably the use shows the roles of axes.
      live: whether a result of the call depends on the use.
      groups: the feature groups of a convolution; otherwise 1.
    """

    path: str
    primitive: str
    kind: str
    axes: tuple[tuple[Any, str], ...] | None
    times: int
    flops: int
    line: str
    evidence: Evidence = _CONSTANT
    live: bool = True
    groups: int = 1


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How the traced model uses a leaf.

    Attributes:
      shape: of the leaf.
      dtype: of the leaf.
      axes: the role of each axis (`b` batch, `i` input, `o` output); None if the uses do not determine them.
      uses: all uses, in the order of the program.
      unknown: why `axes` is None.
      kind: `"attention"`, `"mlp"`, `"head"`, `"embedding"`, `"convolution"`, `"bias"` or `"norm"`, as described
        in `lora_jax.targets`; None for other leaves.
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: str | None
    uses: tuple[Use, ...]
    unknown: str = ""
    kind: str | None = None

    def cells(self) -> dict[str, str]:
        """Returns the text of each column of a table."""
        return {
            "shape": "×".join(map(str, self.shape)),
            "dtype": str(self.dtype),
            "axes": self.axes or "-",
            "kind": self.kind or "-",
            "used": counted_uses(self.uses, lambda use: use.primitive),
        }


def counted_uses(uses: Sequence[Use], name: Callable[[Use], str]) -> str:
    """Formats uses with their names, like `factored dot_general ×24, materialized mul ×1`."""
    times: dict[str, int] = {}
    for use in uses:
        times[name(use)] = times.get(name(use), 0) + use.times
    return ", ".join(f"{name} ×{count}" for name, count in times.items()) or NEVER_USED


NEVER_USED = "never used"
