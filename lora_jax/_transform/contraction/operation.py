"""`Contraction`: what the forms, the router and the reports need to know of an operation of `x` and a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jax import Array

from ..._core.contract import Labeled, Labels
from .costs import Costs


class LowRankTerm(Protocol):
    """`x·(s·a·b)` by its factors, with weights for the product of rank r."""

    def __call__(self, x: Array, a: Array, b: Array, weights: Labeled | None = None, /) -> Array: ...


class Contraction(NamedTuple):
    """A bilinear operation of `x` and a kernel.

    Attributes:
      base: `base(x, w)`, the operation.
      low_rank: `low_rank(x, a, b, weights)`, the operation with `s·a·b`, evaluated by its factors. The product of rank
        r is multiplied with the weights unless they are None.
      x_times_a: `x_times_a(x, a)`, the product of rank r with `a` only, in the wider dtype and the highest precision.
      costs: the FLOPs of its products.
      precision: of its products.
      x: the labels of the axes of `x`; an axis that is multiplied with an axis of the kernel has its number.
      y: the labels of the axes of the result.
      contracted: the axes of the kernel that are contracted.
      narrow: whether `x`, the kernel or the result has fewer than 16 bits.
    """

    base: Callable[[Array, Array], Array]
    low_rank: LowRankTerm
    x_times_a: Callable[[Array, Array], Labeled]
    costs: Costs
    precision: Any
    x: Labels
    y: Labels
    contracted: frozenset[int]
    narrow: bool
