"""Which tokens an adapter acts on, where it waits for an invocation (aLoRA, arXiv:2504.12397)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from ._adapter import Adapters
from ._errors import AdapterError
from ._variants import ALoRA


def active_tokens(adapter: Adapters, ids: Array) -> Array:
    """Which tokens stand at or behind the last occurrence of the adapter's invocation.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.ALoRA(rank=2, alpha=4, invocation=(7, 8))})
    >>> lj.active_tokens(adapter, jnp.array([[1, 7, 8, 5], [7, 8, 7, 8], [7, 1, 8, 7]])).astype(int)
    Array([[0, 1, 1, 1],
           [0, 0, 1, 1],
           [0, 0, 0, 0]], dtype=int32)

    Args:
      adapter: with leaves of `ALoRA`, which have one invocation in common.
      ids: `(…, tokens)`. Works under `jit`.

    Returns:
      Booleans of the shape of `ids`. The invocation's own tokens are active; where it does not occur, none is.

    Raises:
      AdapterError: if there is no leaf of `ALoRA`, or if they have different invocations.
    """
    found = sorted({part.variant.invocation for part in adapter.values() if isinstance(part.variant, ALoRA)})
    if len(found) != 1:
        raise AdapterError(
            f"Expected an adapter with leaves of ALoRA and one invocation; got {found or 'none'}.\n"
            "  Where there are several, say by hand which tokens are active: a boolean for each token."
        )
    (invocation,) = found
    length, tokens = len(invocation), ids.shape[-1]
    if length > tokens:
        return jnp.zeros(ids.shape, bool)
    starts = jnp.arange(tokens - length + 1)
    windows = ids[..., starts[:, None] + jnp.arange(length)]
    occurs = (windows == jnp.array(invocation)).all(-1)
    last = jnp.max(jnp.where(occurs, starts, -1), axis=-1)
    return (jnp.arange(tokens) >= last[..., None]) & occurs.any(-1)[..., None]


def check_active(adapter: Adapters, active: Any) -> None:
    """Raises if an adapter needs to be told which tokens are active and is not, or is told and does not need to be."""
    waiting = [path for path, part in adapter.items() if part.variant.some_tokens]
    if waiting and active is None:
        raise AdapterError(
            f"Expected `active_tokens`: {waiting[0]!r} has {adapter[waiting[0]].variant}, which acts on some tokens "
            "alone.\n  Call adapted(…, active_tokens=lora_jax.active_tokens(adapter, ids)), or say it by hand where "
            "the model gets a part of the tokens, as with a cache."
        )
    if active is not None and not waiting:
        raise AdapterError("Expected no `active_tokens`: all of the adapter acts on every token, as none is ALoRA.")
    if active is not None and (got := str(getattr(active, "dtype", type(active).__name__))) != "bool":
        raise AdapterError(f"Expected `active_tokens` to be an array of booleans, one for each token; got {got}.")
