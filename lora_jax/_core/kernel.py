"""What a rule acts on: a kernel with its factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from .axes import RANK, axes_of_a, axes_of_b
from .contract import Labelled, contract, widest
from .dropout import Dropout
from .uses import Use

Layout = Callable[[Sequence[str]], tuple[int, ...]]
Move = Callable[[Array, tuple[int, ...], tuple[int, ...]], Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedKernel:
    """A kernel that acts as `(w + scale·a·b) ⊙ gain` and is never formed.

    Attributes:
      w: the base kernel, as the model sees it at this point of the program: moved, cast, sliced.
      a: `(batch…, in…, rank)`, kept in its own dtype until it is consumed. None in a probe, which stands for a leaf
        that is not adapted and of which only the use is watched.
      b: `(batch…, rank, out…)`, likewise.
      scale: s, a Python number.
      roles: the role of each axis of `w`; in a probe, the numbers of the leaf's axes that the axis came from.
      paths: the leaf it is; several, where the model has put kernels side by side.
      dropout: of the activations that meet the factors; None where there is none.
      gain: `(batch…, 1, out…)`, one number for each output, in place of the rank; None for 1.
      active: `(…, tokens)`, which tokens the factors act on; None for all.
      look_up: of a probe, the look-up that it comes from, which is a use of it unless it is used as a kernel.
      replicated: inside a `shard_map`, the axes of the mesh over which a factor is known to be the same, by name.
    """

    w: Array
    a: Any
    b: Any
    scale: float = dataclasses.field(metadata={"static": True})
    roles: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    paths: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    dropout: Dropout | None = None
    gain: Any = None
    active: Any = None
    look_up: tuple[Use, ...] = dataclasses.field(default=(), metadata={"static": True})
    replicated: tuple[tuple[str, frozenset[str]], ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def outline(self) -> Self:
        """The kernel with shapes in place of its arrays, for functions that outlive the trace that made these."""
        w, a, b = map(_outline, (self.w, self.a, self.b))
        return dataclasses.replace(self, w=w, a=a, b=b, dropout=None, gain=None, active=None)

    def in_use(self, number: Any) -> Self:
        """The kernel in one of its uses, or in a turn of a loop: with a dropout of its own."""
        return self if self.dropout is None else dataclasses.replace(self, dropout=self.dropout.folded(number))

    @property
    def is_probe(self) -> bool:
        """Whether it only stands for a leaf that is not adapted."""
        return self.a is None

    @property
    def factors(self) -> dict[str, tuple[Array, Layout]]:
        """What it has beside `w`, by name, and for each which of the kernel's axes its own are, given the roles."""
        layouts = {"a": axes_of_a, "b": axes_of_b, "gain": axes_of_b}
        arrays = {name: getattr(self, name) for name in layouts}
        return {name: (array, layouts[name]) for name, array in arrays.items() if array is not None}

    def replicated_over(self, name: str) -> frozenset[str]:
        """The axes of the mesh over which a factor is known to be the same."""
        return dict(self.replicated).get(name, frozenset())

    def with_replicated(self, axes: Mapping[str, Collection[str]]) -> Self:
        """The kernel of which is known, for the factors named, over which axes of the mesh they are the same."""
        known = dict(self.replicated) | {name: frozenset(its) for name, its in axes.items()}
        return dataclasses.replace(self, replicated=tuple(known.items()))

    def moved(self, w: Array, roles: Sequence[str], move: Move) -> AdaptedKernel:
        """The kernel after a change of its axes: `move(factor, before, after)` makes the same change to a factor.

        `before` and `after` say which of the kernel's axes the factor's axes are, by number (`RANK` for the rank axis).
        """
        after = tuple(roles)
        moved: dict[str, Any] = {
            name: move(array, layout(self.roles), layout(after)) for name, (array, layout) in self.factors.items()
        }
        return dataclasses.replace(self, w=w, roles=after, **moved)

    def with_roles(self, roles: Sequence[str]) -> AdaptedKernel:
        """The kernel with other roles of axes of size 1, which hold nothing: either factor may have them."""

        changed = {axis for axis, (one, other) in enumerate(zip(self.roles, roles, strict=True)) if one != other}

        def move(factor: Array, before: tuple[int, ...], after: tuple[int, ...]) -> Array:
            rest = lax.squeeze(factor, [place for place, axis in enumerate(before) if axis in changed])
            return lax.expand_dims(rest, [place for place, axis in enumerate(after) if axis in changed])

        return self.moved(self.w, roles, move) if changed else self


def _outline(x: Array) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def delta(kernel: AdaptedKernel, *, precision: Any = lax.Precision.HIGHEST) -> Array:
    """Forms `scale·a·b`, axes as in `w`, in float32 or the widest dtype among `w`, `a` and `b`.

    The precision is the highest unless another is asked for: accelerators would multiply float32 in bfloat16.
    """
    dtype = widest(kernel.w.dtype, kernel.a.dtype, kernel.b.dtype, jnp.float32)
    order = tuple(range(kernel.w.ndim))
    a = Labelled(kernel.a.astype(dtype) * kernel.scale, axes_of_a(kernel.roles))
    b = Labelled(kernel.b.astype(dtype), axes_of_b(kernel.roles))
    names = Labelled(kernel.w, order).names
    return contract(a, b, keep=order, precision=precision, names=names).in_order(order)


def materialise(kernel: AdaptedKernel, *, precision: Any = lax.Precision.HIGHEST) -> Array:
    """Forms `(w + scale·a·b) ⊙ gain`, in float32 at least, and casts once to the dtype of `w`; a probe is its `w`."""
    if kernel.is_probe:
        return kernel.w
    change = delta(kernel, precision=precision)
    total = kernel.w.astype(change.dtype) + change
    if kernel.gain is not None:
        gain = gain_of(kernel).beside(tuple(range(kernel.w.ndim)))
        dtype = widest(total.dtype, gain.dtype)
        total = total.astype(dtype) * gain.astype(dtype)
    return total.astype(kernel.w.dtype)


def gain_of(kernel: AdaptedKernel) -> Labelled:
    """The gain, each axis labelled by the kernel's that it goes along."""
    axes = axes_of_b(kernel.roles)
    at = axes.index(RANK)
    return Labelled(lax.squeeze(kernel.gain, [at]), (*axes[:at], *axes[at + 1 :]))
