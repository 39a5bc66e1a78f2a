"""`Mixture`: several low-rank updates of one kernel, weighted for each token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .._core.axes import axes_of_a, axes_of_b, sizes
from .._core.contract import widest
from .._core.kernel import AdaptedKernel
from .._core.routing import Experts, Router
from .._core.variant import Variant, scale_ranks
from .._errors import SpecError


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Mixture(Variant):
    """Several low-rank updates of one kernel, the experts, weighted for each token. `many.mixture` makes it.

        y = x·W0 + Σ_e c_e(x)·s_e·(x·A_e)·B_e

    The factors of the experts are concatenated along the rank, so the term is two products, of rank Σ r_e.

    Attributes:
      names: of the experts.
      ranks: the rank of each expert, and of each adapter whose weight is always 1.
      scales: s, likewise.
      router: how the experts are weighted.
      train_experts: whether the factors have a gradient.
    """

    names: tuple[str, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    router: Router
    train_experts: bool = False
    needs_axes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(**{name: tuple(getattr(self, name)) for name in ("names", "ranks", "scales")})  # lists of manifests

    @property
    def rank(self) -> int:
        """The sum of the ranks."""
        return sum(self.ranks)

    @property
    def routed(self) -> bool:  # type: ignore[override]
        """Whether the weights differ between tokens."""
        return self.router.source != "constant"

    @property
    def needs_weights(self) -> bool:  # type: ignore[override]
        """Whether the weights come from the caller."""
        return self.router.source == "caller"

    @property
    def experts_given(self) -> int:  # type: ignore[override]
        """The number of experts."""
        return len(self.names)

    @property
    def weights_per_layer(self) -> bool:  # type: ignore[override]
        """Whether the weights from the caller have the batch axes of the kernel."""
        return self.router.per_layer

    @property
    def needs_all(self) -> str:  # type: ignore[override]
        """The inputs, if the router reads the activation."""
        return "i" if self.router.source == "activation" else ""

    @property
    def adds(self) -> bool:  # type: ignore[override]
        """Whether the update is the same for all tokens."""
        return not self.routed

    def check(self, shape: Sequence[int], axes: str) -> None:
        """Raises: mixtures are made from adapters."""
        raise SpecError(f"{self} is not for a spec; `many.mixture` makes it from adapters")

    def init(self, key: Array, kernel: Any, axes: str, dtype: Any) -> dict[str, Array]:
        """Raises: mixtures are made from adapters."""
        raise SpecError(f"{self} is not for a spec; `many.mixture` makes it from adapters")

    def shapes(self, shape: Sequence[int], axes: str) -> dict[str, tuple[int, ...]]:
        """`a`: (batch…, in…, rank); `b`: (batch…, rank, out…); and the arrays of the router."""
        factors = {name: sizes(of, shape, self.rank) for name, of in _layout_of_factors(axes).items()}
        experts = len(self.names)
        return factors | {name: sizes(of, shape, experts) for name, of in self.router.layout(axes).items()}

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """The factors as in `LoRA`, and the arrays of the router, with `RANK` for the experts."""
        return _layout_of_factors(axes) | self.router.layout(axes)

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> AdaptedKernel:
        """Returns the kernel with the factors of all experts, and what weights them."""
        a, b = (arrays[name] if self.train_experts else lax.stop_gradient(arrays[name]) for name in "ab")
        count, first = len(self.names), self.scales[0] or 1.0
        dtype = widest(a.dtype, jnp.float32)
        scales = jnp.asarray(np.repeat(np.array(self.scales) / first, self.ranks), dtype)
        scales = lax.expand_dims(scales, range(axes.count("b")))
        if self.router.source == "constant":
            weights = arrays["weights"].astype(dtype)
            a = scale_ranks(a, weights[..., np.repeat(np.arange(count), self.ranks)] * scales, axes)
        elif set(self.scales) != {first}:
            a = scale_ranks(a, scales, axes)
        adapted = AdaptedKernel(kernel, a, b, scale=first, roles=tuple(axes), paths=(path,))
        if self.router.source == "constant":
            return adapted
        router = self.router if self.router.source == "activation" else None
        experts = [Experts(self.ranks[:count], self.router.source, router)]
        if others := self.ranks[count:]:
            experts.append(Experts(others, "constant"))
        return dataclasses.replace(
            adapted,
            experts=tuple(experts),
            p=self.router.prototypes(arrays, axes),
            given_per_layer=self.router.per_layer and "b" in axes,
        )


def _layout_of_factors(axes: str) -> dict[str, tuple[int, ...]]:
    return {"a": axes_of_a(axes), "b": axes_of_b(axes)}
