"""What is said of kernels that reach an operation without a low-rank form: all of them in one error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .._errors import SHOWN, UnsupportedError


class Refusal(NamedTuple):
    """A use of an adapted kernel that has no low-rank form.

    Attributes:
      paths: the leaves that the kernel is.
      primitive: the operation that it reaches.
      reason: why there is no low-rank form.
      line: the user's line.
      formable: whether `dense=` would allow it.
    """

    paths: tuple[str, ...]
    primitive: str
    reason: str
    line: str
    formable: bool


class Refused(Exception):  # noqa: N818  (not an error: it sends the caller to collect all that would be refused)
    """Raised where the first kernel would be refused, before anything is evaluated with it."""


def error(refusals: Sequence[Refusal]) -> UnsupportedError:
    """One error for all uses that are refused, with the list that would allow them.

    Args:
      refusals: at least one; the first for each kernel is shown.
    """
    paths = [refusal.paths for refusal in refusals]
    first = [refusal for number, refusal in enumerate(refusals) if refusal.paths not in paths[:number]]
    formable = dense_list(first)
    advice = "" if not formable else f", or let {{}} be formed there: lora(apply, dense={formable})"
    if len(first) == 1:
        (only,) = first
        return UnsupportedError(
            f"Expected the adapted kernel {_names(only.paths)} to be used in ways that have a low-rank form; it "
            f"reaches `{only.primitive}`: {only.reason}.",
            only.line,
            f"Leave it out of the spec{advice.format('it')}.",
        )
    lines = [f"\n  {_names(r.paths)} reaches `{r.primitive}`: {r.reason}.\n    at {r.line}" for r in first[:SHOWN]]
    more = f"\n  … and {len(first) - SHOWN} more" if len(first) > SHOWN else ""
    return UnsupportedError(
        f"Expected the adapted kernels to be used in ways that have a low-rank form; {len(first)} are not."
        f"{''.join(lines)}{more}",
        None,
        f"Leave them out of the spec{advice.format('them')}.",
    )


def dense_list(refusals: Sequence[Refusal]) -> list[str]:
    """The paths to list in `dense=`, so that all kernels that can be formed are."""
    return list(dict.fromkeys(path for refusal in refusals if refusal.formable for path in refusal.paths))


def _names(paths: Sequence[str]) -> str:
    return " beside ".join(map(repr, paths))
