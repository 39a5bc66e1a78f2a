"""Which form a contraction takes, by the FLOPs of each: a pure function of counts.

Three forms give one result. *Factored* is `x·W0 + ((x·A)·s)·B`, and materializes nothing of a kernel's size. *Merged*
is `x·(W0 + s·A·B)`. *Hybrid* is merged in the forward pass and for the gradient of x, factored for those of A and B.

The factored form is the cheapest for a transformer at the usual ranks; the others are for a rank that is large against
the kernel, or for a kernel that is small against the activations, as in a convolution.
"""

from __future__ import annotations

import enum
import functools
from typing import Literal, NamedTuple

import jax

from ..._core.sizes import is_known
from ..._errors import SpecError


class Form(enum.Enum):
    """How a contraction with an adapted kernel is evaluated, in the order of the memory that it takes."""

    FACTORED = "factored"
    HYBRID = "hybrid"
    MERGED = "merged"


FormName = Literal["factored", "hybrid", "merged"]


def form_named(name: str | None) -> Form | None:
    """The form that a caller asks for by its name."""
    names = [form.value for form in Form]
    if name is not None and name not in names:
        raise SpecError(f"Expected a form among {names}, or None for the cheapest; got form={name!r}.")
    return None if name is None else Form(name)


class Passes(NamedTuple):
    """The operations of one product `x·w` in each pass that may be asked for.

    Attributes:
      forward: the product itself.
      to_x: the product that carries the cotangent back to `x`.
      to_w: the product that carries it back to `w`.
    """

    forward: int
    to_x: int
    to_w: int

    @classmethod
    def alike(cls, flops: int) -> Passes:
        """Those of a `dot_general`, which are all three products over the same axes."""
        return cls(flops, flops, flops)


class Costs(NamedTuple):
    """The operations of the products that the forms are made of.

    Attributes:
      base: `x` with the kernel, formed or not.
      first: `x` with the factor that it meets first.
      second: that thin product with the other factor.
      formed: `A` with `B`.
      x: the number of elements of `x`.
      y: of the result.
      thin: of the thin product.
      sums: what forming the kernel takes beside that product: its scale, and the sum with the base's.
    """

    base: Passes
    first: Passes
    second: Passes
    formed: int
    x: int
    y: int
    thin: int
    sums: int


class Asked(NamedTuple):
    """Of which operands the gradient is asked for; of none in a call that nobody differentiates.

    That of the base is not among them: it is frozen. Where base and adapter are one tree its gradient is asked for and
    then dropped, and costs nothing.
    """

    x: bool = False
    a: bool = False
    b: bool = False


INFERENCE = Asked()
TRAINING = Asked(x=True, a=True, b=True)

# A form that takes less memory is preferred to the cheapest one as long as it costs at most this much more.
TOLERANCE = 1.01


@functools.lru_cache(maxsize=4096)
def cheapest(costs: Costs, asked: Asked) -> Form:
    """The form that takes the least memory among those within one percent of the fewest FLOPs."""
    forms = [*Form] if any(asked) else [Form.FACTORED, Form.MERGED]
    totals = {form: flops(form, costs, asked) for form in forms}
    enough = TOLERANCE * min(totals.values())
    return next(form for form in forms if totals[form] <= enough)


def flops(form: Form, costs: Costs, asked: Asked) -> int:
    """Counts the floating-point operations of one contraction, forward and back to what is asked for."""
    if form is Form.FACTORED:
        return _factored(costs, asked)
    forming = costs.formed + costs.sums
    total = costs.base.forward + forming + asked.x * costs.base.to_x
    if form is Form.MERGED:
        return total + (asked.a or asked.b) * costs.base.to_w + (asked.a + asked.b) * costs.formed
    # Neither x·A nor its cotangent is there from anything else.
    total += asked.a * (costs.second.to_x + costs.thin + costs.first.to_w)
    return total + asked.b * (costs.first.forward + costs.thin + costs.second.to_w)


def _factored(costs: Costs, asked: Asked) -> int:
    base, first, second = costs.base, costs.first, costs.second
    total = base.forward + first.forward + second.forward + costs.thin + costs.y
    total += asked.x * (base.to_x + first.to_x + costs.x)
    total += (asked.x or asked.a) * (second.to_x + costs.thin)
    return total + asked.a * first.to_w + asked.b * second.to_w


def added(form: Form, costs: Costs) -> int:
    """The operations that a form adds to a forward pass without the adapter."""
    return flops(form, costs, INFERENCE) - costs.base.forward


def always_factored(costs: Costs) -> bool:
    """Whether no call, whatever is asked of it, has a better form: then nothing need be decided later.

    Symbolic costs cannot be compared; they are factored.
    """
    if not all(map(is_known, jax.tree.leaves(costs))):
        return True
    return all(cheapest(costs, asked) is Form.FACTORED for asked in _ALL_ASKED)


_ALL_ASKED = [Asked(x, a, b) for x in (False, True) for a in (False, True) for b in (False, True)]
