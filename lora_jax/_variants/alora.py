"""aLoRA: Activated LoRA (Greenewald et al. 2025, arXiv:2504.12397)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array, lax

from .._core.adapter import Adapters
from .._core.kernel import AdaptedKernel
from .._core.numbers import integers
from .._core.routing import Experts
from .._core.variant import LowRank
from .._errors import AdapterError


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class ALoRA(LowRank):
    """LoRA that acts only on the tokens from an invocation on (Greenewald et al. 2025, arXiv:2504.12397).

        y = x·W0 + [the token is active]·s·(x·A)·B

    Tokens before the invocation have the activations of the base, so the base and all such adapters can share a KV
    cache. The adapted function needs the active tokens as an argument:
    `adapted(params, adapter, ids, token_weights=lora_jax.active_tokens(adapter, ids))`. ALoRA cannot be merged.

    >>> ALoRA(rank=32, alpha=32, invocation=[529, 29989])
    ALoRA(rank=32, alpha=32, invocation=(529, 29989))

    Attributes:
      rank: r, in [1, min(in, out)].
      alpha: α; the update is multiplied by α/r.
      clip_rank: as in `LoRA`.
      dropout: as in `LoRA`.
      invocation: the ids of the tokens that invoke the adapter, at least one.
      axes: as in `LoRA`.
    """

    invocation: tuple[int, ...]
    adds: ClassVar[bool] = False
    routed: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(invocation=integers("invocation", self.invocation))  # a list cannot be hashed

    @property
    def scale(self) -> float:
        """α/r."""
        return self.alpha / self.rank

    def apply(self, kernel: Array, arrays: dict[str, Array], axes: str, path: str) -> AdaptedKernel:
        """Returns the kernel with its factors, as one expert that the caller weights."""
        experts = (Experts((self.rank,), "caller"),)
        return dataclasses.replace(super().apply(kernel, arrays, axes, path), experts=experts)


def active_tokens(adapter: Adapters, ids: Array) -> Array:
    """Returns which tokens are at or after the start of the last occurrence of the adapter's invocation.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.ALoRA(rank=2, alpha=4, invocation=(7, 8))})
    >>> lj.active_tokens(adapter, jnp.array([[1, 7, 8, 5], [7, 8, 7, 8], [7, 1, 8, 7]])).astype(int)
    Array([[0, 1, 1, 1],
           [0, 0, 1, 1],
           [0, 0, 0, 0]], dtype=int32)

    Args:
      adapter: has `ALoRA` leaves, all with the same invocation.
      ids: `(…, tokens)`. Works under `jit`.

    Returns:
      Booleans of the shape of `ids`. The tokens of the invocation are active; if it does not occur, no token is.

    Raises:
      AdapterError: if there is no `ALoRA` leaf, or if invocations differ.
    """
    found = sorted({part.variant.invocation for part in adapter.values() if isinstance(part.variant, ALoRA)})
    if len(found) != 1:
        raise AdapterError(
            f"Expected an adapter with ALoRA leaves that have one invocation; got {found or 'none'}.\n"
            "  If there are several, pass the adapted function a boolean for each token."
        )
    (invocation,) = found
    length, tokens = len(invocation), ids.shape[-1]
    if length > tokens:
        return jnp.zeros(ids.shape, bool)
    if ids.dtype.itemsize < 4:  # an id of the invocation may not fit its dtype
        ids = ids.astype(jnp.int32)
    starts = tokens - length + 1
    occurs = jnp.stack([ids[..., at : at + starts] == token for at, token in enumerate(invocation)]).all(0)
    last = starts - 1 - jnp.argmax(occurs[..., ::-1], axis=-1, keepdims=True)
    positions = lax.broadcasted_iota(last.dtype, ids.shape, ids.ndim - 1)
    return (positions >= last) & occurs.any(-1, keepdims=True)
