"""What a library can adapt: small programs, compared with the same programs with materialized kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from decoder import Method

from .by_hand import merged
from .cases import CAPABILITIES, Case
from .figures import first_line, progress

YES = "yes"
MERGING = "merging back"


class Outcome(NamedTuple):
    """Values that are equal for equivalent methods, whatever the layout and scale of their factors.

    Attributes:
      loss: the loss at the values of the case.
      slope: Σ g·x over the trained arrays x and their gradients g.
      size: Σ |g·x|, to which differences of slopes are relative.
      tolerance: the relative tolerance.
    """

    loss: float
    slope: float
    size: float
    tolerance: float

    def agrees(self, other: Outcome) -> bool:
        """Returns whether both are equal within the tolerance."""
        return abs(self.loss - other.loss) <= self.tolerance * abs(other.loss) and (
            abs(self.slope - other.slope) <= 10 * self.tolerance * other.size
        )


def outcome(method: Method, case: Case) -> Outcome:
    """Evaluates the loss and its gradient."""
    loss, gradient = jax.jit(jax.value_and_grad(method.loss))(method.trained, method.frozen, case.inputs)
    leaves = zip(*map(jax.tree_util.tree_leaves, (gradient, method.trained)), strict=True)
    products = [one.astype(jnp.float32) * other.astype(jnp.float32) for one, other in leaves]
    half = any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree_util.tree_leaves(case.params))
    slope, size = (sum(float(jnp.sum(function(x))) for x in products) for function in (jnp.asarray, jnp.abs))
    return Outcome(float(loss), slope, size, 2e-3 if half else 1e-5)


@functools.cache
def program(name: str) -> tuple[Case, Outcome]:
    """Returns a program, and its outcome with materialized kernels."""
    case = CAPABILITIES[name]()
    return case, outcome(merged(case), case)


def support(build: Callable[[Case], Method], name: str) -> str:
    """Returns "yes", or the reason why the library does not support a program."""
    case, expected = program(name)
    try:
        method = build(case)
        if not outcome(method, case).agrees(expected):
            return "runs, but computes another function"
    except Exception as error:  # libraries raise errors of any type
        return first_line(error)
    dtypes = {leaf.dtype.name for leaf in jax.tree_util.tree_leaves(method.trained)}
    return YES if dtypes == {"float32"} else f"the adapter is in {', '.join(sorted(dtypes))}"


def merging(peer: Any) -> str:
    """Returns "yes" if the unmodified model has the expected loss after merging, else the reason."""
    case, expected = program("matrices")
    if not hasattr(peer, "merge"):
        return "has no function to merge"
    try:
        loss = float(case.loss(case.apply(peer.merge(case), case.inputs), case.inputs))
    except Exception as error:
        return first_line(error)
    return YES if expected._replace(loss=loss).agrees(expected) else "computes another function"


def capabilities(name: str, peer: Any) -> dict[str, str]:
    """Tries all programs with one library."""
    found = {}
    for program_name in CAPABILITIES:
        progress(f"try {program_name}: {name}")
        found[program_name] = support(peer.build, program_name)
        if found[program_name] != YES and hasattr(peer, "dense") and support(peer.dense, program_name) == YES:
            found[program_name] = "only if materializing the kernel is allowed"
    return found | {MERGING: merging(peer)}
