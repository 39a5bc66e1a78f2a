"""Weights for the experts of a kernel at each token: who computes them, and from what.

    y = x·W0 + (((x·A)·s) ⊙ g(x))·B

The columns of `A` belong to experts, in order, and `g` has one weight for each token and expert.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from jax import Array

Source = Literal["activation", "caller", "constant"]


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Router(abc.ABC):
    """How the experts of a mixture are weighted: an immutable value without arrays.

    Attributes:
      source: what the weights depend on: the activation of the kernel, an argument of the adapted function, or neither.
      per_layer: whether the weights from the caller start with the batch axes of the kernel.
      standardizes: whether the activation is divided by its standard deviation over the inputs of each token.
    """

    source: ClassVar[Source]
    standardizes: ClassVar[bool] = False
    per_layer: ClassVar[bool] = False

    def __repr__(self) -> str:
        """Shows the fields that differ from their defaults."""
        chosen = [field for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        return f"{type(self).__name__}({', '.join(f'{field.name}={getattr(self, field.name)!r}' for field in chosen)})"

    @abc.abstractmethod
    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """Returns the kernel axis of each axis of the router's arrays, by name, with `RANK` for the experts."""

    def prototypes(self, arrays: Mapping[str, Array], axes: str) -> Array | None:
        """Returns `p`, (batch…, in…, experts), for routers that read the activation; None for others."""
        del arrays, axes
        return None

    def weights(self, logits: Array) -> Array:
        """Returns the weights for `x·p`; both have the shape (tokens…, experts)."""
        del logits
        raise NotImplementedError(type(self).__name__)


@dataclasses.dataclass(frozen=True)
class Experts:
    """Consecutive experts of one kernel, whose weights have one source.

    Attributes:
      ranks: the rank of each.
      source: what their weights depend on; `"constant"` is a weight of 1.
      router: computes the weights from the activation; None for other sources.
    """

    ranks: tuple[int, ...]
    source: Source
    router: Router | None = None


def count(experts: tuple[Experts, ...], source: Source) -> int:
    """Returns the number of experts whose weights have a source.

    >>> count((Experts((2, 2), "caller"), Experts((4,), "constant")), "caller")
    2
    """
    return sum(len(group.ranks) for group in experts if group.source == source)
