"""Combines adapters of one base into one adapter."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..._core.adapter import Adapter, Adapters, check_adapter
from ..._core.attach import as_jax, check
from ..._core.axes import RANK, axes_of_b
from ..._core.base import dense
from ..._core.contract import widest
from ..._core.keys import key_for
from ..._core.numbers import number
from ..._core.paths import flatten
from ..._core.placement import sharded_as
from ..._errors import AdapterError, SpecError, listed
from ..._variants import AdaLoRA, Full, LoRA, LoRABias, Rows, RSLoRA
from .concat import Concat
from .linear import Linear
from .method import Change, Combination, Term

_LOW_RANK = (LoRA, RSLoRA, AdaLoRA)
_NAMED: Mapping[str, Combination] = {"concat": Concat(), "linear": Linear()}


class _Weighted(NamedTuple):
    """One adapter's leaf at a path."""

    name: str
    part: Adapter
    weight: Any


def combine(
    adapters: Mapping[str, tuple[Adapters, Any]],
    how: Combination | Literal["concat", "linear"],
    *,
    base: Any = None,
    key: Array | None = None,
) -> dict[str, Adapter]:
    """Combines adapters of one base into one adapter. Negative weights subtract.

    `"concat"` is exactly the weighted sum of the updates, W0 + Σ w_k·ΔW_k, whatever the ranks, scales and variants:

        ΔW_k = s_k·A_k·B_k        s_k = α/r for LoRA and AdaLoRA, α/√r for rsLoRA

    `Truncate` is its best approximation of a lower rank. `Linear`, `Prune`, `Ties` and `Dare` are not sums of updates;
    each says what it computes. A leaf that an adapter does not have counts as unchanged. Works under `jit`, where
    weights may be traced, so that other weights compile nothing.

    Leaves of LoRA, rsLoRA and AdaLoRA may be mixed at one path. The result is `LoRA` with scale 1 and without dropout,
    in the widest dtype of its adapters. The other leaves are combined as dense changes: `LoRABias`; `Rows`, whose `ids`
    are united; `Full`, whose change is relative to `base`. For DoRA, VeRA and aLoRA there is no such sum: their update
    is not a product of factors with a scale, or is not for all tokens.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> one = {"kernel": lj.Adapter(lj.RSLoRA(rank=1, alpha=2), "io", a=jnp.ones((3, 1)), b=jnp.ones((1, 3)))}
    >>> other = {"kernel": lj.Adapter(lj.LoRA(rank=2, alpha=2), "io", a=jnp.ones((3, 2)), b=jnp.ones((2, 3)))}
    >>> both = lj.many.combine({"one": (one, 1), "other": (other, -0.5)}, "concat")
    >>> both, lj.merge({"kernel": jnp.zeros((3, 3))}, both)["kernel"][0, 0]
    ({'kernel': Adapter(LoRA(rank=3, alpha=3), 'io', a=float32[3, 3], b=float32[3, 3])}, Array(1., dtype=float32))
    >>> lj.many.combine({"one": (one, 1), "other": (other, 1)}, lj.many.Truncate(rank=1))
    {'kernel': Adapter(LoRA(rank=1, alpha=1), 'io', a=float32[3, 1], b=float32[1, 3])}

    Args:
      adapters: from names to an adapter and its weight, a number or a scalar array. The names are for errors, and for
        the random elements of `Dare`.
      how: `"concat"`, `"linear"`, or a value such as `Truncate(rank=8)`.
      base: the base that the adapters belong to; needed for leaves of `Full` only.
      key: PRNG key; consumed. Needed for `Dare` only.

    Returns:
      The adapter. Its leaves are those that at least one adapter has.

    Raises:
      AdapterError: if there is no adapter, or one is not an adapter with a weight; if leaves cannot be combined: other
        variants, different kinds, axes or shapes at one path, unequal ranks where factors are added, `Full` without
        `base` or unlike it. One error lists all leaves.
      SpecError: for an unknown `how`, a weight that is not a scalar, a missing or an unused key.
    """
    method = _method(how, key)
    paths: dict[str, list[_Weighted]] = {}
    for name, (adapter, weight) in _checked(adapters).items():
        for path, part in adapter.items():
            paths.setdefault(path, []).append(_Weighted(name, part, weight))
    _refuse(paths, method, base)
    leaves = {} if base is None else flatten(base)[0]
    return {path: _combined(path, given, method, leaves.get(path), key) for path, given in paths.items()}


# One leaf


def _combined(path: str, given: Sequence[_Weighted], method: Combination, leaf: Any, key: Any) -> Adapter:
    part = given[0].part
    keys = [None if key is None else key_for(key_for(key, path), weighted.name) for weighted in given]
    if isinstance(part.variant, _LOW_RANK):
        a, b = method.factors(_terms(given, keys), part.axes)
        rank = a.shape[-1]
        return Adapter(LoRA(rank=rank, alpha=rank), part.axes, a=_like(a, given, "a"), b=_like(b, given, "b"))
    combine = functools.partial(_change, given=given, keys=keys, method=method)
    variants: list[Any] = [x.part.variant for x in given]
    match part.variant:
        case LoRABias():
            bias = combine([_wide(x.part.bias) * y.scale for x, y in zip(given, variants, strict=True)], batch=0)
            return Adapter(LoRABias(scale=1), part.axes, bias=_like(bias, given, "bias"))
        case Rows():
            ids = tuple(dict.fromkeys(row for variant in variants for row in variant.ids))
            rows = combine([_at_ids(x.part, ids) for x in given], batch=part.axes.count("b"))
            return Adapter(Rows(ids=ids), part.axes, rows=_like(rows, given, "rows"))
        case _:
            start = _wide(dense(as_jax(leaf)))
            values = [_wide(x.part.value) for x in given]
            dtype = widest(start.dtype, *(value.dtype for value in values))
            change = combine([value.astype(dtype) - start.astype(dtype) for value in values], batch=0)
            return Adapter(Full(), part.axes, value=_like(start.astype(dtype) + change, given, "value"))


def _terms(given: Sequence[_Weighted], keys: Sequence[Any]) -> list[Term]:
    variants: list[Any] = [weighted.part.variant for weighted in given]
    factors = [x.factors(weighted.part.arrays, weighted.part.axes) for x, weighted in zip(variants, given, strict=True)]
    dtype = widest(jnp.float32, *(factor.dtype for pair in factors for factor in pair))
    return [
        Term(weighted.weight, variant.scale, jnp.asarray(a).astype(dtype), jnp.asarray(b).astype(dtype), key)
        for weighted, variant, (a, b), key in zip(given, variants, factors, keys, strict=True)
    ]


def _change(
    values: Sequence[Array], *, given: Sequence[_Weighted], keys: Sequence[Any], method: Combination, batch: int
) -> Array:
    dtype = widest(*(value.dtype for value in values))
    changes = [
        Change(weighted.weight, value.astype(dtype), key)
        for weighted, value, key in zip(given, values, keys, strict=True)
    ]
    return method.change(changes, batch)


def _wide(array: Any) -> Array:
    return jnp.asarray(array).astype(widest(array.dtype, jnp.float32))


def _like(array: Array, given: Sequence[_Weighted], name: str) -> Array:
    """Returns an array in the widest dtype of the adapters' arrays of this name, sharded as the first one."""
    arrays = [weighted.part.arrays[name] for weighted in given]
    dtype = widest(*(x.dtype for x in arrays))
    return sharded_as(array.astype(dtype), jnp.asarray(arrays[0]))


def _at_ids(part: Adapter, ids: Sequence[int]) -> Array:
    """Returns the rows of `Rows` for more ids, zero for those that it does not have."""
    variant: Any = part.variant
    axis = axes_of_b(part.axes).index(RANK)
    rows = jnp.moveaxis(_wide(part.rows), axis, 0)
    at = np.array([ids.index(row) for row in variant.ids])
    return jnp.moveaxis(jnp.zeros((len(ids), *rows.shape[1:]), rows.dtype).at[at].set(rows), 0, axis)


# Checks


def _method(how: Any, key: Any) -> Combination:
    method = _NAMED.get(how) if isinstance(how, str) else how
    if not isinstance(method, Combination):
        raise SpecError(
            f"Expected {', '.join(map(repr, _NAMED))}, or a value such as Truncate(rank=8) for `how`; got {how!r}."
        )
    if method.is_random != (key is not None):
        expected, got = ("a key", "none") if method.is_random else ("no key", "one")
        raise SpecError(
            f"Expected {expected} for {method}, which is {'' if method.is_random else 'not '}random; got {got}.\n"
            f"  {'Pass key=jax.random.key(…).' if method.is_random else 'Leave `key` out.'}"
        )
    return method


def _checked(adapters: Any) -> dict[str, tuple[Adapters, Any]]:
    """Returns the adapters, with weights of Python numbers or traced scalars."""
    if not isinstance(adapters, Mapping) or not adapters:
        raise AdapterError(
            "Expected adapters with weights, {name: (adapter, weight), …}; got "
            f"{'none' if isinstance(adapters, Mapping) else type(adapters).__name__}."
        )
    checked = {}
    for name, given in adapters.items():
        if not isinstance(given, tuple) or len(given) != 2:
            raise AdapterError(
                f"Expected an adapter and its weight at {name!r}; got {type(given).__name__}.\n"
                f"  Pass {{{name!r}: (adapter, 1.0), …}}."
            )
        adapter, weight = given
        check_adapter(adapter, f"Pass {{{name!r}: (adapter, weight), …}}.")
        if isinstance(weight, jax.Array):
            if weight.shape or not jnp.issubdtype(weight.dtype, jnp.floating):
                raise SpecError(f"Expected a number as the weight of {name!r}; got {weight.dtype}{list(weight.shape)}.")
        else:
            weight = number(f"weight of {name!r}", weight)
        checked[name] = adapter, weight
    return checked


def _refuse(paths: Mapping[str, Sequence[_Weighted]], method: Combination, base: Any) -> None:
    problems = [f"{path!r}: {why}" for path, given in paths.items() for why in _problems(given, method, base)]
    if problems:
        raise AdapterError(
            "Expected leaves that can be combined: at each path LoRA, rsLoRA and AdaLoRA, or only LoRABias, Rows or "
            f"Full, with the same axes and shapes; got {len(problems)} that cannot.\n"
            f"{listed(problems, len(problems))}\n"
            "  For other variants, merge each adapter and take the change with extract(base, merged, spec)."
        )
    full = {path: given[0].part for path, given in paths.items() if isinstance(given[0].part.variant, Full)}
    if full:
        check(flatten(base)[0], full, tree="base")


def _problems(given: Sequence[_Weighted], method: Combination, base: Any) -> list[str]:
    """Returns why the leaves of a path cannot be combined, at most one reason."""
    first = given[0]
    for name, part, _ in given:
        if _kind(part) is None:
            return [f"{name!r} has {part.variant}, whose update has no sum with others"]
        if _kind(part) != _kind(first.part):
            return [f"{name!r} has {part.variant}, and {first.name!r} has {first.part.variant}"]
        if part.axes != first.part.axes:
            return [f"the axes are {part.axes!r} in {name!r}, and {first.part.axes!r} in {first.name!r}"]
        if _shapes(part) != _shapes(first.part):
            return [f"{name!r} is for a kernel with {_shapes(part)}, and {first.name!r} for {_shapes(first.part)}"]
        if isinstance(part.variant, Full) and base is None:
            return ["a change of Full is relative to the base; pass base=params"]
    ranks = {x.name: x.part.a.shape[-1] for x in given} if isinstance(first.part.variant, _LOW_RANK) else {}
    if method.needs_equal_ranks and len(set(ranks.values())) > 1:
        return [f"{method} needs equal ranks; they are {ranks}"]
    return []


def _kind(part: Adapter) -> str | None:
    """Returns which leaves it can be combined with; None for none."""
    if type(part.variant) in _LOW_RANK:
        return "low rank"
    return type(part.variant).__name__ if type(part.variant) in (LoRABias, Rows, Full) else None


def _shapes(part: Adapter) -> list[tuple[int, ...]]:
    """Returns the shapes of the arrays that adapters share, without the rank."""
    batch = part.axes.count("b")
    match part.variant:
        case LoRABias() | Full():
            return [tuple(array.shape) for array in part.arrays.values()]
        case Rows():
            return [(*part.rows.shape[:batch], *part.rows.shape[batch + 1 :])]
        case _:
            return [tuple(part.a.shape[:-1]), (*part.b.shape[:batch], *part.b.shape[batch + 1 :])]
