"""Reads from the traced model how every leaf is used: the roles of its axes, the operations, how often."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from ._adapter import AdaptedKernel
from ._transform import Settings, trace, watch
from ._use import Kernel, Use


def kernels(apply: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> dict[str, Kernel]:
    """Finds by tracing how `apply` uses each leaf of `params`; nothing is evaluated.

    An axis that is summed with the activation, or from which rows are looked up, is an input (`i`); one that both share
    and keep, or from which a scan or an index takes kernels, is a batch (`b`); the rest are outputs (`o`).

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params = {"query": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))}
    >>> apply = lambda p, x: jnp.einsum("td,dhk->thk", x, p["query"]) + p["bias"]
    >>> found = lj.kernels(apply, params, jnp.ones((5, 8)))
    >>> found["query"].axes, found["query"].uses[0].primitive, found["bias"].axes
    ('ioo', 'dot_general', None)

    Args:
      apply: the model, `apply(params, *args, **kwargs)`.
      params: the parameter tree, or its shapes and dtypes.
      *args: as the model takes them; arrays may be `ShapeDtypeStruct`s.
      **kwargs: likewise.

    Returns:
      A `Kernel` for every leaf that is an array, by path; leaves that the call does not use have no uses.
    """
    program = trace(apply, params, args, kwargs)
    leaves = program.arrays_of_params
    ends = itertools.accumulate(leaf.ndim for leaf in leaves.values())
    probes = {
        path: probe(path, leaf, first=end - leaf.ndim) for (path, leaf), end in zip(leaves.items(), ends, strict=True)
    }
    uses = watch(program, probes, Settings())
    found = {}
    for path, leaf in leaves.items():
        its = tuple(use for use in uses if use.path == path)
        roles = (axes for use in its if (axes := _leaf_roles(use, probes[path].roles)) is not None)
        found[path] = Kernel(tuple(leaf.shape), leaf.dtype, next(roles, None), its)
    return found


def probe(path: str, leaf: Any, *, first: int = 0) -> AdaptedKernel:
    """Stands for a leaf that is not adapted; its axes go by labels of their own wherever the program moves them.

    Leaves that the program may put side by side are told apart by the `first` of their labels.
    """
    labels = tuple(chr(ord("0") + first + axis) for axis in range(leaf.ndim))
    return AdaptedKernel(leaf, None, None, scale=1.0, roles=labels, paths=(path,))


def _leaf_roles(use: Use, labels: Sequence[str]) -> str | None:
    """The role of each of a leaf's axes in one use; None if the use gives none, or gives one axis two."""
    if use.axes is None:
        return None
    found = {label: {role for at, role in use.axes if label in at} for label in labels}
    if any(len(roles) > 1 for roles in found.values()):
        return None
    # An axis that is no longer there was taken apart: by a scan, or by an index.
    return "".join(next(iter(roles), "b") for roles in found.values())
