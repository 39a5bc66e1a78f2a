"""What a rule acts on: a leaf that is followed through a program, with or without factors."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from .axes import RANK, axes_of_a, axes_of_b, axes_of_given
from .base import Base, abstract, apply_change, as_array, type_of
from .contract import Labeled, contract, widest
from .dropout import Dropout
from .placement import names_of
from .routing import Experts
from .stored import Change
from .uses import Use

Layout = Callable[[Sequence[str]], tuple[int, ...]]
MoveFactor = Callable[[Array, tuple[int, ...], tuple[int, ...]], Array]
Label = tuple[str, int]  # an axis of a leaf: the path and the index of the axis


class TrackedKernel(abc.ABC):
    """A leaf at some point of a program, after transposes, casts, slices and similar operations.

    Attributes:
      w: the base.
      roles: what is known about each axis of `w`.
      paths: the path of the leaf; several, if the model has concatenated leaves.
    """

    w: Base
    roles: tuple[Any, ...]
    paths: tuple[str, ...]

    @property
    @abc.abstractmethod
    def factors(self) -> dict[str, tuple[Array, Layout]]:
        """The factors by name, each with a function from roles to the kernel axis of each of its axes."""

    @abc.abstractmethod
    def role_of_new_axis(self, name: str) -> Any:
        """Returns the entry of `roles` for an axis that the program inserts; `name` is the role for a factor."""

    @abc.abstractmethod
    def for_use(self, index: Any) -> Self:
        """Returns the kernel for one of its uses, or for one iteration of a loop."""

    def moved(self, change: Change, roles: Sequence[Any], move: MoveFactor, *arrays: Array) -> Self:
        """Applies a change of axes to the base, and `move(factor, before, after)` to each factor.

        `before` and `after` are the kernel axis of each axis of the factor, `RANK` for the rank axis.
        """
        return self._with_moved_factors(apply_change(self.w, change, *arrays), roles, move)

    def with_base(self, change: Change, *arrays: Array) -> Self:
        """Applies to the base a change that does not affect the factors."""
        return dataclasses.replace(self, w=apply_change(self.w, change, *arrays))  # type: ignore[type-var]

    def with_array(self) -> Self:
        """Returns the kernel with its base as an array, dequantized if it is stored."""
        return dataclasses.replace(self, w=as_array(self.w))  # type: ignore[type-var]

    def _with_moved_factors(self, w: Base, roles: Sequence[Any], move: MoveFactor) -> Self:
        moved: dict[str, Any] = {}
        for name, (array, layout) in self.factors.items():
            before, after = layout(self.roles), layout(roles)
            function = functools.partial(_moved, move, before, after)
            for _ in range(array.ndim - len(before)):
                function = jax.vmap(function, in_axes=-1, out_axes=-1)
            moved[name] = function(array)
        return dataclasses.replace(self, w=w, roles=tuple(roles), **moved)  # type: ignore[type-var]


def _moved(move: MoveFactor, before: tuple[int, ...], after: tuple[int, ...], factor: Array) -> Array:
    return move(factor, before, after)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PlainKernel(TrackedKernel):
    """A leaf without factors: one whose uses are recorded, or a stored leaf.

    Attributes:
      w: the base.
      roles: for each axis of `w`, the axes of leaves that it comes from; empty for an axis that the program inserted.
      paths: the path of the leaf.
      lookup: the lookup that returned it; it counts as a use unless the result is used as a kernel.
    """

    w: Base
    roles: tuple[frozenset[Label], ...] = dataclasses.field(metadata={"static": True})
    paths: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    lookup: tuple[Use, ...] = dataclasses.field(default=(), metadata={"static": True})

    @classmethod
    def from_leaf(cls, path: str, w: Base) -> Self:
        """Returns a kernel for a leaf that the program has not changed yet."""
        return cls(w, tuple(frozenset({(path, axis)}) for axis in range(w.ndim)), (path,))

    @property
    def factors(self) -> dict[str, tuple[Array, Layout]]:
        """No factors."""
        return {}

    def role_of_new_axis(self, name: str) -> frozenset[Label]:
        """Returns the empty set: the axis comes from no leaf."""
        del name  # the same for all roles
        return frozenset()

    def for_use(self, index: Any) -> Self:
        """Returns the kernel itself."""
        del index  # there is no dropout
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedKernel(TrackedKernel):
    """A kernel that acts as `(w + scale·a·b) ⊙ gain` without materializing it.

    Attributes:
      w: the base.
      a: `(batch…, in…, rank)`; cast only where it is consumed.
      b: `(batch…, rank, out…)`; cast only where it is consumed.
      scale: s, a Python number.
      roles: the role of each axis of `w`.
      paths: the path of the leaf; several, if the model has concatenated kernels.
      dropout: dropout of the activations before `a`, or None.
      gain: `(batch…, 1, out…)`, a factor for each output, with axes as in `b`; None for 1.
      gain_role: `"o"`; `"i"` if the gain is `(batch…, in…, 1)`, a factor for each input, with axes as in `a`.
      experts: the experts to whom the ranks belong, in order, if they are weighted per token; empty otherwise.
      p: `(batch…, in…, experts)`, what routers multiply the activation with; None if there is none.
      given: `(experts, tokens…)`, the weights from the caller; None if there are none, or if only shapes are known.
      given_per_layer: whether `given` is `(batch…, experts, tokens…)`.
      split_inputs: inside a `shard_map`, the mesh axes over which the inputs of `p` are sharded.
      replicated: inside a `shard_map`, the mesh axes over which each factor is known to be replicated, by name.
    """

    w: Base
    a: Any
    b: Any
    scale: float = dataclasses.field(metadata={"static": True})
    roles: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    paths: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    dropout: Dropout | None = None
    gain: Any = None
    gain_role: str = dataclasses.field(default="o", metadata={"static": True})
    experts: tuple[Experts, ...] = dataclasses.field(default=(), metadata={"static": True})
    p: Any = None
    given: Any = None
    given_per_layer: bool = dataclasses.field(default=False, metadata={"static": True})
    split_inputs: frozenset[str] = dataclasses.field(default=frozenset(), metadata={"static": True})
    replicated: tuple[tuple[str, frozenset[str]], ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def abstract(self) -> Self:
        """The kernel with shapes in place of arrays, for functions that outlive the trace of these arrays."""
        w, a, b = map(abstract, (self.w, self.a, self.b))
        return dataclasses.replace(self, w=w, a=a, b=b, dropout=None, gain=None, p=None, given=None)

    @property
    def is_routed(self) -> bool:
        """Whether the factors have another weight at each token, so that they cannot be materialized."""
        return bool(self.experts)

    @property
    def factors(self) -> dict[str, tuple[Array, Layout]]:
        """`a`, `b`, and `gain`, `p` and `given` if the kernel has them, `given` only if it has the batch axes.

        The last axes of `given`, the tokens, are not axes of the kernel and are not in its layout.
        """
        layouts = {"a": axes_of_a, "b": axes_of_b, "gain": self.axes_of_gain, "p": axes_of_a}
        if self.given_per_layer:
            layouts["given"] = axes_of_given
        arrays = {name: getattr(self, name) for name in layouts}
        return {name: (array, layouts[name]) for name, array in arrays.items() if array is not None}

    @property
    def axes_of_gain(self) -> Layout:
        """A function from roles to the kernel axis of each axis of the gain."""
        return axes_of_a if self.gain_role == "i" else axes_of_b

    def role_of_new_axis(self, name: str) -> str:
        """Returns `name`."""
        return name

    def for_use(self, index: Any) -> Self:
        """Folds the index into the dropout key, so that each use has another mask."""
        return self if self.dropout is None else dataclasses.replace(self, dropout=self.dropout.fold_in(index))

    def replicated_over(self, name: str) -> frozenset[str]:
        """Returns the mesh axes over which a factor is known to be replicated."""
        return dict(self.replicated).get(name, frozenset())

    def with_replicated(self, axes: Mapping[str, Collection[str]]) -> Self:
        """Records the mesh axes over which the named factors are replicated."""
        known = dict(self.replicated) | {name: frozenset(mesh_axes) for name, mesh_axes in axes.items()}
        return dataclasses.replace(self, replicated=tuple(known.items()))

    def with_roles(self, roles: Sequence[str]) -> Self:
        """Changes roles of axes of size 1, by moving these axes from one factor to the other."""
        differ = {axis for axis, (old, new) in enumerate(zip(self.roles, roles, strict=True)) if old != new}

        def move(factor: Array, before: tuple[int, ...], after: tuple[int, ...]) -> Array:
            rest = lax.squeeze(factor, [i for i, axis in enumerate(before) if axis in differ])
            return lax.expand_dims(rest, [i for i, axis in enumerate(after) if axis in differ])

        return self._with_moved_factors(self.w, roles, move) if differ else self


def delta(kernel: AdaptedKernel, *, precision: Any = lax.Precision.HIGHEST) -> Array:
    """Materializes `scale·a·b`, with the axes of `w`, in the widest dtype of `w`, `a` and `b`, at least float32.

    The default precision is the highest, because accelerators multiply float32 in bfloat16 otherwise.
    """
    dtype = widest(kernel.w.dtype, kernel.a.dtype, kernel.b.dtype, jnp.float32)
    order = tuple(range(kernel.w.ndim))
    a = Labeled(kernel.a.astype(dtype) * kernel.scale, axes_of_a(kernel.roles))
    b = Labeled(kernel.b.astype(dtype), axes_of_b(kernel.roles))
    names = names_of(order, type_of(kernel.w))
    return contract(a, b, keep=order, precision=precision, names=names).in_order(order)


def materialize(kernel: TrackedKernel, *, precision: Any = lax.Precision.HIGHEST) -> Array:
    """Materializes `(w + scale·a·b) ⊙ gain` in at least float32, and casts once to the dtype of `w`."""
    w = as_array(kernel.w)
    if not isinstance(kernel, AdaptedKernel):
        return w
    change = delta(kernel, precision=precision)
    total = w.astype(change.dtype) + change
    if kernel.gain is not None:
        gain = gain_of(kernel).expand_to(tuple(range(w.ndim)))
        dtype = widest(total.dtype, gain.dtype)
        total = total.astype(dtype) * gain.astype(dtype)
    return total.astype(w.dtype)


def gain_of(kernel: AdaptedKernel) -> Labeled:
    """Returns the gain without its rank axis, labeled with the kernel's axes."""
    axes = kernel.axes_of_gain(kernel.roles)
    rank = axes.index(RANK)
    return Labeled(lax.squeeze(kernel.gain, [rank]), (*axes[:rank], *axes[rank + 1 :]))
