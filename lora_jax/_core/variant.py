"""The interface of variants: the initial arrays for a kernel, and how they act on it."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._errors import SpecError
from .axes import axes_of_a, axes_of_b, axes_with, sizes, width
from .contract import widest
from .kernel import AdaptedKernel
from .numbers import flag, fraction, integer, number
from .spec_value import SpecValue
from .stored import StoredLeaf


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Variant(SpecValue):
    """A method of adapting one kernel, with its hyperparameters: an immutable value without arrays."""

    adds: ClassVar[bool]  # whether it adds a term that does not depend on the kernel, so that it can be subtracted
    constants: ClassVar[tuple[str, ...]] = ()  # the names of arrays that are not trained
    needs_all: ClassVar[str] = ""  # roles of axes along which it needs all of the kernel, and not a shard
    routed: ClassVar[bool] = False  # whether its update differs between tokens, and so cannot be merged
    needs_weights: ClassVar[bool] = False  # whether the caller passes `token_weights`
    experts_given: ClassVar[int | None] = None  # the size of their last axis; None if they have only token axes
    weights_per_layer: ClassVar[bool] = False  # whether their first axes are the batch axes of the kernel
    noun: ClassVar[str] = "variant"
    example: ClassVar[str] = "LoRA(rank=8, alpha=16)"
    verb: ClassVar[str] = "adapt"
    function: ClassVar[str] = "init"
    advice: ClassVar[str] = ""

    @property
    def title(self) -> str:
        """The name, for reports."""
        return type(self).__name__

    @abc.abstractmethod
    def shapes(self, shape: Sequence[int], axes: str) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each array, by name, for a kernel of this shape."""

    @abc.abstractmethod
    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """Returns the kernel axis of each axis of each array, by name; omits arrays with the axes of the kernel."""

    @abc.abstractmethod
    def init(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """Returns the initial arrays. `key` is consumed; `kernel` may be a `ShapeDtypeStruct`."""

    @abc.abstractmethod
    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> AdaptedKernel | Array:
        """Returns what the model receives in place of the kernel."""

    def check_numbers(self, shape: Sequence[int], axes: str) -> None:
        """Raises `SpecError` if it names rows or layers that a kernel of this shape lacks."""

    def merged_into(self, leaf: StoredLeaf, arrays: dict[str, Array], axes: str) -> StoredLeaf | None:
        """Returns a stored leaf merged with the arrays in its own form; None if that is not possible."""
        del leaf, arrays, axes  # in general, the sum of a quantized kernel and an update is not quantized
        return None


def check_axes(variant: Variant, axes: str) -> None:
    """Raises `SpecError` if there is no input axis or no output axis."""
    if "i" not in axes or "o" not in axes:
        raise SpecError(f"{type(variant).__name__} needs input and output axes; the kernel's are {axes!r}")


def largest_rank(shape: Sequence[int], axes: str) -> int:
    """Returns the largest rank that a matrix of this shape can have."""
    return min(width(axes, shape, "i"), width(axes, shape, "o"))


def check_values(variant: Variant, kernel: Any) -> None:
    """Raises `SpecError` if the kernel has a shape only, for a variant that is initialized from its values."""
    if isinstance(kernel, jax.ShapeDtypeStruct):
        raise SpecError(
            f"{type(variant).__name__} is initialized from the values of the kernel, and got a shape only; "
            "pass the parameters, or call `init` under `jax.eval_shape`"
        )


def scale_ranks(a: Array, diagonal: Array, axes: str) -> Array:
    """Multiplies each column of `a`, (batch…, in…, rank), with its element of a diagonal, (batch…, rank)."""
    inputs = [i for i, axis in enumerate(axes_of_a(axes)) if axis in axes_with(axes, "i")]
    dtype = widest(a.dtype, diagonal.dtype)
    return a.astype(dtype) * lax.expand_dims(diagonal.astype(dtype), inputs)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Ranked(Variant):
    """Methods whose arrays have axes of the kernel and of a rank.

    `b` is initialized to zero, so that the model is initially unchanged. `a` is uniform in ±1/√fan_in, as in the
    implementations of Microsoft and Hugging Face. Batch axes (layers, experts) do not count for the fan-in.
    """

    rank: int
    needs_axes: ClassVar[bool] = True
    adds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(rank=integer("rank", self.rank, least=1))

    def check(self, shape: Sequence[int], axes: str) -> None:
        """Raises if there is no input or output axis, or if the rank is too large."""
        check_axes(self, axes)
        if self.rank > (most := largest_rank(shape, axes)):
            raise SpecError(f"rank={self.rank} is too large; with axes {axes!r} it can be at most {most}")

    def shapes(self, shape: Sequence[int], axes: str) -> dict[str, tuple[int, ...]]:
        """Follows from the layout."""
        return {name: sizes(array_axes, shape, self.rank) for name, array_axes in self.layout(axes).items()}

    def init(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """Returns `a` uniform in ±1/√fan_in, and `b` zero."""
        shapes = self.shapes(kernel.shape, axes)
        bound = 1 / math.sqrt(width(axes, kernel.shape, "i"))
        return {
            "a": jax.random.uniform(key, shapes["a"], dtype, -bound, bound),
            "b": jnp.zeros(shapes["b"], dtype),
        }


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class LowRank(Ranked):
    """Methods that add `scale·a·b` to the kernel."""

    alpha: float
    dropout: float = 0.0
    clip_rank: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(
            alpha=number("alpha", self.alpha),
            dropout=fraction("dropout", self.dropout),
            clip_rank=flag("clip_rank", self.clip_rank),
        )

    @property
    @abc.abstractmethod
    def scale(self) -> float:
        """s, the factor of `a·b`."""

    def at_rank(self, rank: int) -> Self:
        """Changes the rank and keeps the scale: α changes with the rank for LoRA, with its square root for rsLoRA."""
        if rank == self.rank:
            return self
        other = dataclasses.replace(self, rank=rank)
        return dataclasses.replace(other, alpha=other.alpha * (self.scale / other.scale)) if self.scale else other

    def check(self, shape: Sequence[int], axes: str) -> None:
        """Raises if there is no input or output axis, or if the rank is too large and `clip_rank` is false."""
        check_axes(self, axes)
        if not (self.clip_rank and largest_rank(shape, axes)):
            super().check(shape, axes)

    def fitted(self, shape: Sequence[int], axes: str) -> Self:
        """Applies `clip_rank`: reduces the rank to the largest that the kernel allows, with the same α."""
        variant = super().fitted(shape, axes)
        if not self.clip_rank:
            return variant
        return dataclasses.replace(variant, rank=min(self.rank, largest_rank(shape, axes)), clip_rank=False)

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """`a`: (batch…, in…, `RANK`); `b`: (batch…, `RANK`, out…)."""
        return {"a": axes_of_a(axes), "b": axes_of_b(axes)}

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> AdaptedKernel:
        """Returns the kernel with its factors."""
        a, b = self.factors(arrays, axes)
        return AdaptedKernel(kernel, a, b, scale=self.scale, roles=tuple(axes), paths=(path,))

    def factors(self, arrays: dict[str, Array], axes: str) -> tuple[Array, Array]:
        """Returns the factors `a` and `b`, the diagonal multiplied into `a`."""
        diagonal = self.diagonal(arrays)
        return arrays["a"] if diagonal is None else scale_ranks(arrays["a"], diagonal, axes), arrays["b"]

    def diagonal(self, arrays: dict[str, Array]) -> Array | None:
        """Returns the diagonal between the factors, (batch…, rank); None if there is none."""
        del arrays  # for variants with a diagonal
        return None


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Wrapper(Variant):
    """A variant that changes another one.

    Attributes:
      variant: the other one.
    """

    variant: Variant

    def check_numbers(self, shape: Sequence[int], axes: str) -> None:
        """As in the variant."""
        self.variant.check_numbers(shape, axes)

    @property
    def dropout(self) -> float:
        """The probability of dropout, as in the variant."""
        return getattr(self.variant, "dropout", 0.0)

    @property
    def needs_axes(self) -> bool:  # type: ignore[override]
        """As in the variant."""
        return self.variant.needs_axes

    @property
    def adds(self) -> bool:  # type: ignore[override]
        """As in the variant."""
        return self.variant.adds

    @property
    def constants(self) -> tuple[str, ...]:  # type: ignore[override]
        """As in the variant."""
        return self.variant.constants

    @property
    def needs_all(self) -> str:  # type: ignore[override]
        """As in the variant."""
        return self.variant.needs_all

    @property
    def routed(self) -> bool:  # type: ignore[override]
        """As in the variant."""
        return self.variant.routed

    @property
    def needs_weights(self) -> bool:  # type: ignore[override]
        """As in the variant."""
        return self.variant.needs_weights
