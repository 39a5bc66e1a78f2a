"""The three forms of a contraction with an adapted kernel, as functions of arrays, and the one that is taken.

    factored   y = x·W0 + ((x·A)·s)·B
    merged     y = x·W,   W = W0 + s·A·B
    hybrid     y = x·W,   dy = dx·W + x·dW0 + ((x·dA)·s)·B + ((x·A)·s)·dB

All have the same values and derivatives. Where no form is the best in every case, the choice waits until the
contraction is differentiated: only then is it known whose gradient is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from .._adapter import AdaptedKernel, materialise
from ._plan import INFERENCE, TRAINING, Asked, Costs, Form, always_factored, plan

Evaluate = Callable[[Array, Array, Array, Array], Array]  # x, w, a, b -> y


class Sum(NamedTuple):
    """What the base gives and the low-rank term, not added yet.

    A bias that the model adds next is added to the base's part first. The compiler can then let each of the two
    products accumulate onto what is there, and needs no array for the low-rank term by itself.
    """

    base: Array
    low_rank: Array

    def plus(self, x: Any) -> Array:
        """The sum, and what the model adds to it."""
        return (self.base + x) + self.low_rank


def settled(value: Any) -> Any:
    """What is not added yet, added; any other value as it is."""
    return value.base + value.low_rank if isinstance(value, Sum) else value


class Contraction(NamedTuple):
    """A bilinear operation of `x` and a kernel.

    Attributes:
      base: `base(x, w)`: the operation itself.
      low_rank: `low_rank(x, a, b)`: the same with `s·a·b`, which is not formed.
      costs: the operations of its products.
      precision: of its products.
    """

    base: Callable[[Array, Array], Array]
    low_rank: Callable[[Array, Array, Array], Array]
    costs: Costs
    precision: Any


def wanted(kernel: AdaptedKernel, costs: Costs, form: Form | None) -> Form | None:
    """The form that a contraction takes whatever is asked of it; None where that depends.

    Args:
      kernel: the adapted kernel.
      costs: of the contraction.
      form: what the caller wants for all of them; None for the cheapest.
    """
    if form is not None:
        return form
    # In 16 bits the sum of W0 and a small update is W0 again: what has been learnt would be rounded away.
    if jnp.finfo(kernel.w.dtype).bits < 32 or always_factored(costs):
        return Form.FACTORED
    return None


def in_training(kernel: AdaptedKernel, costs: Costs, form: Form | None) -> Form:
    """The form in a training step that asks for the gradients of `x`, `a` and `b`."""
    return wanted(kernel, costs, form) or plan(costs, TRAINING)


def contract(kernel: AdaptedKernel, x: Array, contraction: Contraction, form: Form | None) -> Array | Sum:
    """The contraction of `x` with an adapted kernel, in the form that is wanted or else in the cheapest."""
    its = wanted(kernel, contraction.costs, form)
    if its is Form.FACTORED:
        return Sum(contraction.base(x, kernel.w), contraction.low_rank(x, kernel.a, kernel.b))
    forms = _forms(kernel, contraction)
    function = forms[its] if its else _planned(forms, contraction.costs)
    return function(x, kernel.w, kernel.a, kernel.b)


def _forms(kernel: AdaptedKernel, contraction: Contraction) -> dict[Form, Evaluate]:
    base, low_rank, _, precision = contraction

    def formed(w: Array, a: Array, b: Array) -> Array:
        return materialise(dataclasses.replace(kernel, w=w, a=a, b=b), precision=precision)

    def factored(x: Array, w: Array, a: Array, b: Array) -> Array:
        return base(x, w) + low_rank(x, a, b)

    def merged(x: Array, w: Array, a: Array, b: Array) -> Array:
        return base(x, formed(w, a, b))

    def tangents(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
        (x, w, a, b), (dx, dw, da, db) = primals, tangents
        kernel = formed(w, a, b)
        terms = [
            (dx, lambda: base(dx, kernel)),
            (dw, lambda: base(x, dw)),
            (da, lambda: low_rank(x, da, b)),
            (db, lambda: low_rank(x, a, db)),
        ]
        parts = [term() for tangent, term in terms if not isinstance(tangent, SymbolicZero)]
        return base(x, kernel), sum(parts[1:], start=parts[0])

    hybrid = jax.custom_jvp(merged)
    hybrid.defjvp(tangents, symbolic_zeros=True)
    return {
        Form.FACTORED: factored,
        Form.HYBRID: hybrid,
        Form.MERGED: merged,
        Form.HYBRID_AGAIN: jax.checkpoint(hybrid),
        Form.MERGED_AGAIN: jax.checkpoint(merged),
    }


def _planned(forms: dict[Form, Evaluate], costs: Costs) -> Evaluate:
    """Evaluates in one form or another, by what is differentiated."""

    @jax.custom_jvp
    def planned(x: Array, w: Array, a: Array, b: Array) -> Array:
        return forms[plan(costs, INFERENCE)](x, w, a, b)

    def tangents(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
        asked = Asked(*(not isinstance(tangent, SymbolicZero) for tangent in tangents))
        function = forms[plan(costs, asked)]

        def of_moving(*moving: Array) -> Array:
            its = iter(moving)
            return function(*(next(its) if moves else x for moves, x in zip(asked, primals, strict=True)))

        moving = [x for moves, x in zip(asked, primals, strict=True) if moves]
        return jax.jvp(of_moving, moving, [tangent for tangent in tangents if not isinstance(tangent, SymbolicZero)])

    planned.defjvp(tangents, symbolic_zeros=True)
    return planned
