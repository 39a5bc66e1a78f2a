"""A convolution by factors: one step to r channels, and one from there on.

Each factor takes along the axes of the window that it has. Usually `a`, (window…, in, r), has them all, and `b`,
(r, out), acts on each position by itself. The groups of a grouped convolution share the factor that the input meets
first, as they share the kernel's input axis, so that `scale·a·b` is formed from the same factors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax import Array, lax

from ..._core.axes import RANK, axes_of_a, axes_of_b
from ..._core.contract import Labelled, Labels, computable, contract, sharding_of_product
from ..._core.kernel import AdaptedKernel
from ..._core.placement import names_of
from .costs import Costs, Passes
from .factored import factors, thin_dtype

_GROUP = RANK - 1  # stands for the axis of the groups among the labels


class Move(NamedTuple):
    """How a window moves along a spatial axis."""

    stride: int
    padding: tuple[int, int]
    input_dilation: int
    dilation: int


_PLACE_BY_PLACE = Move(1, (0, 0), 1, 1)  # what a window of size 1 does


def _labels(spec: Sequence[int], channel: int) -> Labels:
    """Labels an activation laid out as `spec` says (batch, channel, spatial): its channel, and the rest by place."""
    places = (spec.index(axis) for axis in range(len(spec)))
    return tuple(channel if place == 1 else len(spec) + place for place in places)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The two steps of a convolution with an adapted kernel.

    Attributes:
      kernel: the outline of the adapted kernel; its factors are given in each call.
      moves: how the window moves, for each of the kernel's axes that is one of the window's, in order.
      numbers: which axes of the input, the kernel and the result are what.
      groups: how many groups the channels are divided into.
      precision: as in `conv_general_dilated`.
      like: the type of the result.
      padding: its name, where the sizes are symbolic; it says the same of each step. None for that of `moves`.
    """

    kernel: AdaptedKernel
    moves: dict[int, Move]
    numbers: lax.ConvDimensionNumbers
    groups: int
    precision: Any
    like: Any
    padding: str | None = None

    @property
    def a_first(self) -> bool:
        """Whether `a` has the axis that the channels of the input meet."""
        return self.kernel.roles[self.numbers.rhs_spec[1]] == "i"

    @property
    def labels(self) -> tuple[Labels, Labels]:
        """Of the axes of the input, and of the result."""
        w_out, w_in, *_ = self.numbers.rhs_spec
        return _labels(self.numbers.lhs_spec, w_in), _labels(self.numbers.out_spec, w_out)

    def low_rank(self, x: Array, a: Array, b: Array) -> Array:
        """The convolution of `x` with `scale·a·b`, which is not formed."""
        w_out, w_in, *_ = self.numbers.rhs_spec
        into, out = self.labels
        # A convolution has operands of one dtype.
        dtype = thin_dtype(x.dtype, self.kernel.w.dtype, self.like.dtype)
        both = [
            factor._replace(array=factor.array.astype(dtype))
            for factor in factors(dataclasses.replace(self.kernel, a=a, b=b))
        ]
        first, second = both if self.a_first else both[::-1]
        thin = self._step(Labelled(x.astype(dtype), into), first, w_in, RANK)
        y = self._step(thin._replace(array=thin.array * self.kernel.scale), second, RANK, w_out)
        return y.in_order(out).astype(computable(self.like.dtype))

    def thin(self, x: Array, a: Array) -> Array:
        """The convolution of `x` with `a` alone, where `a` is what it meets first."""
        w_in = self.numbers.rhs_spec[1]
        precise = dataclasses.replace(self, precision=lax.Precision.HIGHEST)
        met = Labelled(x, _labels(self.numbers.lhs_spec, w_in))
        return precise._step(met, Labelled(a, axes_of_a(self.kernel.roles)), w_in, RANK).array

    def costs(self, x: Sequence[int], y: Sequence[int]) -> Costs:
        """The operations of the convolution, for the shapes of the input and of the result."""
        w, rank = self.kernel.w.shape, self.kernel.a.shape[-1]
        w_out, w_in, *windows = self.numbers.rhs_spec
        both = axes_of_a(self.kernel.roles), axes_of_b(self.kernel.roles)
        first, second = ([axis for axis in windows if axis in its] for its in (both if self.a_first else both[::-1]))
        # The first step has gone to the places of y along the axes of the window that it has taken.
        places = [
            y[at_y] if axis in first else x[at_x]
            for axis, at_x, at_y in zip(windows, self.numbers.lhs_spec[2:], self.numbers.out_spec[2:], strict=True)
        ]
        thin = x[self.numbers.lhs_spec[0]] * math.prod(places) * rank * self.groups

        def passes(windows: Sequence[int], size_of_x: int, size_of_y: int, met: int, made: int) -> Passes:
            window = math.prod(w[axis] for axis in windows)
            forward = 2 * size_of_y * window * met
            # Back to x the zeros between the strides count, as those of a dilated input do.
            return Passes(forward, 2 * size_of_x * window * made if windows else forward, forward)

        size_of_x, size_of_y, met, made = math.prod(x), math.prod(y), w[w_in], w[w_out] // self.groups
        return Costs(
            base=passes(windows, size_of_x, size_of_y, met, made),
            first=passes(first, size_of_x, thin, met, rank),
            second=passes(second, thin, size_of_y, rank, made),
            formed=2 * math.prod(w) * rank,
            x=size_of_x,
            y=size_of_y,
            thin=thin,
            sums=self.kernel.a.size + math.prod(w),
        )

    def _step(self, x: Labelled, factor: Labelled, met: int, made: int) -> Labelled:
        """Takes the channels of `x` from the label `met` to the label `made`."""
        return (self._shared if made == RANK else self._own)(x, factor, met, made)

    def _shared(self, x: Labelled, factor: Labelled, met: int, made: int) -> Labelled:
        """By one factor for all groups."""
        x = self._apart(x, met, (_GROUP, met))
        if self._has_no_window(factor):
            return contract(x, factor, keep=(), precision=self.precision)
        # Convolved alike, the groups are so many more examples; a convolution in groups takes far longer.
        batch = len(self.numbers.out_spec)
        y = self._convolve(self._together(x, (batch, _GROUP), batch), factor, met, made)
        return self._apart(y, batch, (batch, _GROUP))

    def _own(self, x: Labelled, factor: Labelled, met: int, made: int) -> Labelled:
        """By each group's part of a factor."""
        if self._has_no_window(factor):
            parts = self._apart(factor, made, (_GROUP, made))
            y = contract(
                x, parts, keep={_GROUP}, precision=self.precision, dtype=computable(self.like.dtype), names=self._names
            )
            return self._together(y, (_GROUP, made), made)
        together = self._together(x, (_GROUP, met), met)
        return self._convolve(together, factor, met, made, groups=self.groups, names=self._names)

    @property
    def _names(self) -> dict[int, Any]:
        """Where the axes of the result are, by label, if its type says so."""
        return names_of(_labels(self.numbers.out_spec, self.numbers.rhs_spec[0]), self.like)

    def _has_no_window(self, factor: Labelled) -> bool:
        return self.moves.keys().isdisjoint(factor.labels)

    def _convolve(
        self,
        x: Labelled,
        factor: Labelled,
        met: int,
        made: int,
        *,
        groups: int = 1,
        names: Mapping[int, Any] | None = None,
    ) -> Labelled:
        # The axes of the window that are the other factor's have size 1 here.
        absent = [axis for axis in self.moves if axis not in factor.labels]
        w_labels = (*factor.labels, *absent)
        moves = [_PLACE_BY_PLACE if axis in absent else move for axis, move in self.moves.items()]
        strides, padding, input_dilation, dilation = zip(*moves, strict=True)
        ndim = len(self.numbers.out_spec)
        labels = _labels(self.numbers.out_spec, made)
        y = lax.conv_general_dilated(
            x.array,
            lax.expand_dims(factor.array, range(factor.array.ndim, ndim)),
            strides,
            self.padding or padding,
            lhs_dilation=input_dilation,
            rhs_dilation=dilation,
            dimension_numbers=lax.ConvDimensionNumbers(
                tuple(x.labels.index(label) for label in (ndim, met, *range(ndim + 2, 2 * ndim))),
                tuple(w_labels.index(label) for label in (made, met, *self.moves)),
                self.numbers.out_spec,
            ),
            feature_group_count=groups,
            precision=self.precision,
            out_sharding=sharding_of_product(x, factor, labels, names),
        )
        return Labelled(y, labels)

    def _apart(self, x: Labelled, label: int, parts: tuple[int, int]) -> Labelled:
        """Takes the groups out of an axis, in front of the rest of it or behind, as `parts` are ordered."""
        if self.groups == 1:
            return x
        at, shape = x.labels.index(label), x.array.shape
        sizes = [self.groups if part == _GROUP else shape[at] // self.groups for part in parts]
        cut = lax.reshape(x.array, (*shape[:at], *sizes, *shape[at + 1 :]))
        return Labelled(cut, (*x.labels[:at], *parts, *x.labels[at + 1 :]))

    def _together(self, x: Labelled, parts: tuple[int, int], label: int) -> Labelled:
        """Puts the groups back."""
        if self.groups == 1:
            return x
        labels = tuple(its for its in x.labels if its != _GROUP)
        at = labels.index(label)
        beside = x.in_order((*labels[:at], *parts, *labels[at + 1 :]))
        return Labelled(lax.collapse(beside, at, at + 2), labels)
