"""Pairs groups of leaves with groups of torch tensors: candidates by shape, ranked by values and names."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .._row import Part, Row
from .candidates import Candidate, best_of, doubt_of_numbers, judged
from .fits import Conventions, Fit, Leaf, Tensor, fits, fused_fits, is_turned, part_fits, stack_axes, unordered_fits
from .groups import Group, Shape, shape_of
from .names import Names, is_table, owner, similarity, vector_parameter, words
from .result import Confidence, GuessedRow
from .values import Both

_TURNED, _NOT_THE_SAME = 0.6, 0.99  # of the similarity, for a kernel that is `(out, in)` where others are not


class Proposal:
    """The rows that pair leaves with tensors."""

    def __init__(
        self, axes: Mapping[str, str | None], tables: Mapping[str, bool], both: Both, names: tuple[Names, Names]
    ) -> None:
        self.axes, self.tables, self.both = axes, tables, both
        self.own, self.other = names
        self.rows: list[GuessedRow] = []

    def add(self, leaves: Sequence[Group], tensors: Sequence[Group]) -> tuple[list[Group], list[Group]]:
        """Pairs groups, adds their rows, and returns the groups that have no partner."""
        kernels = [self._leaf(group) for group in leaves if self._may_be_kernel(group)]
        torch = list(self._tensors(tensors))
        weights = [tensor for tensor in torch if len(tensor.group.shape) >= 2]
        taken = self._pair(list(self._kernels(kernels, weights)))
        taken |= self._beside(leaves, torch, taken)
        rest = [group for group in leaves if group.name not in taken]
        vectors = [one for one in torch if len(one.group.shape) == 1 and one.group.name not in taken]
        taken |= self._pair(list(self._vectors(rest, vectors)))
        taken |= self._beside(rest, torch, taken)
        rest = [group for group in rest if group.name not in taken]
        taken |= self._pair(*self._parameters(rest, tensors))
        left, right = ([group for group in groups if group.name not in taken] for groups in (leaves, tensors))
        return left, right

    def _leaf(self, group: Group) -> Leaf:
        paths = list(group.members.values())
        table = self.tables.get(paths[0], True if is_table(group.name) else None)
        if group.name.endswith("kernel"):
            table = False
        return Leaf(group, self.axes.get(paths[0]), self.own.last(owner(group.name)), table)

    def _may_be_kernel(self, group: Group) -> bool:
        return len(group.shape) >= 2 and not group.name.endswith(("bias", "scale"))

    def _tensors(self, groups: Iterable[Group]) -> Iterator[Tensor]:
        for group in groups:
            module, _, parameter = group.name.rpartition(".")
            if module and parameter in ("weight", "bias"):
                first = next(iter(group.members.values())).rpartition(".")[0]
                bias = self.both.tensors.get(f"{first}.bias")
                shape = () if bias is None else shape_of(bias)
                yield Tensor(group, module, parameter, shape[0] if len(shape) == 1 else None, self.other.last(module))

    def _kernels(self, leaves: Sequence[Leaf], tensors: Sequence[Tensor]) -> Iterator[Candidate]:
        yield from self._kernels_by(leaves, tensors, self._conventions(leaves, tensors))

    def _conventions(self, leaves: Sequence[Leaf], tensors: Sequence[Tensor]) -> Conventions:
        """Returns what most matrices have whose shapes show it: kernels `(out, in)`, and modules `Conv1D`."""
        with_bias = [one for one in tensors if len(one.group.shape) == 2 and one.bias in one.group.shape]
        unequal = [one for one in with_bias if one.group.shape[0] != one.group.shape[1]]
        conv1d = sum(one.group.shape[1] == one.bias for one in unequal) * 2 > len(unequal)
        flax = Conventions(out_first=None, conv1d=conv1d)
        rows = [
            fit.row for best in best_of(self._kernels_by(leaves, tensors, flax)) for fit in best.fits if not fit.open
        ]
        out_first = sum(row.axes == "oi" for row in rows) > sum(
            row.axes is None and row.kind == "linear" for row in rows
        )
        return Conventions(out_first, conv1d)

    def _kernels_by(self, leaves: Sequence[Leaf], tensors: Sequence[Tensor], usual: Conventions) -> Iterator[Candidate]:
        by_parent: dict[str, list[Tensor]] = collections.defaultdict(list)
        for tensor in tensors:
            by_parent[_parent(tensor.module, ".")].append(tensor)
        leaves_by_parent: dict[str, list[Leaf]] = collections.defaultdict(list)
        for leaf in leaves:
            leaves_by_parent[_parent(owner(leaf.group.name), "/")].append(leaf)
            found = [fit for tensor in tensors for fit in fits(leaf, tensor, usual)]
            for fit in found:
                yield self._candidate((fit,), _TURNED if is_turned(fit, usual) else _NOT_THE_SAME)
            for siblings in by_parent.values():
                matrices = [tensor for tensor in siblings if len(tensor.group.shape) == 2]
                for fit in fused_fits(leaf, matrices, usual):
                    found.append(fit)
                    yield self._candidate((fit,))
            for siblings in by_parent.values():
                matrices = [tensor for tensor in siblings if len(tensor.group.shape) == 2]
                named = [fit.row.parts for fit in found]
                orders = (fit for fit in unordered_fits(leaf, matrices, usual) if fit.row.parts not in named)
                for candidate in (self._candidate((fit,)) for fit in orders):
                    if candidate.equal or not found:
                        yield candidate
        for tensor in tensors:
            for others in leaves_by_parent.values() if len(tensor.group.shape) == 2 else ():
                together = tuple(part_fits([one for one in others if one.last & tensor.last], tensor, usual))
                if len(together) > 1:
                    yield self._candidate(together)

    def _vectors(self, leaves: Sequence[Group], tensors: Sequence[Tensor]) -> Iterator[Candidate]:
        kernels = {owner(group.name) for group in leaves if self._may_be_kernel(group)}
        kernels |= {owner(row.pattern) for row in self.rows if row.row.kind != "vector"}
        for group in leaves:
            leaf, parameter = self._leaf(group), vector_parameter(group.name)
            apart = ("apart from its kernel",) if owner(group.name) in kernels else ()
            for tensor in tensors:
                batch = stack_axes(dataclasses.replace(leaf, axes=None), tensor)
                if batch is None or parameter not in (tensor.parameter, None):
                    continue
                core = group.shape[len(batch) :]
                if math.prod(core) == tensor.group.shape[0] and (len(core) == 1 or (core and parameter)):
                    row = Row(kind="vector", parts=(Part(tensor.module),), parameter=tensor.parameter)
                    still_open = () if parameter else ("its name is not that of a bias or a scale",)
                    yield self._candidate((Fit(leaf, (tensor,), row, (), still_open, apart),))

    def _parameters(self, groups: Sequence[Group], tensors: Iterable[Group]) -> tuple[list[Candidate], list[Candidate]]:
        """Returns the candidates for parameters that are neither weights nor biases, such as a class token.

        They have the shape of the tensor; the first also have its values, or share a word of the last part of the name.
        """
        leaves = [
            Leaf(one, self.axes.get(next(iter(one.members.values()))), self.own.last(one.name), None) for one in groups
        ]
        leaves = [leaf for leaf in leaves if not _is_kernel(leaf)]
        alike, others = list[Candidate](), list[Candidate]()
        for group in tensors:
            module, _, parameter = group.name.rpartition(".")
            tensor = Tensor(group, module, parameter, None, self.other.last(group.name))
            for leaf in leaves if parameter not in ("weight", "bias") else ():
                batch = stack_axes(dataclasses.replace(leaf, axes=None), tensor)
                if batch is not None and leaf.group.shape[len(batch) :] == group.shape:
                    keep_shape = len(group.shape) != 1
                    row = Row(kind="vector", parts=(Part(module),), parameter=parameter, keep_shape=keep_shape)
                    candidate = self._candidate((Fit(leaf, (tensor,), row),))
                    (alike if candidate.equal or leaf.last & tensor.last else others).append(candidate)
        return alike, others

    def _candidate(self, together: tuple[Fit, ...], factor: float = _NOT_THE_SAME) -> Candidate:
        """Compares the names, and the values of one leaf of each fit."""
        own = _union(self.own.bag(owner(fit.leaf.group.name)) for fit in together)
        other = _union(self.other.bag(tensor.owner) for fit in together for tensor in fit.tensors)
        first = together[0]
        path, name = owner(first.leaf.group.name), first.tensors[0].owner
        same = path.replace("/", ".") == name and len(first.tensors) == len(together) == 1
        score = 1.0 if same else factor * similarity(own, other)
        compared = [self._compared(fit) for fit in together]
        return Candidate(tuple(fit for fit, _ in compared), score, same, min(nearness for _, nearness in compared))

    def _compared(self, fit: Fit) -> tuple[Fit, float]:
        """Returns a fit with the row that fits the values of the first leaf, and how near they are; 0 if not."""
        paths = list(fit.leaf.group.members.values())
        for row in (fit.row, *fit.others):
            compared = self.both.compare(fit.leaf.group.name, row, paths, all_of_them=False)
            if compared.equal:
                return dataclasses.replace(fit, row=compared.row), compared.nearness
        return fit, 0.0

    def _pair(self, candidates: list[Candidate], never: Sequence[Candidate] = ()) -> set[str]:
        """Takes the best candidates, adds their rows, and returns the names of what they take.

        Those in `never` are not taken, but make others less sure.
        """
        taken, unsure = set[str](), set[str]()
        for best in best_of(candidates):
            others = [one for one in (*candidates, *never) if one is not best and best.shares(one)]
            # What only an unsure choice has taken is still a rival.
            rivals = [one for one in others if not (one.names - best.names) & (taken - unsure)]
            doubt = doubt_of_numbers(best, others)
            for fit in best.fits:
                fit = fit if doubt is None else dataclasses.replace(fit, doubtful=(*fit.doubtful, doubt))
                if self._add(best, fit, rivals, unique=not others) == "unsure":
                    unsure |= best.names
            taken |= best.names
        return taken

    def _add(self, best: Candidate, fit: Fit, rivals: Sequence[Candidate], *, unique: bool) -> Confidence:
        """Adds a row, and returns how sure it is."""
        group = fit.leaf.group
        compared = self.both.compare(group.name, fit.row, list(group.members.values()), all_of_them=True)
        confidence, reasons = judged(best, fit, rivals, unique=unique)
        if compared.equal:
            equal = [one for one in rivals if one.equal]
            settled, reasons = judged(best, dataclasses.replace(fit, open=(), doubtful=()), equal, unique=False)
            confidence = "unsure" if settled == "unsure" else "sure"
            reasons = ["values are equal", *(reasons if confidence == "unsure" else [])]
        elif compared.cosine is not None:
            confidence, reasons = "unsure", [*reasons, f"values differ, cosine {compared.cosine:.2f}"]
        self.rows.append(GuessedRow(group.name, fit.row, confidence, tuple(reasons), group.members))
        return confidence

    def _beside(self, leaves: Sequence[Group], tensors: Sequence[Tensor], taken: set[str]) -> set[str]:
        """Adds rows of biases beside kernels and scales that have rows, and returns the names of what they take."""
        by_name, found = {tensor.group.name: tensor for tensor in tensors}, set[str]()
        modules = {owner(guessed.pattern): guessed for guessed in self.rows if guessed.row.parameter == "weight"}
        for group in leaves:
            guessed = modules.get(owner(group.name))
            if group.name in taken or vector_parameter(group.name) != "bias" or guessed is None:
                continue
            names = [f"{part.module}.bias" for part in guessed.row.parts]
            if guessed.row.kind == "embedding" or any(name not in by_name or name in taken for name in names):
                continue
            row = Row(kind="vector", parts=guessed.row.parts, parameter="bias")
            width = _width(group, by_name[names[0]])
            sizes = [by_name[name].group.shape[0] for name in names]
            fits_beside = width == sum(sizes) or guessed.row.parts[0].of is not None  # the kernel has that size
            if guessed.paths.keys() == group.members.keys() and fits_beside:
                confidence, reasons = guessed.confidence, ("beside its kernel",)
                compared = self.both.compare(group.name, row, list(group.members.values()), all_of_them=True)
                if compared.cosine is not None:
                    confidence = "sure" if compared.equal else "unsure"
                    reasons = (
                        "values are equal" if compared.equal else f"values differ, cosine {compared.cosine:.2f}",
                    )
                self.rows.append(GuessedRow(group.name, row, confidence, reasons, group.members))
                found |= {group.name, *names}
        return found


def _width(group: Group, tensor: Tensor) -> int:
    batch = len(next(iter(tensor.group.members))) - len(next(iter(group.members)))
    return math.prod(group.shape[batch:]) if batch >= 0 else 0


def _is_kernel(leaf: Leaf) -> bool:
    """Whether a leaf is the kernel of a layer or of experts."""
    traced = leaf.axes is not None and {"i", "o"} <= set(leaf.axes)
    return traced or leaf.group.name.endswith("kernel") or not {"expert", "experts"}.isdisjoint(words(leaf.group.name))


def _parent(name: str, separator: str) -> str:
    return name.rpartition(separator)[0]


def _union(bags: Iterable[collections.Counter[str]]) -> collections.Counter[str]:
    total: collections.Counter[str] = collections.Counter()
    for bag in bags:
        total |= bag
    return total


def shapes_of(groups: Iterable[Group]) -> dict[str, Shape]:
    """Returns the shapes of all members of some groups."""
    return {name: group.shape for group in groups for name in group.members.values()}
