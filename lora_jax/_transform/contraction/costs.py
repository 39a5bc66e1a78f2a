"""Chooses the form of a contraction from FLOP counts.

Three forms compute the same result. *Factored* is `x·W0 + ((x·A)·s)·B` and materializes no array of the kernel's size.
*Merged* is `x·(W0 + s·A·B)`. *Hybrid* is merged in the forward pass and for the gradient of x, and factored for the
gradients of A and B.

Factored needs the fewest FLOPs for a transformer at the usual ranks. The other forms need fewer if the rank is large
relative to the kernel, or if the kernel is small relative to the activations, as in a convolution.
"""

from __future__ import annotations

import enum
import functools
from typing import Literal, NamedTuple

import jax

from ..._core.sizes import is_known
from ..._errors import SpecError


class Form(enum.Enum):
    """How a contraction with an adapted kernel is evaluated, in order of increasing memory."""

    FACTORED = "factored"
    HYBRID = "hybrid"
    MERGED = "merged"


FormName = Literal["factored", "hybrid", "merged"]


def form_from_name(name: str | None) -> Form | None:
    """Returns the form with a name; None for None, which lets `lora` choose."""
    names = [form.value for form in Form]
    if name is not None and name not in names:
        raise SpecError(f"Expected a form among {names}, or None for the cheapest; got form={name!r}.")
    return None if name is None else Form(name)


class Passes(NamedTuple):
    """The FLOPs of one product `x·w` in each pass.

    Attributes:
      forward: the product.
      grad_x: the product that computes the gradient of `x`.
      grad_w: the product that computes the gradient of `w`.
    """

    forward: int
    grad_x: int
    grad_w: int

    @classmethod
    def equal(cls, flops: int) -> Passes:
        """The passes of a `dot_general`, which all have the same FLOPs."""
        return cls(flops, flops, flops)


class Costs(NamedTuple):
    """The FLOPs of the products that the forms consist of, and the sizes of the arrays.

    Attributes:
      base: the product of `x` and the kernel, materialized or not.
      first: the product of `x` and the factor that it is multiplied with first.
      second: the product of that result, of rank r, and the other factor.
      delta: the product `A·B`.
      x: the number of elements of `x`.
      y: the number of elements of the result.
      thin: the number of elements of the product of rank r.
      adding: the FLOPs of `W0 + s·A·B` without the product: the scale and the sum.
    """

    base: Passes
    first: Passes
    second: Passes
    delta: int
    x: int
    y: int
    thin: int
    adding: int


class Gradients(NamedTuple):
    """The operands whose gradient is requested; none in a call that is not differentiated.

    The base is not among them, because it is frozen. If it is in one tree with the adapter, its gradient is requested
    and then dropped, and costs nothing.
    """

    x: bool = False
    a: bool = False
    b: bool = False


INFERENCE = Gradients()
TRAINING = Gradients(x=True, a=True, b=True)

# A form that needs less memory is preferred if it needs at most this many times the fewest FLOPs.
TOLERANCE = 1.01


@functools.lru_cache(maxsize=4096)
def choose_form(costs: Costs, gradients: Gradients) -> Form:
    """Returns the form that needs the least memory among those within one percent of the fewest FLOPs."""
    forms = [*Form] if any(gradients) else [Form.FACTORED, Form.MERGED]
    totals = {form: flops(form, costs, gradients) for form in forms}
    limit = TOLERANCE * min(totals.values())
    return next(form for form in forms if totals[form] <= limit)


def flops(form: Form, costs: Costs, gradients: Gradients) -> int:
    """Counts the FLOPs of one contraction, forward pass and requested gradients."""
    if form is Form.FACTORED:
        return _factored(costs, gradients)
    total = costs.base.forward + costs.delta + costs.adding + gradients.x * costs.base.grad_x
    if form is Form.MERGED:
        return total + (gradients.a or gradients.b) * costs.base.grad_w + (gradients.a + gradients.b) * costs.delta
    # The forward pass computes neither x·A nor its cotangent.
    total += gradients.a * (costs.second.grad_x + costs.thin + costs.first.grad_w)
    return total + gradients.b * (costs.first.forward + costs.thin + costs.second.grad_w)


def _factored(costs: Costs, gradients: Gradients) -> int:
    base, first, second = costs.base, costs.first, costs.second
    total = base.forward + first.forward + second.forward + costs.thin + costs.y
    total += gradients.x * (base.grad_x + first.grad_x + costs.x)
    total += (gradients.x or gradients.a) * (second.grad_x + costs.thin)
    return total + gradients.a * first.grad_w + gradients.b * second.grad_w


def added_flops(form: Form, costs: Costs) -> int:
    """Counts the FLOPs that the adapter adds to a forward pass."""
    return flops(form, costs, INFERENCE) - costs.base.forward


def always_factored(costs: Costs) -> bool:
    """Whether factored is the form for every set of requested gradients.

    True for symbolic costs, which cannot be compared.
    """
    if not all(map(is_known, jax.tree.leaves(costs))):
        return True
    return all(choose_form(costs, gradients) is Form.FACTORED for gradients in _ALL_GRADIENTS)


_ALL_GRADIENTS = [Gradients(x, a, b) for x in (False, True) for a in (False, True) for b in (False, True)]
