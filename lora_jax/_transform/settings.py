"""The settings of an interpretation: the options of the caller, and the position in the program."""

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
from .contraction.costs import Form, FormName, form_from_name
from .origins import Origins
from .refusal import Refusal, is_custom


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of an interpretation.

    Attributes:
      materialize: the paths that may be materialized where there is no low-rank rule.
      custom_derivatives: whether all kernels may be materialized at a custom derivative or a Pallas kernel.
      form: the form of all contractions; None for the cheapest of each.
      log: the list to which uses are appended, if any.
      repeats: how often the current function runs in one call.
      observe: whether the gradient of each factor `a` is replaced by sums over activations.
      refusals: the list to which refused kernels are appended; None to stop at the first one.
      cache: the functions that earlier calls rebuilt; None if there is only one call. The reference is weak because
        rebuilt functions close over their settings, and would otherwise keep the cache alive.
      origins: the origins of the program's values, if uses are to have evidence. Equations whose results are dropped
        are then interpreted too, because JAX leaves the forward pass of a gradient that way.
      enclosing: the equations around the current function, as in `origins`.
      live: whether a result of the program depends on the current function.
    """

    materialize: tuple[Pattern, ...] = ()
    custom_derivatives: bool = False
    form: Form | None = None
    log: list[Use] | None = None
    repeats: int = 1
    observe: bool = False
    refusals: list[Refusal] | None = None
    cache: weakref.ref[ProgramCache] | None = dataclasses.field(default=None, compare=False, repr=False)
    origins: Origins | None = None
    enclosing: tuple[int, ...] = ()
    live: bool = True

    def may_materialize(self, kernel: AdaptedKernel, primitive: str) -> bool:
        """Whether the caller allows a kernel to be materialized at a primitive."""
        if kernel.is_routed:
            return False  # it differs between tokens
        if self.custom_derivatives and is_custom(primitive):
            return True
        return all(matches_any(path, self.materialize) for path in kernel.paths)

    def cached_function(self, key: Hashable, build: Callable[[], Callable[..., Any]]) -> Callable[..., Any] | None:
        """Returns the function built for an equal key under equal settings, or builds it.

        None if there is no cache, or if uses are logged, which requires that bodies are traced in each call.
        """
        functions = self.cache() if self.cache is not None and self.log is None else None
        return None if functions is None else functions.get((self, key), build)


CustomDerivatives = Literal["refuse", "materialize"]


def make_settings(
    *, materialize: Sequence[Pattern], custom_derivatives: CustomDerivatives, form: FormName | None, **others: Any
) -> Settings:
    """Returns the settings for the options of the caller.

    Raises:
      SpecError: if an option has an invalid value.
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
    return Settings(materialize=tuple(materialize), custom_derivatives=allowed, form=form_from_name(form), **others)
