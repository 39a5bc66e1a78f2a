"""Candidates for rows, and how sure the best of them is."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence

from .fits import Fit
from .result import Confidence

_MARGIN = 0.05  # of similarity, to the next candidate
_ALIKE = 0.15  # the least similarity of names that say something


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Fits that are taken together, and how similar the names are.

    Attributes:
      fits: the fits.
      score: the similarity of the names, from 0 to 1.
      same_name: whether they are the same.
      nearness: of the values, if they are equal up to rounding; 0 otherwise.
    """

    fits: tuple[Fit, ...]
    score: float
    same_name: bool
    nearness: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether the values are equal up to rounding."""
        return self.nearness > 0

    @property
    def leaves(self) -> frozenset[str]:
        """The leaves that it takes."""
        return frozenset(fit.leaf.group.name for fit in self.fits)

    @property
    def tensors(self) -> frozenset[str]:
        """The tensors that it takes."""
        return frozenset(tensor.group.name for fit in self.fits for tensor in fit.tensors)

    @property
    def names(self) -> frozenset[str]:
        """The leaves and tensors that it takes."""
        return self.leaves | self.tensors

    def shares(self, other: Candidate) -> bool:
        """Whether only one of the two can be taken."""
        return bool(self.names & other.names)

    @property
    def rank(self) -> tuple[float, float, int]:
        """A key that is larger for better candidates: nearer values, and of the same values nearer names."""
        return self.nearness, self.score, -len(self.fits[0].open)


def best_of(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """Yields the candidates to take, best first; each excludes those that share a leaf or a tensor with it."""
    left = sorted(candidates, key=lambda one: one.rank, reverse=True)
    while left:
        best, *rest = left
        yield best
        left = [one for one in rest if not best.shares(one)]


def judged(best: Candidate, fit: Fit, rivals: Sequence[Candidate], *, unique: bool) -> tuple[Confidence, list[str]]:
    """Returns how sure a fit of a candidate is, and why.

    Args:
      best: the candidate.
      fit: the fit.
      rivals: the candidates for the same leaves and tensors that surer rows have not excluded.
      unique: whether there has never been another candidate.
    """
    still_open = [*fit.open, *_only_values_show(best, fit)]
    within = next((one for one in rivals if _is_within(one, best)), None)
    if within is not None:
        still_open.append(f"{next(iter(within.tensors))!r} has this shape as well")
    reasons = [*fit.doubtful, *still_open]
    if fit.doubtful or within is not None:
        return "unsure", reasons
    settled: Confidence = "likely" if still_open else "sure"
    if best.same_name:
        return settled, ["the same name", *reasons]
    if unique and best.score:
        return settled, ["no other has its shape", *reasons]
    if unique:
        return "likely", ["no other has its shape, and their names share no word", *reasons]
    if not rivals:
        return "likely", ["of several with its shape, the one that is left", *reasons]
    other = max(rivals, key=lambda one: one.score)
    if best.score - other.score < _MARGIN or best.score < _ALIKE:
        names = sorted((other.tensors - best.tensors) or (other.leaves - best.leaves))
        return "unsure", [f"its name is not much nearer than that of {' + '.join(names)!r}", *reasons]
    return "likely", ["of several with its shape, by name", *reasons]


def doubt_of_numbers(best: Candidate, others: Iterable[Candidate]) -> str | None:
    """Returns why the numbers in two names say nothing, such as in `Dense_1` and `fc1` beside `Dense_0` and `fc2`.

    Args:
      best: the candidate.
      others: the candidates that share its leaf or its tensor.
    """
    if best.same_name or len(best.leaves) > 1 or len(best.tensors) > 1:
        return None
    every = [best, *others]
    own = _numbers(best.leaves, (name for one in every for name in one.leaves))
    other = _numbers(best.tensors, (name for one in every for name in one.tensors))
    if not own or not other or own <= other or other <= own:
        return None
    return "the numbers in the names are not those of the modules"


def _numbers(best: frozenset[str], names: Iterable[str]) -> set[tuple[int, ...]]:
    """Returns the numbers by which names differ that are otherwise that of the best; none if there is no other."""
    (text,) = (_NUMBER.sub("", name) for name in best)
    alike = {tuple(map(int, _NUMBER.findall(name))) for name in names if _NUMBER.sub("", name) == text}
    places = [at for at, column in enumerate(zip(*alike, strict=True)) if len(set(column)) > 1]
    return {tuple(numbers[at] for at in places) for numbers in alike} if places else set()


_NUMBER = re.compile(r"\d+")


def _only_values_show(best: Candidate, fit: Fit) -> list[str]:
    words = frozenset[str]().union(*(tensor.last for tensor in fit.tensors))
    rotated = fit.row.kind == "linear" and words & {"q", "k"} and not best.equal
    return ["values would show a rotary order"] if rotated else []


def _is_within(one: Candidate, other: Candidate) -> bool:
    """Whether a candidate is a tensor of a module within that of another, such as of a head's decoder."""
    outer = other.fits[0].tensors[0]
    return one.leaves == other.leaves and one.fits[0].tensors[0].module.startswith(f"{outer.module}.")
