"""Convolutions with an adapted kernel: the base's own, and beside it one to r channels and one from there on.

Each factor takes along the axes of the window that it has. Usually `a`, (window…, in, r), has them all, and `b`,
(r, out), acts on each position by itself. The groups of a grouped convolution share the factor that the input meets
first, as they share the kernel's input axis, so that `scale·a·b` is formed from the same factors.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from jax import Array, lax

from .._adapter import AdaptedKernel
from .._axes import RANK
from .._compat import primitives
from .._contract import Labelled, Labels, contract
from ._factored import factors
from ._interpreter import NoRule, Site, Value, rule

_GROUP = RANK - 1  # stands for the axis of the groups among the labels


@rule(primitives.conv_general_dilated_p)
def _conv_general_dilated(
    site: Site,
    lhs: Value,
    rhs: Value,
    *,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any,
    rhs_dilation: Any,
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
    precision: Any,
    preferred_element_type: Any,
    out_sharding: Any,
) -> Array:
    if not isinstance(rhs, AdaptedKernel) or (isinstance(lhs, AdaptedKernel) and not lhs.is_probe):
        raise NoRule("the adapted kernel is what is convolved")
    if batch_group_count != 1:
        raise NoRule("a convolution in groups of the batch")
    kernel = rhs
    w_out, w_in, *windows = dimension_numbers.rhs_spec
    roles = "".join("o" if axis == w_out else "i" for axis in range(kernel.w.ndim))
    its = "".join(kernel.roles)
    if not kernel.is_probe and ("b" in its or its[w_in] == its[w_out]):
        raise NoRule(f"the axes of the kernel there are {roles!r}, the adapter's are {its!r}")
    lhs = site.dense(lhs, "it is convolved")  # a probe: noted
    y = lax.conv_general_dilated(
        lhs,
        kernel.w,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    if kernel.is_probe:
        site.used(kernel, "factored", roles=roles)
        return y
    moves = map(_Move, window_strides, padding, lhs_dilation, rhs_dilation)
    steps = _Steps(
        dict(zip(windows, moves, strict=True)), dimension_numbers.out_spec, feature_group_count, precision, y.dtype
    )
    a, b = factors(kernel)
    first, second = (a, b) if its[w_in] == "i" else (b, a)
    x = Labelled(lhs, _labels(dimension_numbers.lhs_spec, w_in))
    thin, thin_operations = steps.step(x, first, w_in, RANK)
    low_rank, operations = steps.step(thin._replace(array=thin.array * kernel.scale), second, RANK, w_out)
    # Beside the two steps: the scale on the thin one, and the sum with the base's.
    operations += thin_operations + thin.array.size + y.size
    site.used(kernel, "factored", roles=roles, operations=operations)
    return y + low_rank.in_order(_labels(dimension_numbers.out_spec, w_out)).astype(y.dtype)


class _Move(NamedTuple):
    """How a window moves along a spatial axis."""

    stride: int
    padding: tuple[int, int]
    input_dilation: int
    dilation: int


_PLACE_BY_PLACE = _Move(1, (0, 0), 1, 1)  # what a window of size 1 does


def _labels(spec: tuple[int, ...], channel: int) -> Labels:
    """Labels an activation laid out as `spec` says (batch, channel, spatial): its channel, and the rest by place."""
    places = (spec.index(axis) for axis in range(len(spec)))
    return tuple(channel if place == 1 else len(spec) + place for place in places)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The two steps of a convolution by factors.

    Attributes:
      moves: how the window moves, for each of the kernel's axes that is one of the window's, in order.
      out_spec: the axes of what a step gives: batch, channel, spatial.
      groups: how many groups the channels are divided into.
      precision: as in `conv_general_dilated`.
      dtype: of the result.
    """

    moves: dict[int, _Move]
    out_spec: tuple[int, ...]
    groups: int
    precision: Any
    dtype: Any

    def step(self, x: Labelled, factor: Labelled, met: int, made: int) -> tuple[Labelled, int]:
        """Takes the channels of `x` from the label `met` to the label `made`; and the operations that this takes."""
        y = (self._shared if made == RANK else self._own)(x, factor, met, made)
        summed = factor.array.size // factor.array.shape[factor.labels.index(made)]
        return y, 2 * y.array.size * summed

    def _shared(self, x: Labelled, factor: Labelled, met: int, made: int) -> Labelled:
        """By one factor for all groups."""
        x = self._apart(x, met, (_GROUP, met))
        if self._has_no_window(factor):
            return contract(x, factor, keep=(), precision=self.precision)
        # Convolved alike, the groups are so many more examples; a convolution in groups takes far longer.
        batch = len(self.out_spec)
        y = self._convolve(self._together(x, (batch, _GROUP), batch), factor, met, made)
        return self._apart(y, batch, (batch, _GROUP))

    def _own(self, x: Labelled, factor: Labelled, met: int, made: int) -> Labelled:
        """By each group's part of a factor."""
        if self._has_no_window(factor):
            parts = self._apart(factor, made, (_GROUP, made))
            y = contract(x, parts, keep={_GROUP}, precision=self.precision, dtype=self.dtype)
            return self._together(y, (_GROUP, made), made)
        return self._convolve(self._together(x, (_GROUP, met), met), factor, met, made, groups=self.groups)

    def _has_no_window(self, factor: Labelled) -> bool:
        return self.moves.keys().isdisjoint(factor.labels)

    def _convolve(self, x: Labelled, factor: Labelled, met: int, made: int, *, groups: int = 1) -> Labelled:
        # The axes of the window that are the other factor's have size 1 here.
        absent = [axis for axis in self.moves if axis not in factor.labels]
        w_labels = (*factor.labels, *absent)
        moves = [_PLACE_BY_PLACE if axis in absent else move for axis, move in self.moves.items()]
        strides, padding, input_dilation, dilation = zip(*moves, strict=True)
        ndim = len(self.out_spec)
        y = lax.conv_general_dilated(
            x.array,
            lax.expand_dims(factor.array, range(factor.array.ndim, ndim)),
            strides,
            padding,
            lhs_dilation=input_dilation,
            rhs_dilation=dilation,
            dimension_numbers=lax.ConvDimensionNumbers(
                tuple(x.labels.index(label) for label in (ndim, met, *range(ndim + 2, 2 * ndim))),
                tuple(w_labels.index(label) for label in (made, met, *self.moves)),
                self.out_spec,
            ),
            feature_group_count=groups,
            precision=self.precision,
        )
        return Labelled(y, _labels(self.out_spec, made))

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
