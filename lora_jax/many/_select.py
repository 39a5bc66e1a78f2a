"""Selects adapters of a stack by name or number, inside `jit`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from .._core.values import is_concrete
from .._errors import AdapterError, SpecError
from ._member import Member, Settings, Stack

BASE = "base"
"""The name that selects the base."""
_BASE_ID = -1

Unknown = Literal["nan", "base"]


def ids(stacked: Stack, names: str | Sequence[str]) -> np.ndarray[Any, Any]:
    """Returns the numbers of adapters, to be passed to jitted functions in place of names.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> adapter = lj.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, {"kernel": lj.LoRA(rank=1, alpha=1)})
    >>> stacked = lj.many.stack({"fr": adapter, "de": adapter})
    >>> lj.many.ids(stacked, ["de", "fr", lj.many.BASE])
    array([ 1,  0, -1], dtype=int32)

    Args:
      stacked: from `stack`; traced or not.
      names: one name or several; `BASE` is the base.

    Returns:
      int32, a scalar for one name, otherwise of shape (names,); -1 for the base.

    Raises:
      AdapterError: for an unknown name.
    """
    if isinstance(names, str):
        return np.asarray(_id_of(stacked.names, names), np.int32)
    return np.array([_id_of(stacked.names, name) for name in names], np.int32)


def select(stacked: Stack, which: Any, *, unknown: Unknown = "nan") -> Member:
    """Selects one adapter of a stack, or one per example. Works under `jit`, where other numbers compile nothing.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params, apply = {"kernel": jnp.ones((4, 3))}, lambda params, x: x @ params["kernel"]
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=1, alpha=1)})
    >>> adapter["kernel"].arrays["b"] += 1
    >>> stacked = lj.many.stack({"fr": adapter})
    >>> run = jax.jit(lambda which, x: lj.lora(apply)(params, lj.many.select(stacked, which), x))
    >>> run(-1, jnp.ones((1, 4))), run(7, jnp.ones((1, 4)))
    (Array([[4., 4., 4.]], dtype=float32), Array([[nan, nan, nan]], dtype=float32))

    Args:
      stacked: from `stack`.
      which: a name or a number; or a list of them or an integer array of any shape, one per example. `BASE` and -1 are
        the base.
      unknown: what a number is that no adapter has and that is known only when the program runs: `"nan"`, an adapter
        with which the adapted kernels give NaN, or `"base"`.

    Returns:
      The adapter, for `lora(apply)`. Its arrays have the axes of `which` as leading axes, for `jax.vmap`.

    Raises:
      AdapterError: for an unknown name, and for an unknown number unless it is traced.
      SpecError: for another `unknown`.
    """
    if unknown not in ("nan", "base"):
        raise SpecError(f"Expected 'nan' or 'base' for `unknown`; got {unknown!r}.")
    which, count = _as_ids(stacked, which), len(stacked.names)
    known = (which >= 0) & (which < count)
    # Numbers out of range are filled with zeros, which are the base. A negative number would count from the end.
    index = jnp.where(known, which, count)
    selected = jax.tree.map(lambda x: x.at[index].get(mode="fill", fill_value=0), stacked.members)
    if unknown == "base":
        return selected
    invalid = which >= count
    if jnp.issubdtype(which.dtype, jnp.signedinteger):
        invalid |= which < _BASE_ID

    def mark(settings: Settings) -> Settings:
        return dataclasses.replace(settings, scale=jnp.where(invalid, jnp.nan, settings.scale))

    return Member(selected.trainable, {path: mark(settings) for path, settings in selected.settings.items()})


def _as_ids(stacked: Stack, which: Any) -> Any:
    """Returns names or numbers as integers of at least 32 bits.

    Raises:
      AdapterError: for an unknown name or number, or if they are not integers.
    """
    if isinstance(which, str):
        return ids(stacked, which)
    if isinstance(which, list | tuple):
        which = np.array([_id_of(stacked.names, x) if isinstance(x, str) else x for x in which])
    which = which if isinstance(which, jax.Array) else np.asarray(which)
    if not jnp.issubdtype(which.dtype, jnp.integer):
        raise AdapterError(
            f"Expected names or integers that select adapters; got {which.dtype}{list(which.shape)}.\n"
            f"  The names are {', '.join(map(repr, stacked.names))}, and {BASE!r}."
        )
    if which.dtype.itemsize < 4:  # the number of adapters may not fit its dtype
        which = which.astype(np.int32)
    if is_concrete(which):
        wrong = [int(number) for number in np.unique(which) if not _BASE_ID <= int(number) < len(stacked.names)]
        if wrong:
            raise AdapterError(
                f"Expected numbers of the {len(stacked.names)} adapters, or {_BASE_ID} for the base; got {wrong[0]}."
            )
    return which


def index_of(names: Sequence[str], name: str) -> int:
    """Returns the position of a name.

    Raises:
      AdapterError: if it is unknown; names the most similar ones.
    """
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.0)
        raise AdapterError(
            f"Expected the name of one of the {len(names)} adapters; got {name!r}.\n"
            f"  The nearest are {', '.join(map(repr, near))}."
        )
    return list(names).index(name)


def _id_of(names: Sequence[str], name: str) -> int:
    return _BASE_ID if name == BASE else index_of(names, name)
