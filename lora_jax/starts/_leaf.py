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
from .._core.axes import axes_of_a, axes_of_b, sizes, width
from .._core.linalg import kernel_matrix
from .._core.paths import flatten, unflatten
from .._core.variant import LowRank
from .._errors import AdapterError, SpecError, listed
from .._merge.fold import too_large, unfold


class Start(NamedTuple):
    """What a start returns.

    Attributes:
      adapter: with new factors; leaves that are trained whole keep their copy.
      params: the parameters that belong to it: those that were given, or, where the start takes its factors out of
        the base, a tree in which the adapted kernels are what is left, `W0 - s·A·B`.
    """

    adapter: dict[str, Adapter]
    params: Any


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
        rank, axes, shape = a.shape[-1], self.part.axes, self.w.shape
        a = a.reshape(sizes(axes_of_a(axes), shape, rank)).astype(self.part.a.dtype)
        b = b.reshape(sizes(axes_of_b(axes), shape, rank)).astype(self.part.b.dtype)
        return Adapter(self.variant.at_rank(rank), axes, **{**self.part.arrays, "a": a, "b": b})

    def error(self, text: str) -> SpecError:
        """What is wrong with this leaf's variant for a start."""
        return SpecError(f"At {self.path!r}: {text}.")


Method = Callable[[Leaf], tuple[Array, Array]]


def start(adapter: Adapters, params: Any, method: Method, *, moves: bool = False) -> Start:
    """Gives each low-rank adapter the factors of a method, which a base that moves loses.

    Args:
      adapter: from `init`.
      params: the base.
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
        return Start(new, params)
    for leaf in low_rank_leaves(adapter, leaves):
        if leaf.variant.some_tokens:
            raise leaf.error(f"expected a variant for every token, as the base is moved for all; got {leaf.variant}")
    # By the factors as they are kept: what rounding took from them stays in the base.
    moved = {leaf.path: unfold(leaf.w, new[leaf.path]) for leaf in adapted}
    if bad := too_large(leaves, new, moved, taken=True):
        raise AdapterError(
            f"Expected what is left of each kernel to fit its dtype; {len(bad)} overflow.\n{listed(bad)}\n"
            "  Cast the base to a wider dtype before, such as bfloat16 or float32."
        )
    return Start(new, unflatten(treedef, leaves | moved))


def low_rank_leaves(adapter: Adapters, leaves: Mapping[str, Any]) -> list[Leaf]:
    """The leaves that have factors."""
    if not isinstance(adapter, Mapping) or not all(isinstance(part, Adapter) for part in adapter.values()):
        raise AdapterError(
            "Expected an adapter, a dict from paths to `Adapter` as `init` returns, and then its parameters; got "
            f"{type(adapter).__name__} first.\n  The arguments come in this order: start(adapter, params, …)."
        )
    check(leaves, adapter)
    return [Leaf(path, leaves[path], part) for path, part in adapter.items() if isinstance(part.variant, LowRank)]


def positive_scale(leaf: Leaf) -> float:
    """The scale, where a method divides by it or takes its root."""
    if not (leaf.variant.scale > 0 and math.isfinite(leaf.variant.scale)):
        raise leaf.error(f"expected a positive scale, which is divided by; got {leaf.variant}")
    return leaf.variant.scale
