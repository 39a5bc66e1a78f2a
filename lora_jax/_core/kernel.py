"""What a rule acts on: a leaf on its way through a program, with its factors or without."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from .axes import RANK, axes_of_a, axes_of_b
from .base import Base, Change, abstract, as_array, changed, type_of
from .contract import Labelled, contract, widest
from .dropout import Dropout
from .placement import names_of
from .uses import Use

Layout = Callable[[Sequence[str]], tuple[int, ...]]
Move = Callable[[Array, tuple[int, ...], tuple[int, ...]], Array]
Label = tuple[str, int]  # an axis of a leaf: its path and the number of the axis


class TrackedKernel(abc.ABC):
    """A leaf, as the model sees it at some point of a program: moved, cast, sliced.

    Attributes:
      w: its base.
      roles: for each axis of `w` what is known of it.
      paths: the leaf that it is; several, where the model has put leaves side by side.
    """

    w: Base
    roles: tuple[Any, ...]
    paths: tuple[str, ...]

    @property
    @abc.abstractmethod
    def factors(self) -> dict[str, tuple[Array, Layout]]:
        """Its factors by name, and for each which of the kernel's axes its own are, given the roles."""

    @abc.abstractmethod
    def role(self, name: str) -> Any:
        """What is known of an axis that the program has inserted, which for a kernel with factors has this role."""

    @abc.abstractmethod
    def in_use(self, number: Any) -> Self:
        """The kernel in one of its uses, or in an iteration of a loop."""

    def moved(self, change: Change, roles: Sequence[Any], move: Move, *arrays: Array) -> Self:
        """The kernel after a change of its axes: `move(factor, before, after)` makes the same change to a factor.

        `before` and `after` say which of the kernel's axes the factor's axes are, by number (`RANK` for the rank axis).
        """
        return self._with(changed(self.w, change, *arrays), roles, move)

    def with_base(self, change: Change, *arrays: Array) -> Self:
        """The kernel after a change of its base, of which its factors know nothing."""
        return dataclasses.replace(self, w=changed(self.w, change, *arrays))  # type: ignore[type-var]

    def with_array(self) -> Self:
        """The kernel with an array for its base."""
        return dataclasses.replace(self, w=as_array(self.w))  # type: ignore[type-var]

    def _with(self, w: Base, roles: Sequence[Any], move: Move) -> Self:
        after = tuple(roles)
        moved: dict[str, Any] = {
            name: move(array, layout(self.roles), layout(after)) for name, (array, layout) in self.factors.items()
        }
        return dataclasses.replace(self, w=w, roles=after, **moved)  # type: ignore[type-var]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PlainKernel(TrackedKernel):
    """A leaf without factors, of which the uses are watched, or which is stored in another form.

    Attributes:
      w: its base.
      roles: for each axis of `w` the axes of leaves that it comes from; none, if the program has inserted it.
      paths: the leaf that it is.
      lookup: the lookup that it comes from, which is a use of it unless it is used as a kernel.
    """

    w: Base
    roles: tuple[frozenset[Label], ...] = dataclasses.field(metadata={"static": True})
    paths: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    lookup: tuple[Use, ...] = dataclasses.field(default=(), metadata={"static": True})

    @classmethod
    def of(cls, path: str, w: Base) -> Self:
        """A leaf, each of its axes labelled by itself."""
        return cls(w, tuple(frozenset({(path, axis)}) for axis in range(w.ndim)), (path,))

    @property
    def factors(self) -> dict[str, tuple[Array, Layout]]:
        """None."""
        return {}

    def role(self, name: str) -> frozenset[Label]:
        """No axis of a leaf."""
        del name
        return frozenset()

    def in_use(self, number: Any) -> Self:
        """The same in all of them."""
        del number
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedKernel(TrackedKernel):
    """A kernel that acts as `(w + scale·a·b) ⊙ gain`, which is not materialized.

    Attributes:
      w: the base kernel.
      a: `(batch…, in…, rank)`, kept in its own dtype until it is consumed.
      b: `(batch…, rank, out…)`, likewise.
      scale: s, a Python number.
      roles: the role of each axis of `w`.
      paths: the leaf that it is; several, where the model has put kernels side by side.
      dropout: of the activations that meet the factors; None where there is none.
      gain: `(batch…, 1, out…)`, one number for each output, in place of the rank; None for 1.
      active: `(…, tokens)`, which tokens the factors act on; None for all.
      replicated: inside a `shard_map`, the axes of the mesh over which a factor is known to be the same, by name.
    """

    w: Base
    a: Any
    b: Any
    scale: float = dataclasses.field(metadata={"static": True})
    roles: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    paths: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    dropout: Dropout | None = None
    gain: Any = None
    active: Any = None
    replicated: tuple[tuple[str, frozenset[str]], ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def abstract(self) -> Self:
        """The kernel with shapes in place of its arrays, for functions that outlive the trace that made these."""
        w, a, b = map(abstract, (self.w, self.a, self.b))
        return dataclasses.replace(self, w=w, a=a, b=b, dropout=None, gain=None, active=None)

    @property
    def factors(self) -> dict[str, tuple[Array, Layout]]:
        """`a`, `b`, and the gain, if there is one."""
        layouts = {"a": axes_of_a, "b": axes_of_b, "gain": axes_of_b}
        arrays = {name: getattr(self, name) for name in layouts}
        return {name: (array, layouts[name]) for name, array in arrays.items() if array is not None}

    def role(self, name: str) -> str:
        """That role."""
        return name

    def in_use(self, number: Any) -> Self:
        """With a dropout of its own in each of them."""
        return self if self.dropout is None else dataclasses.replace(self, dropout=self.dropout.folded(number))

    def replicated_over(self, name: str) -> frozenset[str]:
        """The axes of the mesh over which a factor is known to be the same."""
        return dict(self.replicated).get(name, frozenset())

    def with_replicated(self, axes: Mapping[str, Collection[str]]) -> Self:
        """The kernel of which is known, for the factors named, over which axes of the mesh they are the same."""
        known = dict(self.replicated) | {name: frozenset(mesh_axes) for name, mesh_axes in axes.items()}
        return dataclasses.replace(self, replicated=tuple(known.items()))

    def with_roles(self, roles: Sequence[str]) -> Self:
        """The kernel with other roles of axes of size 1, which hold nothing: either factor may have them."""
        differ = {axis for axis, (one, other) in enumerate(zip(self.roles, roles, strict=True)) if one != other}

        def move(factor: Array, before: tuple[int, ...], after: tuple[int, ...]) -> Array:
            rest = lax.squeeze(factor, [place for place, axis in enumerate(before) if axis in differ])
            return lax.expand_dims(rest, [place for place, axis in enumerate(after) if axis in differ])

        return self._with(self.w, roles, move) if differ else self


def delta(kernel: AdaptedKernel, *, precision: Any = lax.Precision.HIGHEST) -> Array:
    """Materializes `scale·a·b`, axes as in `w`, in float32 or the widest dtype among `w`, `a` and `b`.

    The precision is the highest unless another is asked for: accelerators would multiply float32 in bfloat16.
    """
    dtype = widest(kernel.w.dtype, kernel.a.dtype, kernel.b.dtype, jnp.float32)
    order = tuple(range(kernel.w.ndim))
    a = Labelled(kernel.a.astype(dtype) * kernel.scale, axes_of_a(kernel.roles))
    b = Labelled(kernel.b.astype(dtype), axes_of_b(kernel.roles))
    names = names_of(order, type_of(kernel.w))
    return contract(a, b, keep=order, precision=precision, names=names).in_order(order)


def materialize(kernel: TrackedKernel, *, precision: Any = lax.Precision.HIGHEST) -> Array:
    """Materializes `(w + scale·a·b) ⊙ gain`, in float32 at least, and casts once to the dtype of `w`."""
    w = as_array(kernel.w)
    if not isinstance(kernel, AdaptedKernel):
        return w
    change = delta(kernel, precision=precision)
    total = w.astype(change.dtype) + change
    if kernel.gain is not None:
        gain = gain_of(kernel).beside(tuple(range(w.ndim)))
        dtype = widest(total.dtype, gain.dtype)
        total = total.astype(dtype) * gain.astype(dtype)
    return total.astype(w.dtype)


def gain_of(kernel: AdaptedKernel) -> Labelled:
    """The gain, each axis labelled by the kernel's that it goes along."""
    axes = axes_of_b(kernel.roles)
    at = axes.index(RANK)
    return Labelled(lax.squeeze(kernel.gain, [at]), (*axes[:at], *axes[at + 1 :]))
