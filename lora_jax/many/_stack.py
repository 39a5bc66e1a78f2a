"""Stacks adapters, replaces one of a stack, and returns them as they were."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .._core.adapter import Adapter, Adapters, check_adapter
from .._core.axes import axes_with
from .._core.numbers import integer
from .._core.values import is_concrete, on_host
from .._errors import AdapterError, listed
from .._variants import DoRA
from ._member import Member, Settings, Stack, part_of
from ._select import BASE, index_of
from ._variant import ABSENT, Padded, can_be_stacked, has_rank, split, with_rank


def stack(adapters: Mapping[str, Adapters], *, rank: int = 1) -> Stack:
    """Stacks adapters of one base into one pytree, for `select`, `per_example` and `jax.vmap`.

    Adapters may differ in their paths, ranks and scales: ranks are padded with zeros, the scales become
    arrays, and a leaf that an adapter does not have is that of the base. At one path, LoRA, rsLoRA and DoRA may be
    mixed. `unstack` returns the adapters bit for bit. Works under `jit`.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    >>> small = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=1, alpha=2)})
    >>> large = lj.init(jax.random.key(1), params, {"kernel": lj.RSLoRA(rank=3, alpha=6), "bias": lj.Full()})
    >>> stacked = lj.many.stack({"small": small, "large": large})
    >>> stacked, stacked.members["kernel"].a.shape
    (Stack('small', 'large'; 2 leaves), (2, 4, 3))
    >>> lj.many.unstack(stacked)["small"]
    {'kernel': Adapter(LoRA(rank=1, alpha=2), 'io', a=float32[4, 1], b=float32[1, 3])}

    Args:
      adapters: from names to adapters, from `init`, training or `restore`. An empty adapter, `{}`, is the base, as a
        place for `swap`.
      rank: the least rank to pad to, so that `swap` accepts adapters up to it. A kernel is not padded beyond the
        largest rank that it allows.

    Returns:
      The stack. Its arrays have a leading axis, one element per adapter in the order of `adapters`.

    Raises:
      AdapterError: if there is no leaf; for a name that is not a string, or is `BASE`; if leaves cannot be stacked: of
        different variants (other than LoRA, rsLoRA, DoRA), dropout, `invocation` of aLoRA, or any field of a variant
        whose ranks are not padded, such as `ids` of `Rows`; of other axes, shapes or dtypes; of `Layers`, or of a
        variant that is not from this library. One error lists all leaves.
      SpecError: for a rank below 1.
    """
    rank = integer("rank", rank, least=1)
    if wrong := [name for name in adapters if not isinstance(name, str) or name == BASE]:
        raise AdapterError(f"Expected strings other than {BASE!r}, which is the base, as names; got {wrong[0]!r}.")
    for adapter in adapters.values():
        check_adapter(adapter, "The argument is {name: adapter, …}.")
    paths = list(dict.fromkeys(path for adapter in adapters.values() for path in adapter))
    if not paths:
        raise AdapterError(
            f"Expected at least one adapter with a leaf; got {dict(adapters)}.\n  Stack trained adapters."
        )
    parts = {path: {name: ad[path] for name, ad in adapters.items() if path in ad} for path in paths}
    templates, problems = {}, []
    for path, by_name in parts.items():
        if unknown := [(name, part) for name, part in by_name.items() if not can_be_stacked(part.variant)]:
            problems += [f"{path!r} of {name!r}: {part.variant} cannot be stacked" for name, part in unknown]
            continue
        template = templates[path] = _template([*by_name.values()], rank)
        problems += [
            f"{path!r} of {name!r}: {reason}"
            for name, part in by_name.items()
            if (reason := _misfit(template, part, next(iter(by_name))))
        ]
    _refuse(problems)
    members = [_member(templates, adapter) for adapter in adapters.values()]
    return Stack(jax.tree.map(lambda *arrays: _stacked(arrays), *members), tuple(adapters))


def unstack(stacked: Stack) -> dict[str, dict[str, Adapter]]:
    """Returns the adapters of a stack as they were stacked, bit for bit: without padding, each with its variant.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> make = lambda rank: lj.init(jax.random.key(0), params, {"kernel": lj.DoRA(rank=rank, alpha=8)})
    >>> adapters = lj.many.unstack(lj.many.stack({"one": make(1), "two": make(2)}))
    >>> adapters["one"]["kernel"].variant, adapters["two"]["kernel"].b.shape
    (DoRA(rank=1, alpha=8), (2, 3))

    Args:
      stacked: from `stack`, `swap` or training.

    Returns:
      `{name: adapter}`.

    Raises:
      AdapterError: under `jit`, because the ranks are values.
    """
    members = stacked.members
    if not all(map(is_concrete, jax.tree.leaves(members.settings))):
        raise AdapterError(
            "Expected arrays with values, which determine the ranks; got traced arrays.\n  Call unstack outside `jit`."
        )
    settings = {path: jax.tree.map(on_host, found) for path, found in members.settings.items()}
    return {
        name: {
            path: part_of(part, settings[path], index)
            for path, part in members.trainable.items()
            if settings[path].kind[index] != ABSENT
        }
        for index, name in enumerate(stacked.names)
    }


def swap(stacked: Stack, name: str, adapter: Adapters) -> Stack:
    """Replaces one adapter of a stack by another one, of any rank up to the padded one and any scale.

    The result has the same shapes and static data, so nothing that was compiled for the stack compiles again. Leaves
    that the new adapter does not have are those of the base; `{}` is the base.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> make = lambda variant: lj.init(jax.random.key(0), params, {"kernel": variant})
    >>> stacked = lj.many.stack({"one": make(lj.LoRA(rank=1, alpha=2)), "two": {}}, rank=3)
    >>> stacked = lj.many.swap(stacked, "two", make(lj.RSLoRA(rank=3, alpha=1)))
    >>> lj.many.unstack(stacked)["two"]["kernel"].variant
    RSLoRA(rank=3, alpha=1)

    Args:
      stacked: from `stack`.
      name: of the adapter to replace.
      adapter: the new one.

    Returns:
      The new stack; the old one is unchanged.

    Raises:
      AdapterError: for an unknown name, and for leaves that the stack has no place for: other paths, a larger rank,
        DoRA if no adapter of the stack had it at this path, and what `stack` refuses. One error lists all leaves.
    """
    index = index_of(stacked.names, name)
    check_adapter(adapter, "The arguments come in this order: swap(stacked, name, adapter).")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked.members.trainable)
    problems = []
    for path, part in adapter.items():
        if path not in abstract:
            problems.append(f"{path!r}: the stack has no such leaf")
        elif not can_be_stacked(part.variant):
            problems.append(f"{path!r}: {part.variant} cannot be stacked")
        elif reason := _misfit(abstract[path], part, "the stack"):
            problems.append(f"{path!r}: {reason}")
    _refuse(problems)
    if all(map(is_concrete, jax.tree.leaves(dict(adapter)))):
        adapter = jax.tree.map(on_host, dict(adapter))  # JAX would compile a program for each rank that it pads
    return stacked.replace(_put(stacked.members, np.int32(index), _member(abstract, adapter)))


@jax.jit
def _put(members: Member, index: Any, member: Member) -> Member:
    return jax.tree.map(lambda all_of, one: all_of.at[index].set(jnp.asarray(one, all_of.dtype)), members, member)


def _stacked(arrays: Sequence[Any]) -> Array:
    if all(isinstance(array, np.ndarray | np.generic) for array in arrays):
        return jnp.asarray(np.stack(arrays))  # compiles nothing
    return jnp.stack(arrays)


def _template(parts: list[Adapter], rank: int) -> Adapter:
    """Returns the padded leaf for the leaves of one path, as shapes: like the first, and with `magnitude` for DoRA."""
    parts = [part for part in parts if split(part.variant).shared == split(parts[0].variant).shared]
    arrays: dict[str, Any] = {}
    for part in parts:
        arrays = dict(part.arrays) | arrays
    axes, largest = parts[0].axes, max(split(part.variant).rank for part in parts)
    if has_rank(parts[0].variant) and {"a", "b"} <= set(arrays):
        largest = max(largest, min(rank, _largest_rank(arrays, axes)))
    variant = Padded.of([part.variant for part in parts], largest)
    arrays = {
        name: jax.ShapeDtypeStruct(with_rank(variant, axes, name, array.shape, largest), array.dtype)
        for name, array in arrays.items()
    }
    return Adapter(variant, axes, **arrays)


def _largest_rank(arrays: Mapping[str, Any], axes: str) -> int:
    """Returns the largest rank that a kernel with these factors can have."""
    batch = len(axes_with(axes, "b"))
    return min(math.prod(arrays["a"].shape[batch:-1]), math.prod(arrays["b"].shape[batch + 1 :]))


def _misfit(template: Adapter, part: Adapter, other: str) -> str | None:
    """Returns why a leaf has no place in a stack, or None."""
    variant, found = template.variant, split(part.variant)
    assert isinstance(variant, Padded)
    if found.shared != variant.shared:
        return f"{part.variant} does not fit {variant.shared!r} of {other!r}, apart from rank and scale"
    if part.axes != template.axes:
        return f"the axes are {part.axes!r}, and {template.axes!r} in {other!r}"
    if has_rank(part.variant) and found.rank > variant.variant.rank:  # type: ignore[attr-defined]
        return f"the rank is {found.rank}; the stack is padded to {variant.variant.rank}"  # type: ignore[attr-defined]
    names = set(template.arrays) - ({"magnitude"} if not isinstance(part.variant, DoRA) else set())
    if set(part.arrays) != names:
        return f"{part.variant} has the arrays {sorted(part.arrays)}, and here needs {sorted(names)}"
    for name, array in part.arrays.items():
        expected = template.arrays[name]
        shape = with_rank(variant, part.axes, name, expected.shape, found.rank)
        if tuple(array.shape) != shape:
            return f"{name!r} has the shape {tuple(array.shape)}, and would fit with {shape}"
        if array.dtype != expected.dtype or jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            return f"{name!r} is {array.dtype}, and {jax.dtypes.canonicalize_dtype(expected.dtype)} in {other!r}"
    return None


def _refuse(problems: list[str]) -> None:
    if problems:
        raise AdapterError(
            "Expected leaves that can be stacked: at each path the same variant, apart from rank and scale, and the "
            f"same axes, shapes and dtypes; got {len(problems)} that cannot.\n{listed(problems, len(problems))}\n"
            "  Leave these adapters out, or train them with the same spec."
        )


def _member(templates: Mapping[str, Adapter], adapter: Adapters) -> Member:
    """Returns an adapter padded to the shapes of a stack."""
    trainable, settings = {}, {}
    for path, template in templates.items():
        part = adapter.get(path)
        given = {} if part is None else part.arrays
        arrays = {
            name: _padded(given[name], like.shape) if name in given else np.zeros(like.shape, like.dtype)
            for name, like in template.arrays.items()
        }
        trainable[path], settings[path] = Adapter(template.variant, template.axes, **arrays), Settings.of(part)
    return Member(trainable, settings)


def _padded(array: Any, shape: Sequence[int]) -> Any:
    pad: Any = np.pad if isinstance(array, np.ndarray) else jnp.pad
    widths = [(0, most - size) for size, most in zip(array.shape, shape, strict=True)]
    return pad(array, widths) if any(after for _, after in widths) else array
