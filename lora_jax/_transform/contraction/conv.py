"""A convolution with the factors of a kernel: one step to r channels, and one to the output channels.

Each step convolves along the window axes that its factor has. Usually `a`, (window…, in, r), has them all, and `b`,
(r, out), is a product at each position. The groups of a grouped convolution share the first factor, as they share the
kernel's input axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax import Array, lax

from ..._core.axes import RANK, axes_of_a, axes_of_b
from ..._core.contract import Labeled, Labels, computable, contract, sharding_of_product
from ..._core.kernel import AdaptedKernel
from ..._core.placement import names_of
from .costs import Costs, Passes
from .factored import labeled_factors, thin_dtype
from .routing import weigh

_GROUP = RANK - 1  # the label of the axis of groups


class WindowAxis(NamedTuple):
    """The parameters of a convolution along one spatial axis."""

    stride: int
    padding: tuple[int, int]
    input_dilation: int
    dilation: int


_POINTWISE = WindowAxis(1, (0, 0), 1, 1)


def _labels(spec: Sequence[int], channel: int) -> Labels:
    """The labels of an activation with the layout `spec` (batch, channel, spatial), given that of its channels."""
    positions = (spec.index(axis) for axis in range(len(spec)))
    return tuple(channel if position == 1 else len(spec) + position for position in positions)


@dataclasses.dataclass(frozen=True)
class FactoredConv:
    """A convolution with an adapted kernel, as two steps.

    Attributes:
      kernel: the abstract kernel.
      window: the parameters along each window axis of the kernel, by its number, in order.
      numbers: as `dimension_numbers` in `conv_general_dilated`.
      groups: the number of feature groups.
      precision: as in `conv_general_dilated`.
      like: the type of the result.
      padding: the name of the padding if sizes are symbolic; None for the padding of `window`.
    """

    kernel: AdaptedKernel
    window: dict[int, WindowAxis]
    numbers: lax.ConvDimensionNumbers
    groups: int
    precision: Any
    like: Any
    padding: str | None = None

    @property
    def a_first(self) -> bool:
        """Whether `a` has the axis that is contracted with the channels of the input."""
        return self.kernel.roles[self.numbers.rhs_spec[1]] == "i"

    @property
    def labels(self) -> tuple[Labels, Labels]:
        """The labels of the axes of the input, and of the result."""
        w_out, w_in, *_ = self.numbers.rhs_spec
        return _labels(self.numbers.lhs_spec, w_in), _labels(self.numbers.out_spec, w_out)

    def low_rank(self, x: Array, a: Array, b: Array, weights: Labeled | None = None, /) -> Array:
        """Convolves `x` with `scale·a·b` by its factors."""
        w_out, w_in, *_ = self.numbers.rhs_spec
        into, out = self.labels
        # A convolution has operands of one dtype.
        dtype = thin_dtype(x.dtype, self.kernel.w.dtype, self.like.dtype)
        factors = [
            factor._replace(array=factor.array.astype(dtype))
            for factor in labeled_factors(dataclasses.replace(self.kernel, a=a, b=b))
        ]
        first, second = factors if self.a_first else factors[::-1]
        thin = self._step(Labeled(x.astype(dtype), into), first, w_in, RANK)
        thin = thin if weights is None else weigh(thin, weights)
        y = self._step(thin._replace(array=thin.array * self.kernel.scale), second, RANK, w_out)
        return y.in_order(out).astype(computable(self.like.dtype))

    def x_times_a(self, x: Array, a: Array) -> Labeled:
        """Convolves `x` with `a` only, if `a` is the first factor."""
        w_in = self.numbers.rhs_spec[1]
        precise = dataclasses.replace(self, precision=lax.Precision.HIGHEST)
        labeled = Labeled(x, _labels(self.numbers.lhs_spec, w_in))
        return precise._step(labeled, Labeled(a, axes_of_a(self.kernel.roles)), w_in, RANK)

    def costs(self, x: Sequence[int], y: Sequence[int]) -> Costs:
        """Counts the FLOPs of the convolution, given the shapes of the input and of the result."""
        w, rank = self.kernel.w.shape, self.kernel.a.shape[-1]
        w_out, w_in, *windows = self.numbers.rhs_spec
        factors = axes_of_a(self.kernel.roles), axes_of_b(self.kernel.roles)
        first, second = (
            [axis for axis in windows if axis in factor] for factor in (factors if self.a_first else factors[::-1])
        )
        # After the first step, the window axes of its factor have the sizes of y, the others those of x.
        positions = [
            y[at_y] if axis in first else x[at_x]
            for axis, at_x, at_y in zip(windows, self.numbers.lhs_spec[2:], self.numbers.out_spec[2:], strict=True)
        ]
        thin = x[self.numbers.lhs_spec[0]] * math.prod(positions) * rank * self.groups

        def passes(windows: Sequence[int], size_of_x: int, size_of_y: int, c_in: int, c_out: int) -> Passes:
            window = math.prod(w[axis] for axis in windows)
            forward = 2 * size_of_y * window * c_in
            # The gradient of x multiplies the zeros between the strides, too.
            return Passes(forward, 2 * size_of_x * window * c_out if windows else forward, forward)

        size_of_x, size_of_y, c_in, c_out = math.prod(x), math.prod(y), w[w_in], w[w_out] // self.groups
        return Costs(
            base=passes(windows, size_of_x, size_of_y, c_in, c_out),
            first=passes(first, size_of_x, thin, c_in, rank),
            second=passes(second, thin, size_of_y, rank, c_out),
            delta=2 * math.prod(w) * rank,
            x=size_of_x,
            y=size_of_y,
            thin=thin,
            adding=self.kernel.a.size + math.prod(w),
        )

    def _step(self, x: Labeled, factor: Labeled, c_in: int, c_out: int) -> Labeled:
        """Convolves `x` with a factor, from channels with the label `c_in` to channels with the label `c_out`."""
        return (self._first_step if c_out == RANK else self._second_step)(x, factor, c_in, c_out)

    def _first_step(self, x: Labeled, factor: Labeled, c_in: int, c_out: int) -> Labeled:
        """Convolves with the factor that all groups share."""
        x = self._split_groups(x, c_in, (_GROUP, c_in))
        if self._has_no_window(factor):
            return contract(x, factor, keep=(), precision=self.precision)
        # The groups become part of the batch, which is much faster than a grouped convolution.
        batch = len(self.numbers.out_spec)
        y = self._convolve(self._merge_groups(x, (batch, _GROUP), batch), factor, c_in, c_out)
        return self._split_groups(y, batch, (batch, _GROUP))

    def _second_step(self, x: Labeled, factor: Labeled, c_in: int, c_out: int) -> Labeled:
        """Convolves each group with its part of the factor."""
        if self._has_no_window(factor):
            parts = self._split_groups(factor, c_out, (_GROUP, c_out))
            y = contract(
                x, parts, keep={_GROUP}, precision=self.precision, dtype=computable(self.like.dtype), names=self._names
            )
            return self._merge_groups(y, (_GROUP, c_out), c_out)
        x = self._merge_groups(x, (_GROUP, c_in), c_in)
        return self._convolve(x, factor, c_in, c_out, groups=self.groups, names=self._names)

    @property
    def _names(self) -> dict[int, Any]:
        """The mesh axes of the result, by label, if its type has a sharding."""
        return names_of(_labels(self.numbers.out_spec, self.numbers.rhs_spec[0]), self.like)

    def _has_no_window(self, factor: Labeled) -> bool:
        return self.window.keys().isdisjoint(factor.labels)

    def _convolve(
        self,
        x: Labeled,
        factor: Labeled,
        c_in: int,
        c_out: int,
        *,
        groups: int = 1,
        names: Mapping[int, Any] | None = None,
    ) -> Labeled:
        # Window axes that only the other factor has get size 1.
        absent = [axis for axis in self.window if axis not in factor.labels]
        w_labels = (*factor.labels, *absent)
        window = [_POINTWISE if axis in absent else parameters for axis, parameters in self.window.items()]
        strides, padding, input_dilation, dilation = zip(*window, strict=True)
        ndim = len(self.numbers.out_spec)
        labels = _labels(self.numbers.out_spec, c_out)
        y = lax.conv_general_dilated(
            x.array,
            lax.expand_dims(factor.array, range(factor.array.ndim, ndim)),
            strides,
            self.padding or padding,
            lhs_dilation=input_dilation,
            rhs_dilation=dilation,
            dimension_numbers=lax.ConvDimensionNumbers(
                tuple(x.labels.index(label) for label in (ndim, c_in, *range(ndim + 2, 2 * ndim))),
                tuple(w_labels.index(label) for label in (c_out, c_in, *self.window)),
                self.numbers.out_spec,
            ),
            feature_group_count=groups,
            precision=self.precision,
            out_sharding=sharding_of_product(x, factor, labels, names),
        )
        return Labeled(y, labels)

    def _split_groups(self, x: Labeled, label: int, parts: tuple[int, int]) -> Labeled:
        """Splits the axis with a label into two with the labels `parts`, one of which is `_GROUP`."""
        if self.groups == 1:
            return x
        at, shape = x.labels.index(label), x.array.shape
        sizes = [self.groups if part == _GROUP else shape[at] // self.groups for part in parts]
        array = lax.reshape(x.array, (*shape[:at], *sizes, *shape[at + 1 :]))
        return Labeled(array, (*x.labels[:at], *parts, *x.labels[at + 1 :]))

    def _merge_groups(self, x: Labeled, parts: tuple[int, int], label: int) -> Labeled:
        """Merges the axes with the labels `parts` into one with the given label."""
        if self.groups == 1:
            return x
        labels = tuple(other for other in x.labels if other != _GROUP)
        at = labels.index(label)
        array = x.in_order((*labels[:at], *parts, *labels[at + 1 :]))
        return Labeled(lax.collapse(array, at, at + 2), labels)
