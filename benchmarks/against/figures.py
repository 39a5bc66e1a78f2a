"""The measured figures of a step. Imports only the standard library."""

from __future__ import annotations

import dataclasses
import sys
import time

START = time.perf_counter()


@dataclasses.dataclass(frozen=True)
class Figures:
    """The cost of a training step; None for what cannot be measured.

    Attributes:
      steps: seconds of each step; the methods of an environment are interleaved.
      flops: FLOPs, loop bodies times their number of iterations.
      temporary: bytes in addition to arguments and results.
      optimizer: bytes of the optimizer state.
      compile: seconds of each tracing, lowering and compilation; also interleaved.
      loss: the loss of the first step.
    """

    steps: list[float]
    flops: int | None
    temporary: int | None
    optimizer: int
    compile: list[float] | None
    loss: float


class UnfitError(Exception):
    """A library makes no adapter of the needed shape. Raised here, not by the library."""


def first_line(error: Exception) -> str:
    """Returns the first line of an error, truncated."""
    name = "" if isinstance(error, UnfitError) else f"{type(error).__name__}: "
    line = f"{name}{str(error).strip()}".split("\n")[0]
    return line if len(line) <= 160 else f"{line[:159]}…"


def progress(text: str) -> None:
    """Prints the current stage and the elapsed time."""
    print(f"{time.perf_counter() - START:5.0f} s  {text}", file=sys.stderr, flush=True)
