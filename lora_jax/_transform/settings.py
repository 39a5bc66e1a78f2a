"""What holds for one whole interpretation: what the caller asks for, and where in the program it is."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Hashable
from typing import Any

from .._core.kernel import AdaptedKernel
from .._core.paths import Pattern, matches_any
from .._core.uses import Use
from .cache import Kept
from .contraction.costs import Form
from .origins import Origins
from .refusal import Refusal


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for one whole interpretation.

    Attributes:
      dense: the paths that may be formed where there is no low-rank form.
      form: of all contractions; None for the cheapest of each.
      log: of uses, if one is kept.
      times: how often it runs in one call.
      remat: whether all that it makes is made again in the backward pass, and nothing kept for it.
      observe: whether the gradient of each kernel's factor `a` is to be sums over the activations that meet it.
      refusals: a list, if kernels that have no low-rank form are to be noted there and the rest of the program gone
        through; None if the first of them ends it.
      kept: the functions that earlier calls rebuilt; None where there is only one call. A weak reference, so that a
        rebuilt function, which knows its settings, does not keep all others alive.
      origins: of the program's values, if each use is to say how much it tells of the roles of axes. What the program
        computes and drops is then interpreted too: where only derivatives are used, the model's own uses are there.
      within: the equations that it is inside of, as `origins` has them.
      live: whether a result of the program depends on it.
    """

    dense: tuple[Pattern, ...] = ()
    form: Form | None = None
    log: list[Use] | None = None
    times: int = 1
    remat: bool = False
    observe: bool = False
    refusals: list[Refusal] | None = None
    kept: weakref.ref[Kept] | None = dataclasses.field(default=None, compare=False, repr=False)
    origins: Origins | None = None
    within: tuple[int, ...] = ()
    live: bool = True

    def may_form(self, kernel: AdaptedKernel) -> bool:
        """Whether a kernel can be formed, and the caller has listed every leaf of it."""
        if kernel.active is not None:
            return False  # there is no one kernel for all tokens
        return kernel.is_probe or all(matches_any(path, self.dense) for path in kernel.paths)

    def rebuilt(self, key: Hashable, build: Callable[[], Callable[..., Any]]) -> Callable[..., Any] | None:
        """The function that was rebuilt for an equal key under equal settings, or a new one.

        None where none are kept: a body whose uses are logged has to be traced each time, or the log would miss it.
        """
        functions = self.kept() if self.kept is not None and self.log is None else None
        return None if functions is None else functions.get((self, key), build)
