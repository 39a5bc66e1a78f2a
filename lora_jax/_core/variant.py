"""What every variant answers: how its arrays start for a kernel, and how they act on it."""

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
from .numbers import flag, integer, number, share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant(abc.ABC):
    """A way to adapt one kernel: a frozen value that says everything about it and holds no array."""

    axes: str | None = None
    needs_axes: ClassVar[bool]  # whether the roles of the kernel's axes matter to it
    adds: ClassVar[bool]  # whether it adds to the kernel what does not depend on it, and can be taken out again
    some_tokens: ClassVar[bool] = False  # whether it acts on some tokens alone, and so is no kernel for all of them

    def __post_init__(self) -> None:
        """Checks what it is made with, and makes plain Python of it: what needs the kernel's shape is for `check`."""
        if not isinstance(self.axes, str | None):
            raise SpecError(f"Expected a string such as 'io' for `axes`; got {self.axes!r}.")

    def _set(self, **values: Any) -> None:
        """Sets fields while it is made; afterwards it is frozen."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        """What was chosen, the axes last; what was left as it is by default is not shown."""
        fields = sorted(dataclasses.fields(self), key=lambda field: field.name == "axes")
        chosen = [field for field in fields if getattr(self, field.name) != field.default]
        return f"{type(self).__name__}({', '.join(f'{field.name}={getattr(self, field.name)!r}' for field in chosen)})"

    @abc.abstractmethod
    def check(self, shape: Sequence[int], axes: str) -> None:
        """Raises `SpecError`, its text without the path, if a kernel of this shape and these axes cannot be adapted."""

    def fitted(self, shape: Sequence[int], axes: str) -> Self:
        """What the adapter of a kernel of this shape holds: nothing in it is open any more."""
        del shape, axes  # they say nothing, but for a variant whose rank they limit
        return self if self.axes is None else dataclasses.replace(self, axes=None)  # the adapter has its own

    @abc.abstractmethod
    def shapes(self, shape: Sequence[int], axes: str) -> dict[str, tuple[int, ...]]:
        """The shape of each array, by name, for a kernel of a shape."""

    @abc.abstractmethod
    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """Which of the leaf's axes each axis of an array is, by name; of one that is not named, they are the leaf's."""

    @abc.abstractmethod
    def start(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """The arrays at the start. `key` is consumed; of `kernel` a shape and dtype may be all there is."""

    @abc.abstractmethod
    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> AdaptedKernel | Array:
        """What the model sees in place of the kernel."""


def check_axes(variant: Variant, axes: str) -> None:
    """Raises `SpecError` if there is no input or no output axis, between which factors would stand."""
    if "i" not in axes or "o" not in axes:
        raise SpecError(f"{type(variant).__name__} needs input and output axes, the kernel's are {axes!r}")


def largest_rank(shape: Sequence[int], axes: str) -> int:
    """The rank that a product of factors for a kernel of this shape can have."""
    return min(width(axes, shape, "i"), width(axes, shape, "o"))


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class LowRank(Variant):
    """The methods that have the factors `a` and `b`, of which `scale·a·b` is added to a kernel.

    `b` starts at zero, so that the model starts as it was; `a` is uniform in ±1/√fan_in, as in Microsoft's and
    Hugging Face's implementations. The fan-in is that of the input axes alone: layers and experts do not count.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    clip_rank: bool = False
    needs_axes: ClassVar[bool] = True
    adds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(
            rank=integer("rank", self.rank, least=1),
            alpha=number("alpha", self.alpha),
            dropout=share("dropout", self.dropout),
            clip_rank=flag("clip_rank", self.clip_rank),
        )

    @property
    @abc.abstractmethod
    def scale(self) -> float:
        """s, by which `a·b` is multiplied."""

    def at_rank(self, rank: int) -> Self:
        """The same method at another rank, its scale kept: for LoRA α goes with the rank, for rsLoRA with its root."""
        if rank == self.rank:
            return self
        other = dataclasses.replace(self, rank=rank)
        return dataclasses.replace(other, alpha=other.alpha * (self.scale / other.scale)) if self.scale else other

    def check(self, shape: Sequence[int], axes: str) -> None:
        """Raises if there is no input or no output axis, or if the rank is too large and is not to be clipped."""
        check_axes(self, axes)
        most = largest_rank(shape, axes)
        if self.rank > most and not (self.clip_rank and most):
            raise SpecError(f"rank={self.rank} is too large, with axes {axes!r} it can be at most {most}")

    def fitted(self, shape: Sequence[int], axes: str) -> Self:
        """At most the rank that the kernel can have, where that was asked for; α stays, and so the scale grows."""
        its = super().fitted(shape, axes)
        if not self.clip_rank:
            return its
        return dataclasses.replace(its, rank=min(self.rank, largest_rank(shape, axes)), clip_rank=False)

    def shapes(self, shape: Sequence[int], axes: str) -> dict[str, tuple[int, ...]]:
        """`a`: (batch…, in…, rank); `b`: (batch…, rank, out…)."""
        return {name: sizes(its, shape, self.rank) for name, its in self.layout(axes).items()}

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """`a`: (batch…, in…, `RANK`); `b`: (batch…, `RANK`, out…)."""
        return {"a": axes_of_a(axes), "b": axes_of_b(axes)}

    def start(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """`a` uniform in ±1/√fan_in, `b` zero."""
        shapes = self.shapes(kernel.shape, axes)
        bound = 1 / math.sqrt(width(axes, kernel.shape, "i"))
        return {
            "a": jax.random.uniform(key, shapes["a"], dtype, -bound, bound),
            "b": jnp.zeros(shapes["b"], dtype),
        }

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> AdaptedKernel:
        """The kernel with its factors beside it."""
        a, b = self.factors(arrays, axes)
        return AdaptedKernel(kernel, a, b, scale=self.scale, roles=tuple(axes), paths=(path,))

    def factors(self, arrays: dict[str, Array], axes: str) -> tuple[Array, Array]:
        """The factors whose scaled product is added; what stands between `a` and `b` is in the first."""
        diagonal = self.diagonal(arrays)
        if diagonal is None:
            return arrays["a"], arrays["b"]
        inputs = [at for at, axis in enumerate(axes_of_a(axes)) if axis in axes_with(axes, "i")]
        dtype = widest(arrays["a"].dtype, diagonal.dtype)
        return arrays["a"].astype(dtype) * lax.expand_dims(diagonal.astype(dtype), inputs), arrays["b"]

    def diagonal(self, arrays: dict[str, Array]) -> Array | None:
        """What stands between the factors, a number for each direction, (batch…, rank); None for nothing."""
        del arrays  # it is nothing, but for variants that say otherwise
        return None
