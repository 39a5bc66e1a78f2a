"""Evaluates a contraction with an adapted kernel in one of three forms:

    factored   y = x·W0 + ((x·A)·s)·B
    merged     y = x·W,   W = W0 + s·A·B
    hybrid     y = x·W,   dy = dx·W + x·dW0 + ((x·dA)·s)·B + ((x·A)·s)·dB

All have the same values and derivatives. If the best form depends on which gradients are requested, a `custom_jvp`
delays the choice until the contraction is differentiated.
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
from ..._core.contract import Labeled, is_narrow, widest
from ..._core.kernel import AdaptedKernel, gain_of, materialize
from .costs import INFERENCE, TRAINING, Form, Gradients, always_factored, choose_form
from .operation import Contraction
from .routing import weights_by_rank

# While another `lora` traces this one, contractions are evaluated with plain operations, because a `custom_jvp` has no
# rule. The user context is part of JAX's cache keys, so that no trace from outside is reused inside.
traced_by_lora = jax.make_user_context(default_value=False)


def custom_jvp_works(arrays: Sequence[Any]) -> bool:
    """Whether the transformations around a call support a `custom_jvp`; `jax.experimental.jet` does not.

    JAX has no query for that, so this evaluates one. Called only after a failure.
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
    """The base's result and the low-rank term, not added yet.

    A bias that the model adds next is added to the base's result first. The compiler can then accumulate both products
    into one array, and needs none for the low-rank term. If the base's result is narrow, the low-rank term and the sum
    are in bfloat16 until the sum is cast.
    """

    base: Array
    low_rank: Array

    @property
    def total(self) -> Array:
        """The sum in the dtype of the low-rank term."""
        return self.base.astype(self.low_rank.dtype) + self.low_rank

    def add(self, x: Any) -> Array:
        """Adds both terms and `x`, which the model adds to the sum."""
        if not is_narrow(self.base.dtype):
            return (self.base + x) + self.low_rank
        return (self.total + jnp.asarray(x).astype(self.low_rank.dtype)).astype(self.base.dtype)

    def cast(self, dtype: Any) -> Sum:
        """Casts both terms."""
        return Sum(self.base.astype(dtype), self.low_rank.astype(dtype))

    def is_accepted_by(self, primitive: str) -> bool:
        """Whether the rule of a primitive accepts the terms before they are added."""
        return primitive == "add" or (primitive == "convert_element_type" and is_narrow(self.base.dtype))


def add_pending(value: Any) -> Any:
    """Adds the terms of a `Sum`; returns any other value as it is."""
    return value.total.astype(value.base.dtype) if isinstance(value, Sum) else value


def fixed_form(kernel: AdaptedKernel, contraction: Contraction, form: Form | None) -> Form | None:
    """Returns the form of a contraction if it does not depend on the requested gradients, else None.

    Args:
      kernel: the adapted kernel.
      contraction: a contraction with it.
      form: the form that the caller requests for all contractions; None for the cheapest.
    """
    if kernel.dropout is not None or kernel.is_routed:  # no other form can express it
        return Form.FACTORED
    if contraction.narrow:  # the other forms would compute the factors' gradients in fewer than 16 bits
        return Form.FACTORED
    if form is not None:
        return form
    if isinstance(kernel.w, Recorded):  # merged would keep a dequantized kernel for the backward pass
        return Form.FACTORED
    # In 16 bits the sum of W0 and a small update would be rounded to W0.
    if jnp.finfo(kernel.w.dtype).bits < 32 or always_factored(contraction.costs) or traced_by_lora.value:
        return Form.FACTORED
    return None


def form_in_training(kernel: AdaptedKernel, contraction: Contraction, form: Form | None) -> Form:
    """Returns the form in a training step, which requests the gradients of `x`, `a` and `b`."""
    return fixed_form(kernel, contraction, form) or choose_form(contraction.costs, TRAINING)


def evaluate_contraction(kernel: AdaptedKernel, x: Array, contraction: Contraction, form: Form | None) -> Array | Sum:
    """Evaluates the contraction of `x` with an adapted kernel, in the form requested or else in that of `choose_form`.

    A gain multiplies the result, `x·(K ⊙ g) = (x·K) ⊙ g`. If the kernel's outputs are contracted, as by a tied head, it
    multiplies `x`: `y·(K ⊙ g)ᵀ = (y ⊙ g)·Kᵀ`. So does a gain of the inputs, where these are contracted.
    """
    if kernel.gain is None:
        return _without_gain(kernel, x, contraction, form)
    gain, plain = _squeezed_gain(kernel), dataclasses.replace(kernel, gain=None)
    if not set(gain.labels) <= set(contraction.y):
        return _without_gain(plain, apply_gain(x, gain.expand_to(contraction.x)), contraction, form)
    g = gain.expand_to(contraction.y)
    if kernel.dropout is None:
        return apply_gain(_without_gain(plain, x, contraction, form), g)
    # As in DoRA's own code, the change of the base's result by the gain uses the activation after dropout.
    base, base_dropped = _base(kernel, x, contraction), _base(kernel, kernel.dropout.apply(x), contraction)
    return base + (apply_gain(base_dropped + _low_rank(kernel, x, contraction), g) - base_dropped)


def apply_gain(y: Array | Sum, gain: Array) -> Array:
    """Multiplies `y` with a gain in the wider of the two dtypes, and casts to the dtype of `y`."""
    total, like = (y.total, y.base) if isinstance(y, Sum) else (y, y)
    dtype = widest(total.dtype, gain.dtype)
    return (total.astype(dtype) * gain.astype(dtype)).astype(like.dtype)


def _squeezed_gain(kernel: AdaptedKernel) -> Labeled:
    """The gain without its axes of size 1, which broadcast."""
    gain = gain_of(kernel)
    ones = [axis for axis, size in enumerate(gain.array.shape) if size == 1]
    labels = tuple(label for axis, label in enumerate(gain.labels) if axis not in ones)
    return Labeled(lax.squeeze(gain.array, ones), labels)


def gain_problem(kernel: AdaptedKernel, contraction: Contraction, x: Array) -> str | None:
    """Returns why the gain of a kernel cannot be applied to a contraction, or None.

    The axes that have a gain must be all kept, or all contracted with an `x` that has the same sizes. A narrow `x`
    cannot be multiplied with a gain, because its dtype may not hold the result.
    """
    if kernel.gain is None:
        return None
    if kernel.dropout is not None and contraction.narrow:
        return "a product in fewer than 16 bits with dropout, of a kernel that has a gain"
    if set(labels := _squeezed_gain(kernel).labels) <= set(contraction.y):
        return None
    if is_narrow(x.dtype):
        return "a product in fewer than 16 bits that contracts axes with a gain"
    sizes = dict(zip(contraction.x, x.shape, strict=True))
    if all(sizes.get(label) == kernel.w.shape[label] for label in labels):
        return None
    return "a product that contracts only some of the axes with a gain"


def _without_gain(kernel: AdaptedKernel, x: Array, contraction: Contraction, form: Form | None) -> Array | Sum:
    if not kernel.a.shape[-1]:
        return _base(kernel, x, contraction)
    fixed = fixed_form(kernel, contraction, form)
    if fixed is Form.FACTORED:
        return Sum(_base(kernel, x, contraction), _low_rank(kernel, x, contraction))
    kernel, forms = kernel.with_array(), _Forms(kernel.abstract, contraction)
    if fixed is Form.MERGED:
        return forms.merged(x, kernel.w, kernel.a, kernel.b)
    rules: dict[Form, Rule] = {
        Form.FACTORED: functools.partial(_jvp, forms.factored),
        Form.MERGED: functools.partial(_jvp, forms.merged),
        Form.HYBRID: forms.hybrid,
    }
    merges = (fixed or choose_form(contraction.costs, INFERENCE)) is not Form.FACTORED
    function = jax.custom_jvp(forms.merged if merges else forms.factored)

    def tangents(primals: Operands, tangents: Operands) -> tuple[Array, Array]:
        x, _, a, b = (not isinstance(tangent, SymbolicZero) for tangent in tangents)
        return rules[fixed or choose_form(contraction.costs, Gradients(x, a, b))](primals, tangents)

    function.defjvp(tangents, symbolic_zeros=True)
    return function(x, kernel.w, kernel.a, kernel.b)


def _base(kernel: AdaptedKernel, x: Array, contraction: Contraction) -> Array:
    product: Array = apply_to_base(lambda w, x: contraction.base(x, w), kernel.w, x)
    return product


def _low_rank(kernel: AdaptedKernel, x: Array, contraction: Contraction) -> Array:
    """Returns the low-rank term with the kernel's dropout and the weights of its experts; a router has no dropout."""
    weights = weights_by_rank(kernel, x, contraction) if kernel.is_routed else None
    dropped = x if kernel.dropout is None else kernel.dropout.apply(x)
    return contraction.low_rank(dropped, kernel.a, kernel.b, weights)


Operands = tuple[Any, Any, Any, Any]  # x, w, a, b; or their tangents, which may be symbolic zeros
Rule = Callable[[Operands, Operands], tuple[Array, Array]]


class _Forms(NamedTuple):
    """The forms of one contraction as functions of arrays. `hybrid` returns a value and its tangent.

    Attributes:
      kernel: the abstract kernel.
      contraction: a contraction with it.
    """

    kernel: AdaptedKernel
    contraction: Contraction

    def _materialize(self, w: Array, a: Array, b: Array) -> Array:
        kernel = dataclasses.replace(self.kernel, w=w, a=a, b=b)
        return materialize(kernel, precision=self.contraction.precision)

    def factored(self, x: Array, w: Array, a: Array, b: Array) -> Array:
        return self.contraction.base(x, w) + self.contraction.low_rank(x, a, b)

    def merged(self, x: Array, w: Array, a: Array, b: Array) -> Array:
        return self.contraction.base(x, self._materialize(w, a, b))

    def hybrid(self, primals: Operands, tangents: Operands) -> tuple[Array, Array]:
        x, w, a, b = primals
        kernel = self._materialize(w, a, b)
        return self.contraction.base(x, kernel), self._tangent(kernel, primals, tangents)

    def _tangent(self, kernel: Array, primals: Operands, tangents: Operands) -> Array:
        base, low_rank = self.contraction.base, self.contraction.low_rank
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
    """Returns the value of a function and its tangent, differentiating only operands whose tangent is not zero."""
    nonzero = [number for number, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]

    def of_nonzero(*arrays: Array) -> Array:
        replaced = dict(zip(nonzero, arrays, strict=True))
        return function(*(replaced.get(number, primal) for number, primal in enumerate(primals)))

    return jax.jvp(of_nonzero, [primals[number] for number in nonzero], [tangents[number] for number in nonzero])
