"""What holds for one whole interpretation: what the caller asks for, and where in the program it is."""

from __future__ import annotations

import dataclasses

from .._adapter import AdaptedKernel
from .._paths import Pattern, matches_any
from .._use import Use
from ._plan import Form
from ._statistics import Statistic


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for one whole interpretation.

    Attributes:
      dense: the paths that may be formed where there is no low-rank form.
      form: of all contractions; None for the cheapest of each.
      log: of uses, if one is kept.
      times: how often it runs in one call.
      remat: whether all that it makes is made again in the backward pass, and nothing kept for it.
      statistic: of the activations that meet each kernel, to be had in place of the gradient of its factor `a`.
    """

    dense: tuple[Pattern, ...] = ()
    form: Form | None = None
    log: list[Use] | None = None
    times: int = 1
    remat: bool = False
    statistic: Statistic | None = None

    def may_form(self, kernel: AdaptedKernel) -> bool:
        """Whether a kernel can be formed, and the caller has listed every leaf of it."""
        if kernel.active is not None:
            return False  # there is no one kernel for all tokens
        return kernel.is_probe or all(matches_any(path, self.dense) for path in kernel.paths)
