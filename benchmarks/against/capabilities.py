"""What a library can adapt: each is tried on a small program, and compared with the kernels formed."""

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
    """Numbers that tell whether two methods are the same, whatever the form and the scale of their factors.

    Attributes:
      loss: at the values of the case.
      slope: of the loss, when all that is trained grows by one factor: Σ g·x.
      size: Σ |g·x|, by which the slope is judged.
      tolerance: relative.
    """

    loss: float
    slope: float
    size: float
    tolerance: float

    def agrees(self, other: Outcome) -> bool:
        """Whether the two are the same to the accuracy of their dtype."""
        return abs(self.loss - other.loss) <= self.tolerance * abs(other.loss) and (
            abs(self.slope - other.slope) <= 10 * self.tolerance * other.size
        )


def outcome(method: Method, case: Case) -> Outcome:
    """Evaluates the loss and its gradient."""
    loss, gradient = jax.jit(jax.value_and_grad(method.loss))(method.trained, method.frozen, case.inputs)
    leaves = zip(*map(jax.tree_util.tree_leaves, (gradient, method.trained)), strict=True)
    products = [one.astype(jnp.float32) * other.astype(jnp.float32) for one, other in leaves]
    half = any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree_util.tree_leaves(case.params))
    slope, size = (sum(float(jnp.sum(of(x))) for x in products) for of in (jnp.asarray, jnp.abs))
    return Outcome(float(loss), slope, size, 2e-3 if half else 1e-5)


@functools.cache
def program(what: str) -> tuple[Case, Outcome]:
    """A program, and what it gives with its kernels formed."""
    case = CAPABILITIES[what]()
    return case, outcome(merged(case), case)


def tried(build: Callable[[Case], Method], what: str) -> str:
    """Yes, or why not."""
    case, expected = program(what)
    try:
        method = build(case)
        if not outcome(method, case).agrees(expected):
            return "runs, but computes another function"
    except Exception as error:  # of any library
        return first_line(error)
    dtypes = {leaf.dtype.name for leaf in jax.tree_util.tree_leaves(method.trained)}
    return YES if dtypes == {"float32"} else f"the adapter is in {', '.join(sorted(dtypes))}"


def merging(peer: Any) -> str:
    """Whether the model as it stands gives the loss of the adapted one, once the adapter is merged."""
    case, expected = program("matrices")
    if not hasattr(peer, "merge"):
        return "has no function for it"
    try:
        loss = float(case.loss(case.apply(peer.merge(case), case.inputs), case.inputs))
    except Exception as error:
        return first_line(error)
    return YES if expected._replace(loss=loss).agrees(expected) else "gives another function"


def capabilities(name: str, peer: Any) -> dict[str, str]:
    """Tries everything with one library."""
    found = {}
    for what in CAPABILITIES:
        progress(f"try {what}: {name}")
        found[what] = tried(peer.build, what)
        if found[what] != YES and hasattr(peer, "dense") and tried(peer.dense, what) == YES:
            found[what] = "only if told that it may form the kernel"
    return found | {MERGING: merging(peer)}
