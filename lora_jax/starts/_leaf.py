"""What every start acts on: one adapted leaf as a stack of matrices, and a new adapter made of new factors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax import Array

from .._core.adapter import Adapter, Adapters
from .._core.attach import check
from .._core.axes import width
from .._core.linalg import as_factors, kernel_matrix
from .._core.paths import flatten, unflatten
from .._core.variant import LowRank
from .._errors import AdapterError, SpecError, listed
from .._merge.fold import overflows, unfold


class Start(NamedTuple):
    """What a start returns.

    Attributes:
      params: the parameters that belong to the adapter: those that were given, or, where the start takes its factors
        out of the base, a tree in which the adapted kernels are what is left, `W0 - s·A·B`.
      adapter: with new factors; leaves that are trained whole keep their copy.
    """

    params: Any
    adapter: dict[str, Adapter]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One adapted kernel, its input axes taken as one, and its output axes, and its batch axes.

    Attributes:
      path: where it is.
      w: the kernel.
      part: its adapter.
    """

    path: str
    w: Any
    part: Adapter

    @property
    def variant(self) -> LowRank:
        """Its method, which has a rank and a scale."""
        assert isinstance(self.part.variant, LowRank)
        return self.part.variant

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(layers, in, out)`."""
        layers, d_in, d_out = (width(self.part.axes, self.w.shape, role) for role in "bio")
        return layers, d_in, d_out

    @property
    def matrices(self) -> Array:
        """The kernel, `(layers, in, out)`, in float32 or what is wider."""
        return self.as_matrices(self.w)

    def as_matrices(self, array: Any) -> Array:
        """An array of the kernel's shape, `(layers, in, out)`, in float32 or what is wider."""
        return kernel_matrix(array, self.part.axes).reshape(self.shape)

    def adapter(self, a: Array, b: Array) -> Adapter:
        """The adapter with factors `(layers, in, rank)` and `(layers, rank, out)`, whose rank may be another."""
        part = self.part
        new = {name: x.astype(part.arrays[name].dtype) for name, x in as_factors(a, b, part.axes, self.w.shape).items()}
        return Adapter(self.variant.at_rank(a.shape[-1]), part.axes, **{**part.arrays, **new})

    def error(self, text: str) -> SpecError:
        """What is wrong with this leaf's variant for a start."""
        return SpecError(f"At {self.path!r}: {text}.")


Method = Callable[[Leaf], tuple[Array, Array]]


def start(params: Any, adapter: Adapters, method: Method, *, moves: bool = False) -> Start:
    """Gives each low-rank adapter the factors of a method, which a base that moves loses.

    Args:
      params: the base.
      adapter: from `init`.
      method: the factors of a leaf, `(layers, in, rank)` and `(layers, rank, out)`.
      moves: whether the factors are taken out of the base.
    """
    leaves, treedef = flatten(params)
    adapted = low_rank_leaves(adapter, leaves)
    for leaf in adapted:
        if leaf.variant.diagonal(leaf.part.arrays) is not None:  # zero at the start: b would never learn, nor a
            raise leaf.error(f"expected a variant whose update is s·A·B alone; {leaf.variant} has a start of its own")
    with jax.default_matmul_precision("highest"):  # accelerators would multiply float32 in bfloat16
        new = dict(adapter) | {leaf.path: leaf.adapter(*method(leaf)) for leaf in adapted}
    if not moves:
        return Start(params, new)
    for leaf in adapted:
        if leaf.variant.some_tokens:
            raise leaf.error(f"expected a variant for every token, as the base is moved for all; got {leaf.variant}")
    # By the factors as they are kept: what rounding took from them stays in the base.
    moved = {leaf.path: unfold(leaf.w, new[leaf.path]) for leaf in adapted}
    if bad := overflows(leaves, new, moved, unfolded=True):
        raise AdapterError(
            f"Expected what is left of each kernel to fit its dtype; {len(bad)} overflow.\n{listed(bad)}\n"
            "  Cast the base to a wider dtype before, such as bfloat16 or float32."
        )
    return Start(unflatten(treedef, leaves | moved), new)


def low_rank_leaves(adapter: Adapters, leaves: Mapping[str, Any]) -> list[Leaf]:
    """The leaves that have factors."""
    check(leaves, adapter)
    return [Leaf(path, leaves[path], part) for path, part in adapter.items() if isinstance(part.variant, LowRank)]


def positive_scale(leaf: Leaf) -> float:
    """The scale, where a method divides by it or takes its root."""
    if not (leaf.variant.scale > 0 and math.isfinite(leaf.variant.scale)):
        raise leaf.error(f"expected a positive scale, which is divided by; got {leaf.variant}")
    return leaf.variant.scale
