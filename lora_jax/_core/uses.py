"""How a model uses its leaves: data that `kernels` and `explain` gather, and that `init` takes axes from."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple


class Evidence(NamedTuple):
    """How much a use of a leaf says of the roles of its axes; of two, the greater says more.

    Attributes:
      meets: what the leaf is used with: 2 is the model's activations; 1 is activations that the leaf itself has a part
        in, as a head has that is tied to an embedding; 0 is neither, as in the power iteration for a norm of the leaf.
      forward: whether the model has the operation; not, if it is from a derivative that JAX takes backwards inside the
        model, which contracts the outputs.
    """

    meets: int
    forward: bool


_CONSTANT = Evidence(0, forward=True)


@dataclasses.dataclass(frozen=True)
class Use:
    """How one equation consumes a leaf.

    Attributes:
      path: the leaf.
      primitive: the equation's primitive.
      kind: the form of a contraction, `"factored"`, `"hybrid"` or `"merged"`; `"materialized"` (on request), or
        `"opaque"` (read as a whole, by an operation without a rule).
      axes: for each axis of the kernel as it stood there, what is known of it (`TrackedKernel.roles`) and its role in
        this use; None where the use gives no roles.
      times: how often it runs in one call; a `while` body counts once.
      operations: floating-point operations that the factors add, all times together.
      line: the user's line.
      evidence: how much it says of the roles of the leaf's axes.
      live: whether a result of the call depends on it.
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


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A leaf, as the traced model uses it.

    Attributes:
      shape: of the leaf.
      dtype: of the leaf.
      axes: the role of each axis (`b` batch, `i` input, `o` output); None if the uses do not tell.
      uses: every use, in the order of the program.
      unknown: why there are no axes.
      kind: `"attention"`, `"mlp"`, `"head"`, `"embedding"`, `"convolution"`, `"bias"` or `"norm"`, as
        `lora_jax.targets` describes them; None for none of these.
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: str | None
    uses: tuple[Use, ...]
    unknown: str = ""
    kind: str | None = None
