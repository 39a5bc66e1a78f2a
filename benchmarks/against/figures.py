"""What is measured of a step, and of a trial: needs nothing but Python."""

from __future__ import annotations

import dataclasses
import sys
import time

START = time.perf_counter()


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a training step costs; None where it cannot be measured.

    Attributes:
      steps: seconds of each step; the methods of an environment take turns.
      operations: floating-point operations, the bodies of loops times their length.
      temporary: bytes beside arguments and results.
      optimizer: bytes of the state of the optimizer.
      compile: seconds to trace, lower and compile, each time; likewise in turns.
      loss: of the first step.
    """

    steps: list[float]
    flops: int | None
    temporary: int | None
    optimizer: int
    compile: list[float] | None
    loss: float


class UnfitError(Exception):
    """A library that has no place for an adapter; the words are ours, not the library's."""


def first_line(error: Exception) -> str:
    """An error in one line of moderate length."""
    name = "" if isinstance(error, UnfitError) else f"{type(error).__name__}: "
    line = f"{name}{str(error).strip()}".split("\n")[0]
    return line if len(line) <= 160 else f"{line[:159]}…"


def progress(text: str) -> None:
    """Says what is being done, and how long it has been going on."""
    print(f"{time.perf_counter() - START:5.0f} s  {text}", file=sys.stderr, flush=True)
