"""The three forms of a contraction with an adapted kernel, as functions of arrays, and the one that is taken.

    factored   y = x·W0 + ((x·A)·s)·B
    merged     y = x·W,   W = W0 + s·A·B
    hybrid     y = x·W,   dy = dx·W + x·dW0 + ((x·dA)·s)·B + ((x·A)·s)·dB

All have the same values and derivatives. Where no form is the best in every case, the choice waits until the
contraction is differentiated: only then is it known whose gradient is asked for.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from ..._core.base import Recorded, apply_to_base
from ..._core.contract import Labelled, Labels, is_narrow, widest
from ..._core.kernel import AdaptedKernel, gain_of, materialize
from .costs import INFERENCE, TRAINING, Asked, Costs, Form, always_factored, cheapest
from .tokens import of_active

# While another `lora` traces this one, its program is made of plain operations, which have rules. JAX knows it: what
# it has cached of the model's inner functions outside is not found inside.
traced_again = jax.make_user_context(default_value=False)


def custom_jvp_works(arrays: Sequence[Any]) -> bool:
    """Whether the transformations around a call support a `custom_jvp` of its arrays; `jax.experimental.jet` does not.

    Called only where something has failed: JAX has no way to ask, so that one is tried.
    """

    def double(*arrays: Array) -> list[Array]:
        return [x + x for x in arrays]

    function = jax.custom_jvp(double)
    function.defjvp(lambda primals, tangents: (double(*primals), double(*tangents)))
    try:
        function(*(x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)))
    except Exception:
        return False
    return True


class Sum(NamedTuple):
    """What the base gives and the low-rank term, not added yet.

    A bias that the model adds next is added to the base's part first. The compiler can then let each of the two
    products accumulate onto what is there, and needs no array for the low-rank term by itself. Where the base's is
    narrow, the low-rank term is in bfloat16, and so is the sum, before it is cast or the model casts it.
    """

    base: Array
    low_rank: Array

    @property
    def total(self) -> Array:
        """The sum, in the dtype of the low-rank term."""
        return self.base.astype(self.low_rank.dtype) + self.low_rank

    def plus(self, x: Any) -> Array:
        """The sum, and what the model adds to it."""
        if not is_narrow(self.base.dtype):
            return (self.base + x) + self.low_rank
        return (self.total + jnp.asarray(x).astype(self.low_rank.dtype)).astype(self.base.dtype)

    def cast(self, dtype: Any) -> Sum:
        """The same in another dtype."""
        return Sum(self.base.astype(dtype), self.low_rank.astype(dtype))

    def waits_for(self, primitive: str) -> bool:
        """Whether an operation takes it before it is added."""
        return primitive == "add" or (primitive == "convert_element_type" and is_narrow(self.base.dtype))


def add_pending(value: Any) -> Any:
    """What is not added yet, added; any other value as it is."""
    return value.total.astype(value.base.dtype) if isinstance(value, Sum) else value


class Contraction(NamedTuple):
    """A bilinear operation of `x` and a kernel.

    Attributes:
      base: `base(x, w)`: the operation itself.
      low_rank: `low_rank(x, a, b)`: the same with `s·a·b`, which is not formed.
      thin: `thin(x, a)`: the product of rank r with `a` alone, in the dtype of the two, and the highest precision.
      costs: the operations of its products.
      precision: of its products.
      x: the labels of the axes of `x`: one that meets an axis of the kernel has its number.
      y: likewise of the result.
      narrow: whether `x`, the kernel or the result has fewer than 16 bits.
    """

    base: Callable[[Array, Array], Array]
    low_rank: Callable[[Array, Array, Array], Array]
    thin: Callable[[Array, Array], Array]
    costs: Costs
    precision: Any
    x: Labels
    y: Labels
    narrow: bool


def wanted(kernel: AdaptedKernel, contraction: Contraction, form: Form | None) -> Form | None:
    """The form that a contraction takes whatever is asked of it; None where that depends.

    Args:
      kernel: the adapted kernel.
      contraction: with it.
      form: what the caller wants for all of them; None for the cheapest.
    """
    if contraction.narrow:  # the other forms would compute the factors' gradients in fewer than 16 bits
        return Form.FACTORED
    if form is not None:
        return form
    if isinstance(kernel.w, Recorded):  # a merged kernel would be dense, and kept
        return Form.FACTORED
    # In 16 bits the sum of W0 and a small update is W0 again: what has been learnt would be rounded away.
    if jnp.finfo(kernel.w.dtype).bits < 32 or always_factored(contraction.costs) or traced_again.value:
        return Form.FACTORED
    return None


def in_training(kernel: AdaptedKernel, contraction: Contraction, form: Form | None) -> Form:
    """The form in a training step that asks for the gradients of `x`, `a` and `b`."""
    return wanted(kernel, contraction, form) or cheapest(contraction.costs, TRAINING)


def contract(kernel: AdaptedKernel, x: Array, contraction: Contraction, form: Form | None) -> Array | Sum:
    """The contraction of `x` with an adapted kernel, in the form that is wanted or else in the cheapest (`cheapest`).

    A gain is that of the outputs: `x·(K ⊙ g) = (x·K) ⊙ g`. Where they are summed, as by a tied head, they are those of
    `x`: `y·(K ⊙ g)ᵀ = (y ⊙ g)·Kᵀ`.
    """
    if kernel.gain is None:
        return _contract(kernel, x, contraction, form)
    gain, plain = _gain(kernel), dataclasses.replace(kernel, gain=None)
    if not set(gain.labels) <= set(contraction.y):
        return _contract(plain, times(x, gain.expand_to(contraction.x)), contraction, form)
    g = gain.expand_to(contraction.y)
    if kernel.dropout is None:
        return times(_contract(plain, x, contraction, form), g)
    # As in DoRA's own code: what the gain changes of the base's part sees what is dropped, too.
    base, dropped = _base(kernel, x, contraction), kernel.dropout.apply(x)
    seen = _base(kernel, dropped, contraction)
    return base + (times(seen + contraction.low_rank(dropped, kernel.a, kernel.b), g) - seen)


def times(y: Array | Sum, gain: Array) -> Array:
    """The product, in the wider of the two dtypes, as what `y` is."""
    total, like = (y.total, y.base) if isinstance(y, Sum) else (y, y)
    dtype = widest(total.dtype, gain.dtype)
    return (total.astype(dtype) * gain.astype(dtype)).astype(like.dtype)


def _gain(kernel: AdaptedKernel) -> Labelled:
    """The gain without axes of size 1, along which there is one number for all."""
    gain = gain_of(kernel)
    ones = [place for place, size in enumerate(gain.array.shape) if size == 1]
    return Labelled(lax.squeeze(gain.array, ones), tuple(x for at, x in enumerate(gain.labels) if at not in ones))


def gain_misfit(kernel: AdaptedKernel, contraction: Contraction, x: Array) -> str | None:
    """Why a contraction cannot take the gain of a kernel, or None.

    The outputs that have one are all kept, or all summed, with an `x` that has them one by one. A narrow `x` is not
    multiplied with anything: its dtype may not hold the result.
    """
    if kernel.gain is None:
        return None
    if kernel.dropout is not None and contraction.narrow:
        return "a product in fewer than 16 bits in which something is dropped, of a kernel that has a gain"
    if set(labels := _gain(kernel).labels) <= set(contraction.y):
        return None
    if is_narrow(x.dtype):
        return "a product in fewer than 16 bits over the outputs that have a gain"
    sizes = dict(zip(contraction.x, x.shape, strict=True))
    if all(sizes.get(label) == kernel.w.shape[label] for label in labels):
        return None
    return "of the outputs that have a gain, some are summed"


def _contract(kernel: AdaptedKernel, x: Array, contraction: Contraction, form: Form | None) -> Array | Sum:
    low_rank, costs = contraction.low_rank, contraction.costs
    if kernel.dropout is not None or kernel.active is not None:  # what the base sees is not what the factors see
        seen = x if kernel.dropout is None else kernel.dropout.apply(x)
        term = low_rank(seen, kernel.a, kernel.b)
        term = term if kernel.active is None else of_active(kernel, term, contraction.y)
        return Sum(_base(kernel, x, contraction), term)
    its = wanted(kernel, contraction, form)
    if its is Form.FACTORED:
        return Sum(_base(kernel, x, contraction), low_rank(x, kernel.a, kernel.b))
    kernel, forms = kernel.with_array(), _Forms(kernel.abstract, contraction)
    if its is Form.MERGED:
        return forms.merged(x, kernel.w, kernel.a, kernel.b)
    rules: dict[Form, Rule] = {
        Form.FACTORED: functools.partial(_jvp, forms.factored),
        Form.MERGED: functools.partial(_jvp, forms.merged),
        Form.HYBRID: forms.hybrid,
    }
    merges = (its or cheapest(costs, INFERENCE)) is not Form.FACTORED
    function = jax.custom_jvp(forms.merged if merges else forms.factored)

    def tangents(primals: Operands, tangents: Operands) -> tuple[Array, Array]:
        x, _, a, b = (not isinstance(tangent, SymbolicZero) for tangent in tangents)
        return rules[its or cheapest(costs, Asked(x, a, b))](primals, tangents)

    function.defjvp(tangents, symbolic_zeros=True)
    return function(x, kernel.w, kernel.a, kernel.b)


def _base(kernel: AdaptedKernel, x: Array, contraction: Contraction) -> Array:
    product: Array = apply_to_base(lambda w, x: contraction.base(x, w), kernel.w, x)
    return product


Operands = tuple[Any, Any, Any, Any]  # x, w, a, b; or their tangents, which may be symbolic zeros
Rule = Callable[[Operands, Operands], tuple[Array, Array]]


class _Forms(NamedTuple):
    """The forms of one contraction, and the tangents of those whose tangents are not those of their values.

    Attributes:
      kernel: its outline; the arrays are given in each call.
      contraction: in two halves.
    """

    kernel: AdaptedKernel
    contraction: Contraction

    def formed(self, w: Array, a: Array, b: Array) -> Array:
        kernel = dataclasses.replace(self.kernel, w=w, a=a, b=b)
        return materialize(kernel, precision=self.contraction.precision)

    def factored(self, x: Array, w: Array, a: Array, b: Array) -> Array:
        return self.contraction.base(x, w) + self.contraction.low_rank(x, a, b)

    def merged(self, x: Array, w: Array, a: Array, b: Array) -> Array:
        return self.contraction.base(x, self.formed(w, a, b))

    def hybrid(self, primals: Operands, tangents: Operands) -> tuple[Array, Array]:
        x, w, a, b = primals
        kernel = self.formed(w, a, b)
        return self.contraction.base(x, kernel), self._tangent(kernel, primals, tangents)

    def _tangent(self, kernel: Array, primals: Operands, tangents: Operands) -> Array:
        base, low_rank, *_ = self.contraction
        (x, _, a, b), (dx, dw, da, db) = primals, tangents
        terms = [
            (dx, lambda: base(dx, kernel)),
            (dw, lambda: base(x, dw)),
            (da, lambda: low_rank(x, da, b)),
            (db, lambda: low_rank(x, a, db)),
        ]
        parts = [term() for tangent, term in terms if not isinstance(tangent, SymbolicZero)]
        return sum(parts[1:], start=parts[0])


def _jvp(function: Callable[..., Array], primals: Operands, tangents: Operands) -> tuple[Array, Array]:
    """The value and the tangent of a function, in what moves alone."""
    moves = [not isinstance(tangent, SymbolicZero) for tangent in tangents]

    def of_moving(*moving: Array) -> Array:
        its = iter(moving)
        return function(*(next(its) if moves_ else x for moves_, x in zip(moves, primals, strict=True)))

    moving, along = (
        [x for moves_, x in zip(moves, operands, strict=True) if moves_] for operands in (primals, tangents)
    )
    return jax.jvp(of_moving, moving, along)
