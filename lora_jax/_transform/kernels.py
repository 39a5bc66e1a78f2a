"""Reads from the traced model how every leaf is used: the roles of its axes, the operations, how often."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from .._core.base import base_of
from .._core.kernel import Label, PlainKernel
from .._core.uses import Evidence, Kernel, Use
from .._errors import refuse_keywords
from .kinds import kinds
from .origins import origins
from .program import Program, trace, watch
from .settings import Settings


def kernels(
    apply: Callable[..., Any],
    params: Any,
    /,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    **unexpected: Any,
) -> dict[str, Kernel]:
    """Finds by tracing how `apply` uses each leaf of `params`; nothing is evaluated.

    An axis that is summed with the activation, or from which rows are looked up, is an input (`i`); one that both share
    and keep, or from which a scan or an index takes kernels, is a batch (`b`); the rest are outputs (`o`).

    Where uses differ, those decide in which the leaf meets activations, which depend on `args` and `kwargs`; else those
    in which it meets activations that it has itself a part in, as a head does that is tied to an embedding; else those
    in which it meets constants and parameters, as in a power iteration. Among these the model's own operations come
    before those of a derivative that JAX takes backwards. What the model computes and drops counts, too. If the uses
    that decide differ, there are no roles: `unknown` lists them, and `init` asks for `axes=` in the spec.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params = {"query": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))}
    >>> apply = lambda p, x: jnp.einsum("td,dhk->thk", x, p["query"]) + p["bias"]
    >>> found = lj.kernels(apply, params, jnp.ones((5, 8)))
    >>> found["query"].axes, found["query"].uses[0].primitive, found["bias"].axes
    ('ioo', 'dot_general', None)

    Args:
      apply: the model, `apply(params, *args, **kwargs)`.
      params: the parameter tree, or its shapes and dtypes.
      *args: the model's positional arguments; arrays may be `ShapeDtypeStruct`s.
      kwargs: the model's keyword arguments, likewise.
      **unexpected: none; the model's keyword arguments are in `kwargs`.

    Returns:
      A `Kernel` for every leaf that is an array, by path; leaves that the call does not use have no uses.

    Raises:
      TypeError: for a keyword argument that is not in `kwargs`.
      TracingError: if Python code of the model needs the value of an array.
    """
    refuse_keywords("kernels", unexpected)
    program = trace(apply, params, args, kwargs or {})
    return found_in(program, list(program.arrays_of_params))


def found_in(program: Program, paths: Collection[str]) -> dict[str, Kernel]:
    """What `kernels` finds of some leaves."""
    every = program.arrays_of_params
    leaves = {path: leaf for path, leaf in every.items() if path in paths}
    watched = {path: PlainKernel.from_leaf(path, base_of(leaf)) for path, leaf in leaves.items()}
    uses = by_path(watch(program, watched, Settings(origins=origins(program.jaxpr, list(every)))))
    kind = kinds(program.jaxpr, list(every))
    return {path: _kernel(path, leaf, uses.get(path, []), kind[path]) for path, leaf in leaves.items()}


def by_path(uses: Sequence[Use]) -> dict[str, list[Use]]:
    """The uses of each leaf."""
    of_each: dict[str, list[Use]] = collections.defaultdict(list)
    for use in uses:
        of_each[use.path].append(use)
    return of_each


def _kernel(path: str, leaf: Any, uses: Sequence[Use], kind: str | None) -> Kernel:
    """A leaf with the roles in which the uses that say most agree, or the reason why there are none."""
    live = tuple(use for use in uses if use.live)
    labels = [(path, axis) for axis in range(leaf.ndim)]
    said = [(use, roles) for use in uses if (roles := _leaf_roles(use, labels)) is not None]
    most = max((use.evidence for use, _ in said), default=_NONE)
    deciding = [(use, roles) for use, roles in said if use.evidence == most]
    axes, unknown = None, ""
    if most > _NONE and all(agree(roles, deciding[0][1], leaf.shape) for _, roles in deciding):
        axes = _completed(deciding[0][1], leaf.shape)
    else:
        unknown = _why_unknown(live, deciding)
    return Kernel(tuple(leaf.shape), leaf.dtype, axes, live, unknown, kind)


_NONE = Evidence(0, forward=False)  # a derivative for a constant, which may be that of any use


def agree(one: str, other: str, shape: Sequence[int]) -> bool:
    """Whether two uses give the same roles to all axes but those of size 1, which hold nothing."""
    return all(a == b or size == 1 for a, b, size in zip(one, other, shape, strict=True))


def _completed(roles: str, shape: Sequence[int]) -> str:
    """The roles with an axis of size 1 as the output, or the input, that would be missing; it may be either."""
    for missing, place in (("o", -1), ("i", 0)):
        free = [at for at, size in enumerate(shape) if size == 1 and (roles[at] == "b" or roles.count(roles[at]) > 1)]
        if missing not in roles and free:
            at = free[place]
            roles = f"{roles[:at]}{missing}{roles[at + 1 :]}"
    return roles


def _why_unknown(uses: Sequence[Use], deciding: Sequence[tuple[Use, str]]) -> str:
    if deciding and deciding[0][0].evidence == _NONE:
        return f"it is used in derivatives alone, at {deciding[0][0].line}"
    if deciding:
        first = dict.fromkeys(roles for _, roles in deciding)
        lines = {roles: next(use for use, its in deciding if its == roles) for roles in first}
        return "its uses disagree\n" + "\n".join(
            f"    {roles!r} by `{use.primitive}` at {use.line}" for roles, use in lines.items()
        )
    if not uses:
        return "the call that was traced does not use it"
    use = uses[0]
    if use.kind == "opaque":
        return f"`{use.primitive}` reads it whole first, at {use.line}"
    return f"`{use.primitive}` gives none, or gives one axis two roles, at {use.line}"


def _leaf_roles(use: Use, labels: Sequence[Label]) -> str | None:
    """The role of each of a leaf's axes in one use; None if the use gives none, or gives one axis two."""
    if use.axes is None:
        return None
    found = {label: {role for at, role in use.axes if label in at} for label in labels}
    if any(len(roles) > 1 for roles in found.values()):
        return None
    # An axis that is no longer there was taken apart: by a scan, or by an index.
    return "".join(next(iter(roles), "b") for roles in found.values())
