"""Builds the error for kernels that reach an operation without a low-rank rule: one error for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .._errors import SHOWN, UnsupportedError


class Refusal(NamedTuple):
    """A use of an adapted kernel for which there is no low-rank rule.

    Attributes:
      paths: the leaves that the kernel consists of.
      primitive: the primitive that it reaches.
      reason: why there is no low-rank rule.
      line: the user's line.
      allowable: whether `materialize=` would allow it.
    """

    paths: tuple[str, ...]
    primitive: str
    reason: str
    line: str
    allowable: bool


class Refused(Exception):  # noqa: N818  (the caller catches it and collects all refusals)
    """Raised at the first kernel without a rule, before it is used."""


def refusal_error(refusals: Sequence[Refusal]) -> UnsupportedError:
    """Returns one error for all refused uses, with the argument `materialize=` that would allow them.

    Args:
      refusals: at least one; the first for each kernel is shown.
    """
    paths = [refusal.paths for refusal in refusals]
    first = [refusal for number, refusal in enumerate(refusals) if refusal.paths not in paths[:number]]
    them = "it" if len(first) == 1 else "them"
    advice = f"Leave {them} out of the spec"
    if listed := materializable_paths(first):
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
    """Whether a primitive is a function with a custom derivative, or a Pallas kernel."""
    return primitive.startswith(("custom_jvp", "custom_vjp", "pallas"))


def materializable_paths(refusals: Sequence[Refusal]) -> list[str]:
    """Returns the paths that `materialize=` would have to list to allow all uses that it can allow."""
    return list(dict.fromkeys(path for refusal in refusals if refusal.allowable for path in refusal.paths))


def _names(paths: Sequence[str]) -> str:
    return " and ".join(map(repr, paths))
