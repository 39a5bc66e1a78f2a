"""What is said of kernels that reach an operation without a low-rank form: all of them in one error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .._errors import SHOWN, UnsupportedError


class Refusal(NamedTuple):
    """A use of an adapted kernel for which there is no low-rank rule.

    Attributes:
      paths: the leaves that the kernel is.
      primitive: the operation that it reaches.
      reason: why there is no low-rank rule.
      line: the user's line.
      allowable: whether `materialize=` would allow it.
    """

    paths: tuple[str, ...]
    primitive: str
    reason: str
    line: str
    allowable: bool


class Refused(Exception):  # noqa: N818  (not an error: it sends the caller to collect all that would be refused)
    """Raised where the first kernel would be refused, before anything is evaluated with it."""


def error(refusals: Sequence[Refusal]) -> UnsupportedError:
    """One error for all uses that are refused, with the list that would allow them.

    Args:
      refusals: at least one; the first for each kernel is shown.
    """
    paths = [refusal.paths for refusal in refusals]
    first = [refusal for number, refusal in enumerate(refusals) if refusal.paths not in paths[:number]]
    them = "it" if len(first) == 1 else "them"
    advice = f"Leave {them} out of the spec"
    if listed := to_list(first):
        advice += f", or materialize {them} there: lora(apply, materialize={listed})"
    if any(is_custom(refusal.primitive) for refusal in first):
        advice += ".\n  For all custom derivatives: lora(apply, custom_derivatives='materialize')"
    if len(first) == 1:
        (only,) = first
        what = f"the model passes it to `{only.primitive}`: {only.reason}."
        return UnsupportedError(f"Cannot apply LoRA to {_names(only.paths)}: {what}", only.line, f"{advice}.")
    lines = [f"\n  {_names(r.paths)}, passed to `{r.primitive}`: {r.reason}.\n    at {r.line}" for r in first[:SHOWN]]
    more = f"\n  … and {len(first) - SHOWN} more" if len(first) > SHOWN else ""
    return UnsupportedError(f"Cannot apply LoRA to {len(first)} kernels:{''.join(lines)}{more}", None, f"{advice}.")


def is_custom(primitive: str) -> bool:
    """Whether the model defines what the primitive does: a derivative of its own, or a kernel for an accelerator."""
    return primitive.startswith(("custom_jvp", "custom_vjp", "pallas"))


def to_list(refusals: Sequence[Refusal]) -> list[str]:
    """The paths to list in `materialize=`, so that all kernels that can be materialized are."""
    return list(dict.fromkeys(path for refusal in refusals if refusal.allowable for path in refusal.paths))


def _names(paths: Sequence[str]) -> str:
    return " and ".join(map(repr, paths))
