"""The variant of a leaf in a stack: its rank is padded with zeros, and its scale is an array.

An array of zeros in place of everything is the base. A leaf that an adapter does not have is therefore zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from .._core.axes import RANK
from .._core.base import as_array
from .._core.contract import widest
from .._core.kernel import AdaptedKernel
from .._core.variant import Variant, Wrapper
from .._errors import SpecError
from .._variants import (
    IA3,
    AdaLoRA,
    ALoRA,
    DeLoRA,
    DoRA,
    Full,
    LoRA,
    LoRABias,
    LoRAXS,
    MiSS,
    QALoRA,
    Rows,
    RSLoRA,
    VeRA,
)

_STACKABLE = (LoRA, RSLoRA, DoRA, AdaLoRA, ALoRA, LoRABias, LoRAXS, MiSS, QALoRA, DeLoRA, IA3, VeRA, Rows, Full)

ABSENT = 0  # the kind of a leaf that an adapter does not have
_PLAIN, _STABILIZED, _DORA, _DORA_STABILIZED, _OTHER = range(1, 6)


class Hyperparameters(NamedTuple):
    """A variant, split into what all adapters of a stack share at a path and what may differ.

    Attributes:
      shared: the variant with rank 1 and scale 1, and as `LoRA` if it is `RSLoRA` or `DoRA`.
      kind: which variant it is, among those with the same `shared`.
      rank: r; 1 for variants whose rank is shared.
      alpha: α; s for `LoRABias`, 1 for variants without a scale.
      scale: s.
    """

    shared: Variant
    kind: int
    rank: int
    alpha: float
    scale: float


def can_be_stacked(variant: Variant) -> bool:
    """Whether a variant is one of this library's, without fields that only a spec may have."""
    if type(variant) not in _STACKABLE or getattr(variant, "clip_rank", False):
        return False
    return join(*split(variant)[:4]) == variant


def split(variant: Variant) -> Hyperparameters:
    """Splits a variant that can be stacked into what is shared in a stack and what may differ."""
    match variant:
        case LoRA():
            return Hyperparameters(_shared(variant), _PLAIN, *_numbers(variant))
        case RSLoRA():
            return Hyperparameters(_shared(variant), _STABILIZED, *_numbers(variant))
        case DoRA():
            kind = _DORA_STABILIZED if variant.rank_stabilized else _DORA
            return Hyperparameters(_shared(variant), kind, *_numbers(variant))
        case AdaLoRA() | ALoRA():
            return Hyperparameters(dataclasses.replace(variant, rank=1, alpha=1), _OTHER, *_numbers(variant))
        case LoRABias():
            return Hyperparameters(LoRABias(scale=1), _OTHER, 1, variant.scale, variant.scale)
    return Hyperparameters(variant, _OTHER, 1, 1, 1)


def _shared(variant: LoRA | RSLoRA | DoRA) -> LoRA:
    return LoRA(rank=1, alpha=1, dropout=variant.dropout)


def _numbers(variant: LoRA | RSLoRA | DoRA | AdaLoRA | ALoRA) -> tuple[int, float, float]:
    return variant.rank, variant.alpha, variant.scale


def join(shared: Variant, kind: int, rank: int, alpha: float) -> Variant:
    """Returns the variant with these hyperparameters; `shared` may have another rank, and be `DoRA` for `LoRA`."""
    number = int(alpha) if float(alpha).is_integer() else float(alpha)
    if isinstance(shared, LoRABias):
        return LoRABias(scale=number)
    if isinstance(shared, AdaLoRA | ALoRA):
        return dataclasses.replace(shared, rank=rank, alpha=number)
    if not isinstance(shared, LoRA | DoRA):
        return shared
    fields: dict[str, Any] = dict(rank=rank, alpha=number, dropout=shared.dropout)
    if kind in (_DORA, _DORA_STABILIZED):
        return DoRA(**fields, rank_stabilized=kind == _DORA_STABILIZED)
    return RSLoRA(**fields) if kind == _STABILIZED else LoRA(**fields)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Padded(Wrapper):
    """A variant with a padded rank. Its scale is an array, so that adapters with different scales share a program.

    Attributes:
      variant: with the padded rank and scale 1; `DoRA` if one of the adapters has it.
    """

    @classmethod
    def of(cls, variants: Sequence[Variant], rank: int) -> Padded:
        """Returns the variant for variants with the same shared hyperparameters, padded to a rank."""
        shared = split(variants[0]).shared
        if isinstance(shared, LoRA) and any(isinstance(variant, DoRA) for variant in variants):
            shared = DoRA(rank=1, alpha=1, dropout=shared.dropout)
        if has_rank(shared):
            shared = dataclasses.replace(shared, rank=rank, alpha=rank)  # type: ignore[call-arg]
        return cls(variant=shared)

    @property
    def shared(self) -> Variant:
        """What the adapters share, to compare with that of another variant."""
        return split(self.variant).shared

    def check(self, shape: Sequence[int], axes: str) -> None:
        """Raises: stacks are made from adapters."""
        raise SpecError(f"{self} is not for a spec; `many.stack` makes it from the variants of adapters")

    def shapes(self, shape: Sequence[int], axes: str) -> dict[str, tuple[int, ...]]:
        """The arrays of the variant, and scalars: `scale`, and `kind` if some adapters have DoRA."""
        return self.variant.shapes(shape, axes) | dict.fromkeys(self.scalars, ())

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """As in the variant; `scale` and `kind` have no axes."""
        return self.variant.layout(axes) | dict.fromkeys(self.scalars, ())

    @property
    def scalars(self) -> tuple[str, ...]:
        """The names of the scalars, which are not trained."""
        return ("scale", "kind") if isinstance(self.variant, DoRA) else ("scale",)

    def init(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """Raises: stacks are made from adapters."""
        raise SpecError(f"{self} is not for a spec; `many.stack` makes it from the variants of adapters")

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> AdaptedKernel | Array:
        """Returns what the variant returns, with the scale multiplied into one of the arrays."""
        trained = {name: array for name, array in arrays.items() if name not in self.scalars}
        scale = arrays["scale"]
        if isinstance(self.variant, Full):
            value = jnp.asarray(trained["value"], kernel.dtype)
            value = jnp.where(jnp.isnan(scale), jnp.full_like(value, jnp.nan), value)
            return jnp.where(scale == 0, as_array(kernel), value)
        names = [name for name in ("a", "b", "lambda_b", "rows", "bias", "r", "gain") if name in trained]
        name = min(names, key=lambda name: trained[name].size)
        dtype = widest(trained[name].dtype, jnp.float32)
        trained[name] = trained[name].astype(dtype) * scale.astype(dtype)
        adapted = self.variant.apply(kernel, trained, axes, path)
        if not isinstance(self.variant, DoRA):
            return adapted
        assert isinstance(adapted, AdaptedKernel)
        normalized = (arrays["kind"] == _DORA) | (arrays["kind"] == _DORA_STABILIZED)
        gain = jnp.where(normalized, adapted.gain, jnp.ones_like(adapted.gain))
        return dataclasses.replace(adapted, gain=gain)


def has_rank(variant: Variant) -> bool:
    """Whether the ranks of variants like this one may differ in a stack."""
    return isinstance(variant, LoRA | RSLoRA | DoRA | AdaLoRA | ALoRA)


def rank_axis(variant: Variant, axes: str, name: str) -> int | None:
    """Returns the rank axis of an array, or None."""
    layout = variant.layout(axes).get(name, ())
    return layout.index(RANK) if RANK in layout else None


def with_rank(variant: Padded, axes: str, name: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Returns the shape of an array with another rank, if ranks may differ."""
    at = rank_axis(variant, axes, name) if has_rank(variant.variant) else None
    return shape if at is None or at >= len(shape) else (*shape[:at], rank, *shape[at + 1 :])
