"""A convolution by factors: one step to r channels, and one from there on.

Each factor takes along the axes of the window that it has. Usually `a`, (window…, in, r), has them all, and `b`,
(r, out), acts on each position by itself. The groups of a grouped convolution share the factor that the input meets
first, as they share the kernel's input axis, so that `scale·a·b` is formed from the same factors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from .._adapter import AdaptedKernel
from .._axes import RANK, axes_of_a, axes_of_b
from .._contract import Labelled, Labels, contract
from ._factored import factors
from ._plan import Costs, Passes

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
      kernel: the adapted kernel; its factors are given anew in each call.
      moves: how the window moves, for each of the kernel's axes that is one of the window's, in order.
      numbers: which axes of the input, the kernel and the result are what.
      groups: how many groups the channels are divided into.
      precision: as in `conv_general_dilated`.
      dtype: of the result.
    """

    kernel: AdaptedKernel
    moves: dict[int, Move]
    numbers: lax.ConvDimensionNumbers
    groups: int
    precision: Any
    dtype: Any

    @property
    def a_first(self) -> bool:
        """Whether `a` has the axis that the channels of the input meet."""
        return self.kernel.roles[self.numbers.rhs_spec[1]] == "i"

    def low_rank(self, x: Array, a: Array, b: Array) -> Array:
        """The convolution of `x` with `scale·a·b`, which is not formed."""
        w_out, w_in, *_ = self.numbers.rhs_spec
        both = factors(dataclasses.replace(self.kernel, a=a, b=b))
        first, second = both if self.a_first else both[::-1]
        thin = self._step(Labelled(x, _labels(self.numbers.lhs_spec, w_in)), first, w_in, RANK)
        return self._step(thin._replace(array=thin.array * self.kernel.scale), second, RANK, w_out).array

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
        has_window = not self.moves.keys().isdisjoint(factor.labels)
        array = (self._convolve if has_window else self._multiply)(x, factor, met, made)
        return Labelled(array, _labels(self.numbers.out_spec, made))

    def _convolve(self, x: Labelled, factor: Labelled, met: int, made: int) -> Array:
        w = factor.array
        if made == RANK and self.groups > 1:
            # Shared by the groups: once for each, one after the other along the channel that it makes.
            w = jnp.tile(w, [self.groups if label == made else 1 for label in factor.labels])
        # The axes of the window that are the other factor's have size 1 here.
        absent = [axis for axis in self.moves if axis not in factor.labels]
        w_labels = (*factor.labels, *absent)
        spatial = range(len(self.numbers.out_spec) + 2, 2 * len(self.numbers.out_spec))
        moves = [_PLACE_BY_PLACE if axis in absent else move for axis, move in self.moves.items()]
        strides, padding, input_dilation, dilation = zip(*moves, strict=True)
        y = lax.conv_general_dilated(
            x.array,
            lax.expand_dims(w, range(w.ndim, len(w_labels))),
            strides,
            padding,
            lhs_dilation=input_dilation,
            rhs_dilation=dilation,
            dimension_numbers=lax.ConvDimensionNumbers(
                tuple(x.labels.index(label) for label in (len(self.numbers.out_spec), met, *spatial)),
                tuple(w_labels.index(label) for label in (made, met, *self.moves)),
                self.numbers.out_spec,
            ),
            feature_group_count=self.groups,
            precision=self.precision,
        )
        return y if made == RANK else y.astype(self.dtype)

    def _multiply(self, x: Labelled, factor: Labelled, met: int, made: int) -> Array:
        """A factor without a window: a product, position by position and group by group."""
        own = factor if made == RANK else self._cut(factor, made)
        channel = (_GROUP, made) if self.groups > 1 else (made,)
        out = _labels(self.numbers.out_spec, made)
        at = out.index(made)
        dtype = None if made == RANK else self.dtype
        y = contract(self._cut(x, met), own, keep={_GROUP, *out}, precision=self.precision, dtype=dtype).in_order(
            (*out[:at], *channel, *out[at + 1 :])
        )
        return lax.collapse(y, at, at + len(channel))

    def _cut(self, x: Labelled, label: int) -> Labelled:
        """Takes the axis of the groups out of an axis that has them one after the other."""
        if self.groups == 1:
            return x
        at, shape = x.labels.index(label), x.array.shape
        cut = lax.reshape(x.array, (*shape[:at], self.groups, shape[at] // self.groups, *shape[at + 1 :]))
        return Labelled(cut, (*x.labels[:at], _GROUP, *x.labels[at:]))
