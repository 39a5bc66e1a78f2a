"""An adapted leaf as a stack of matrices, and the replacement of its factors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapter, Adapters
from .._core.attach import check
from .._core.axes import width
from .._core.linalg import as_factors, kernel_matrix
from .._core.paths import flatten, unflatten
from .._core.stored import stored_among
from .._core.variant import LowRank, Variant, Wrapper
from .._errors import AdapterError, SpecError, listed
from .._merge.fold import overflows, unfold
from .._variants import Layers, without_layers


class Start(NamedTuple):
    """The result of an initialization.

    Attributes:
      params: the base that belongs to the adapter: the one that was passed, or, if the initialization changes the base,
        a tree whose adapted kernels are `W0 - s·A·B`.
      adapter: the adapter with new factors; leaves without a rank are unchanged.
    """

    params: Any
    adapter: dict[str, Adapter]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One adapted kernel as a stack of matrices: batch, input and output axes are each flattened to one.

    With `Layers`, it consists of the layers that are adapted.

    Attributes:
      path: the path of the kernel.
      w: the kernel, with all layers.
      part: the adapter of the kernel.
    """

    path: str
    w: Any
    part: Adapter

    @property
    def variant(self) -> LowRank:
        """The variant; with `Layers`, that of the layers."""
        variant = low_rank(self.part.variant)
        assert variant is not None
        return variant

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of the kernel; with `Layers`, of the layers that are adapted."""
        variant, shape = self.part.variant, tuple(self.w.shape)
        return variant.shape_of_layers(shape, self.part.axes) if isinstance(variant, Layers) else shape

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(layers, in, out)`."""
        layers, d_in, d_out = (width(self.part.axes, self.kernel_shape, role) for role in "bio")
        return layers, d_in, d_out

    @property
    def matrices(self) -> Array:
        """The kernel, `(layers, in, out)`, in float32 or wider."""
        return self.as_matrices(self.w)

    def as_matrices(self, array: Any) -> Array:
        """Reshapes an array of the kernel's shape to `(layers, in, out)`, in float32 or wider."""
        return self.adapted_layers(kernel_matrix(array, self.part.axes)).reshape(self.shape)

    def adapted_layers(self, stack: Array) -> Array:
        """Selects the layers that are adapted from an array of all layers, `(batch…, …)`."""
        variant = self.part.variant
        return stack[jnp.array(variant.layers)] if isinstance(variant, Layers) else stack

    def adapter(self, a: Array, b: Array) -> Adapter:
        """Replaces the factors by `(layers, in, rank)` and `(layers, rank, out)`; the rank may change."""
        factors = as_factors(a, b, self.part.axes, self.kernel_shape)
        cast = {name: factor.astype(self.part.arrays[name].dtype) for name, factor in factors.items()}
        return self.replaced(self.variant.at_rank(a.shape[-1]), cast)

    def replaced(self, variant: LowRank, arrays: Mapping[str, Array]) -> Adapter:
        """Returns the adapter with another variant, for the same layers, and with some other arrays."""
        outer = self.part.variant
        new = dataclasses.replace(outer, variant=variant) if isinstance(outer, Layers) else variant
        return Adapter(new, self.part.axes, **{**self.part.arrays, **arrays})

    def error(self, text: str) -> SpecError:
        """Returns an error about this leaf."""
        return SpecError(f"At {self.path!r}: {text}.")


Method = Callable[[Leaf], tuple[Array, Array]]


def initialize(params: Any, adapter: Adapters, method: Method, *, changes_base: bool = False) -> Start:
    """Replaces the factors of each leaf of `low_rank_leaves`.

    Args:
      params: the base.
      adapter: from `init`.
      method: returns the factors of a leaf, `(layers, in, rank)` and `(layers, rank, out)`.
      changes_base: whether to subtract `s·A·B` from the base.
    """
    leaves, treedef = flatten(params)
    adapted = low_rank_leaves(adapter, leaves)
    if changes_base:
        check_arrays(adapted)
    for leaf in adapted:
        check_variant(leaf, changes_base=changes_base)
    with jax.default_matmul_precision("highest"):  # accelerators multiply float32 in bfloat16 by default
        new = dict(adapter) | {leaf.path: leaf.adapter(*method(leaf)) for leaf in adapted}
    if not changes_base:
        return Start(params, new)
    # Subtracts the factors after their cast, so that their rounding errors stay in the base.
    residual = {leaf.path: unfold(leaf.w, new[leaf.path]) for leaf in adapted}
    if bad := overflows(leaves, new, residual, unfolded=True):
        raise AdapterError(
            f"Expected `W0 - s·A·B` to be finite in the dtype of each kernel; {len(bad)} overflow.\n{listed(bad)}\n"
            "  Cast the base to a wider dtype first, such as bfloat16 or float32."
        )
    return Start(unflatten(treedef, leaves | residual), new)


def unwrapped(variant: Variant) -> Variant:
    """Returns the variant inside of wrappers such as `Layers`."""
    return unwrapped(variant.variant) if isinstance(variant, Wrapper) else variant


def low_rank(variant: Variant) -> LowRank | None:
    """Returns the variant, or the one of `Layers`, if an initialization can set its factors."""
    inner = without_layers(variant)
    return inner if isinstance(inner, LowRank) else None


def low_rank_leaves(adapter: Adapters, leaves: Mapping[str, Any]) -> list[Leaf]:
    """Checks the adapter, and returns its leaves whose factors an initialization can set.

    Raises:
      AdapterError: if the adapter does not fit the leaves; if there is no such leaf; if another leaf has a rank.
    """
    check(leaves, adapter)
    found = [Leaf(path, leaves[path], part) for path, part in adapter.items() if low_rank(part.variant)]
    others = {path: part.variant for path, part in adapter.items() if not low_rank(part.variant)}
    ranked = {path: variant for path, variant in others.items() if getattr(unwrapped(variant), "rank", None)}
    accepted = "LoRA, RSLoRA, DoRA, or Layers around one of them"
    if ranked:
        lines = [f"{path!r}: {variant}" for path, variant in ranked.items()]
        raise AdapterError(
            f"Expected variants whose factors an initialization can set, such as {accepted}; {len(ranked)} of "
            f"{len(adapter)} have other arrays.\n{listed(lines)}\n"
            "  Use another variant, or leave these leaves out, {path: part for path, part in adapter.items() if …}, "
            "and join the result with them: adapter | new."
        )
    if not found:
        kinds = ", ".join(sorted({variant.title for variant in others.values()})) or "an empty adapter"
        raise AdapterError(
            f"Expected an adapter with variants whose factors an initialization can set, such as {accepted}; got "
            f"{kinds}.\n  Pass a part of the adapter that has one, or use another spec."
        )
    return found


def check_arrays(adapted: Sequence[Leaf]) -> None:
    """Raises if a kernel is quantized, for methods that read or change the kernel."""
    leaves = {leaf.path: leaf.w for leaf in adapted}
    if quantized := stored_among(leaves, leaves):
        raise AdapterError(
            f"Expected the adapted kernels to be arrays, which this method reads or changes; {len(quantized)} of "
            f"{len(leaves)} are quantized.\n{listed(quantized)}\n"
            "  Pass the weights before they were quantized to starts.loftq or starts.qpissa, which quantize them;\n"
            "  or the kernels as arrays: quant.dequantize(params)."
        )


def check_variant(leaf: Leaf, *, changes_base: bool) -> None:
    """Raises if a method that sets the factors, and subtracts them from the base, does not apply to a variant."""
    if leaf.variant.diagonal(leaf.part.arrays) is not None:  # initialized to zero, so A·B would have no effect
        raise leaf.error(f"expected a variant whose update is s·A·B; {leaf.variant} has a diagonal in addition")
    if changes_base and leaf.variant.routed:
        raise leaf.error(f"expected a variant that adapts all tokens, as the base changes; got {leaf.variant}")


def positive_scale(leaf: Leaf) -> float:
    """Returns the scale. Raises if a method cannot divide by it or take its root."""
    if not (leaf.variant.scale > 0 and math.isfinite(leaf.variant.scale)):
        raise leaf.error(f"expected a positive scale, because the method divides by it; got {leaf.variant}")
    return leaf.variant.scale
