"""What holds for one whole interpretation: what the caller asks for, and where in the program it is."""

from __future__ import annotations

import dataclasses
import re
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, get_args

from .._core.kernel import AdaptedKernel
from .._core.paths import Pattern, matches_any
from .._core.uses import Use
from .._errors import SpecError
from .cache import ProgramCache
from .contraction.costs import Form, FormName, form_named
from .origins import Origins
from .refusal import Refusal, is_custom


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for one whole interpretation.

    Attributes:
      materialize: the paths that may be materialized where there is no low-rank rule.
      custom_derivatives: whether all may be, where the model defines a derivative of its own, or a kernel of its own.
      form: of all contractions; None for the cheapest of each.
      log: of uses, if one is kept.
      times: how often it runs in one call.
      observe: whether the gradient of each kernel's factor `a` is to be sums over the activations that meet it.
      refusals: a list, if kernels that have no low-rank form are to be noted there and the rest of the program gone
        through; None if the first of them ends it.
      cache: the functions that earlier calls rebuilt; None where there is only one call. A weak reference, so that a
        rebuilt function, which knows its settings, does not keep all others alive.
      origins: of the program's values, if each use is to say how much it tells of the roles of axes. What the program
        computes and drops is then interpreted too: where only derivatives are used, the model's own uses are there.
      within: the equations that it is inside of, as `origins` has them.
      live: whether a result of the program depends on it.
    """

    materialize: tuple[Pattern, ...] = ()
    custom_derivatives: bool = False
    form: Form | None = None
    log: list[Use] | None = None
    times: int = 1
    observe: bool = False
    refusals: list[Refusal] | None = None
    cache: weakref.ref[ProgramCache] | None = dataclasses.field(default=None, compare=False, repr=False)
    origins: Origins | None = None
    within: tuple[int, ...] = ()
    live: bool = True

    def may_materialize(self, kernel: AdaptedKernel, primitive: str) -> bool:
        """Whether a kernel can be materialized, and the caller has listed every leaf of it or such a primitive."""
        if kernel.active is not None:
            return False  # there is no one kernel for all tokens
        if self.custom_derivatives and is_custom(primitive):
            return True
        return all(matches_any(path, self.materialize) for path in kernel.paths)

    def rebuilt(self, key: Hashable, build: Callable[[], Callable[..., Any]]) -> Callable[..., Any] | None:
        """The function that was rebuilt for an equal key under equal settings, or a new one.

        None where none are kept: a body whose uses are logged has to be traced each time, or the log would miss it.
        """
        functions = self.cache() if self.cache is not None and self.log is None else None
        return None if functions is None else functions.get((self, key), build)


CustomDerivatives = Literal["refuse", "materialize"]


def settings_of(
    *, materialize: Sequence[Pattern], custom_derivatives: CustomDerivatives, form: FormName | None, **others: Any
) -> Settings:
    """The settings that a caller asks for.

    Raises:
      SpecError: if one of them is none of its values.
    """
    if custom_derivatives not in get_args(CustomDerivatives):
        raise SpecError(
            f"Expected `custom_derivatives` to be 'refuse' or 'materialize'; got {custom_derivatives!r}.\n"
            "  Single kernels are listed by path: materialize=['…']."
        )
    if isinstance(materialize, str | re.Pattern):
        raise SpecError(
            f"Expected a list of patterns for `materialize`; got {materialize!r}.\n  Write [{materialize!r}]."
        )
    allowed = custom_derivatives == "materialize"
    return Settings(materialize=tuple(materialize), custom_derivatives=allowed, form=form_named(form), **others)
