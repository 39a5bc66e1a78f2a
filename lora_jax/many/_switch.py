"""Merged weights that move from one node of a tree of adapters to another."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .._core.adapter import Adapter
from .._core.attach import check
from .._core.paths import flatten, unflatten
from .._core.values import in_device_memory
from .._errors import MergeError, listed
from .._merge.fold import add, keep_float64, subtract
from .._merge.merge import check_arrays, check_mergeable, check_tied, merge
from .._variants import Full
from ._select import BASE
from ._tree import Tree, Walk

_ADVICE = "Dequantize it first: place(quant.dequantize(params), tree)."
_UNTIE = "Place a tree in which {path!r} is a copy."


@dataclasses.dataclass(frozen=True, eq=False)
class Merged:
    """Parameters with the adapters down to one node of a tree merged. `place` and `switch` make it.

    Attributes:
      tree: the tree.
      name: the node.
      params: the merged parameters, for the unmodified model, or as the base of an adapter that becomes a child.
      kept: for each node down to this one, the leaves that its adapter changed, as they were before. Leaves of the base
        are its own arrays, not copies. None if nothing is kept.
      drift: without kept leaves, a bound on the absolute error of the elements of each leaf that has been changed.
    """

    tree: Tree
    name: str
    params: Any
    kept: tuple[Mapping[str, Any], ...] | None
    drift: Mapping[str, float]

    def __repr__(self) -> str:
        drift = f"drift={max(self.drift.values(), default=0.0):.3g}"
        return f"Merged({self.name!r}, {drift if self.kept is None else 'exact'})"


def place(params: Any, tree: Tree, *, exact: bool = True) -> Merged:
    """Returns the base as the place in a tree that `switch` starts from. Copies nothing.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=1, alpha=1)})
    >>> lj.many.place(params, lj.many.tree({"chat": ("base", adapter)}))
    Merged('base', exact)

    Args:
      params: the base.
      tree: from `tree`.
      exact: whether `switch` keeps the leaves that it changes, to restore them bit for bit. The memory is that of the
        base and of the adapted leaves of each node down to the current one. Without, it is that of the base, and
        switching adds and subtracts the updates, whose rounding errors accumulate.

    Returns:
      The place.

    Raises:
      AdapterError: if an adapter does not fit `params`.
      MergeError: if an adapted leaf is quantized, or another path holds the same array; for a variant that acts on some
        tokens only; without `exact` for one that replaces or scales a leaf, such as DoRA.
    """
    leaves = flatten(params)[0]
    for adapter in tree.adapters.values():
        check(leaves, adapter)
        check_mergeable(adapter)
        check_arrays(leaves, adapter, advice=_ADVICE)
        check_tied(leaves, adapter, advice=_UNTIE)
    bad = [
        f"{path!r} of {name!r}: {part.variant}"
        for name, adapter in tree.adapters.items()
        for path, part in adapter.items()
        if not (exact or part.variant.adds)
    ]
    if bad:
        raise MergeError(
            f"Expected variants that add to a leaf, so that they can be subtracted; {len(bad)} replace or scale one.\n"
            f"{listed(bad)}\n  Call place(params, tree, exact=True), which keeps the leaves."
        )
    return Merged(tree, BASE, params, () if exact else None, {})


def switch(merged: Merged, name: str, *, donate: bool = False) -> Merged:
    """Moves merged weights to another node: removes adapters up to the lowest common ancestor, merges those down.

    With kept leaves the result is that of merging the adapters one after another into the base, bit for bit. Otherwise
    each leaf is changed once, by the updates in float32 or wider, and cast once; `drift` bounds the sum of the rounding
    errors since `place`.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> part = lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=jnp.ones((2, 1)), b=jnp.ones((1, 2)))
    >>> tree = lj.many.tree({"chat": ("base", {"kernel": part}), "polite": ("chat", {"kernel": part})})
    >>> base = lj.many.place({"kernel": jnp.zeros((2, 2))}, tree)
    >>> polite = lj.many.switch(base, "polite")
    >>> polite, float(polite.params["kernel"][0, 0])
    (Merged('polite', exact), 2.0)
    >>> lj.many.switch(polite, "base").params["kernel"] is base.params["kernel"]
    True

    Args:
      merged: from `place` or `switch`.
      name: the node to move to; `BASE` is the base.
      donate: reuse or free the arrays of `merged` that the result does not hold. They must not be used afterwards.
        With kept leaves those of the base are never freed; without, the base's own arrays are reused.

    Returns:
      The place at the node. Leaves that no adapter on the way changes are the same arrays.

    Raises:
      AdapterError: for an unknown name.
      MergeError: as `merge`; if a leaf overflows its dtype.
    """
    walk = merged.tree.walk(merged.name, name)
    if merged.kept is None:
        return _switch_approximately(merged, name, walk, donate=donate)
    common = len(merged.kept) - len(walk.up)
    old, treedef = flatten(merged.params)
    leaves = dict(old)
    for saved in reversed(merged.kept[common:]):
        leaves |= saved
    if donate:
        _free(merged, common, old, leaves)
    params, kept = unflatten(treedef, leaves), merged.kept[:common]
    for node in walk.down:
        adapter = merged.tree.adapters[node]
        kept = (*kept, {path: leaves[path] for path in adapter})
        params = merge(params, adapter)
        leaves = flatten(params)[0]
    return Merged(merged.tree, name, params, kept, {})


def _free(merged: Merged, common: int, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Deletes the arrays that going up has replaced."""
    assert merged.kept is not None
    adapters = [merged.tree.adapters[node] for node in merged.tree.path(merged.name)]
    # The merged leaf of a Full is the array of its adapter.
    full = {path for adapter in adapters for path, part in adapter.items() if isinstance(part.variant, Full)}
    held = {id(leaf) for leaf in new.values()}
    for leaves in (old, *merged.kept[common:]):
        for path, leaf in leaves.items():
            if isinstance(leaf, Array) and id(leaf) not in held and path not in full:
                leaf.delete()


def _switch_approximately(merged: Merged, name: str, walk: Walk, *, donate: bool) -> Merged:
    leaves, treedef = flatten(merged.params)
    adapters = merged.tree.adapters
    drift, changed = dict(merged.drift), dict(leaves)
    for path in {path: None for node in (*walk.up, *walk.down) for path in adapters[node]}:
        up, down = ([adapters[node][path] for node in nodes if path in adapters[node]] for nodes in walk)
        changed[path], bound = _changed(leaves[path], up, down, donate=donate)
        drift[path] = drift.get(path, 0.0) + bound
    if bad := [repr(path) for path, bound in drift.items() if not math.isfinite(bound)]:
        raise MergeError(
            f"Expected finite factors and merged leaves that fit their dtype; {len(bad)} leaves are not finite.\n"
            f"{listed(bad)}\n  Cast the base to a wider dtype, or place the base again without this adapter."
        )
    return Merged(merged.tree, name, unflatten(treedef, changed), None, drift)


def _changed(w: Any, up: list[Adapter], down: list[Adapter], *, donate: bool) -> tuple[Any, float]:
    """Returns a leaf after a walk, of the same type, sharding and memory kind, and a bound on the rounding errors."""
    with keep_float64(w):
        if not isinstance(w, Array):
            new, bound = _jitted(None, donate=False)(w, up, down)
            return np.asarray(new), float(bound)
        on_device = in_device_memory(w)
        new, bound = _jitted(on_device.sharding, donate=donate)(on_device, up, down)
        return jax.device_put(new, w.sharding), float(bound)


@functools.cache
def _jitted(sharding: Any, *, donate: bool) -> Callable[..., tuple[Array, Array]]:
    return jax.jit(_apply, out_shardings=(sharding, None), donate_argnums=(0,) if donate else ())


def _apply(w: Array, up: list[Adapter], down: list[Adapter]) -> tuple[Array, Array]:
    total, largest = w, jnp.max(jnp.abs(w), initial=0)
    bound: Any = 0
    for change, parts in ((subtract, up), (add, down)):
        for part in parts:
            total = change(total, part)
            largest = jnp.maximum(largest.astype(total.dtype), jnp.max(jnp.abs(total), initial=0))
            # The error of the sum, and the difference of two programs that compute one update.
            bound += 4 * float(jnp.finfo(total.dtype).eps) * largest
    new = total.astype(w.dtype)
    if new.dtype != total.dtype:
        info = jnp.finfo(w.dtype)
        magnitude = jnp.max(jnp.abs(new.astype(total.dtype)), initial=0)
        bound += jnp.maximum(float(info.eps) / 2 * magnitude, float(info.smallest_subnormal))
    return new, bound
