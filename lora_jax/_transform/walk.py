"""A pass over a traced program that gives each value a mark, loops until their marks do not change any more.

A mark is a set of bits. A subclass of `Walk` says which bits an equation gives to its results.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from .._compat import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, is_transposed, normal_parameters, primitives

Marks = tuple[int, ...]
Place = tuple[int, ...]  # an equation, after those that it is inside of: they may be there several times


class Walk:
    """One pass over a program. An abstract class; the marks of `plain` only gain bits where those of operands do.

    Attributes:
      constants: the mark of arrays that the model has closed over.
    """

    def __init__(self, constants: int) -> None:
        self.constants = constants

    def plain(self, eqn: JaxprEqn, operands: Marks, *, transposed: bool) -> Sequence[int]:
        """The marks of the results of an equation that holds no function."""
        raise NotImplementedError

    def equations(self, jaxpr: Jaxpr) -> Sequence[JaxprEqn]:
        """Those that are gone through: all, unless a subclass leaves some out."""
        return jaxpr.eqns

    def visit(self, place: Place, operands: Marks, *, transposed: bool) -> None:
        """Notes that an equation is come to: in a loop once for its first iteration, then for the later ones."""

    def through(self, jaxpr: Jaxpr, marks: Sequence[int], within: Place = (), *, transposed: bool = False) -> list[int]:
        """The marks of a function's results, given those of its arguments."""
        marked: dict[Any, int] = dict.fromkeys(jaxpr.constvars, self.constants)
        marked |= dict(zip(jaxpr.invars, marks, strict=True))

        def read(atom: Any) -> int:
            if not isinstance(atom, Literal):
                return marked[atom]
            return self.constants if getattr(atom.val, "ndim", 0) else 0

        for eqn in self.equations(jaxpr):
            place, operands = (*within, id(eqn)), tuple(map(read, eqn.invars))
            backwards = transposed or is_transposed(eqn)
            self.visit(place, operands, transposed=backwards)
            marked |= zip(eqn.outvars, self._results(eqn, operands, place, backwards), strict=True)
        return list(map(read, jaxpr.outvars))

    def _results(self, eqn: JaxprEqn, operands: Marks, place: Place, transposed: bool) -> Sequence[int]:
        params = normal_parameters(eqn)

        def inside(jaxpr: ClosedJaxpr, marks: Sequence[int]) -> list[int]:
            return self.through(jaxpr.jaxpr, marks, place, transposed=transposed)

        if eqn.primitive is primitives.scan_p:
            consts, carry = params["num_consts"], params["num_carry"]
            return _repeated(lambda marks: inside(params["jaxpr"], marks), operands, consts, carry)
        if eqn.primitive is primitives.while_p:
            before, consts = params["cond_nconsts"], params["body_nconsts"]
            carry = len(operands) - before - consts

            def iteration(marks: Sequence[int]) -> list[int]:
                inside(params["cond_jaxpr"], (*operands[:before], *marks[consts:]))
                return inside(params["body_jaxpr"], marks)

            return _repeated(iteration, operands[before:], consts, carry)
        if eqn.primitive is primitives.cond_p:
            branches = [inside(branch, operands[1:]) for branch in params["branches"]]
            return [union((operands[0], *results)) for results in zip(*branches, strict=True)]
        jaxpr = params.get("jaxpr", params.get("call_jaxpr"))
        if isinstance(jaxpr, ClosedJaxpr) and len(jaxpr.jaxpr.invars) == len(operands):  # a call
            return inside(jaxpr, operands)
        return self.plain(eqn, operands, transposed=transposed)


def _repeated(iteration: Callable[[Marks], list[int]], operands: Marks, consts: int, carry: int) -> list[int]:
    """The marks of a loop's results: those of its carry, until they do not change any more, and of what it stacks."""
    marks, stacked = operands, []
    while True:
        out = iteration(marks)
        stacked.append(out[carry:])
        carried = map(operator.or_, marks[consts : consts + carry], out)
        after = (*marks[:consts], *carried, *marks[consts + carry :])
        if after == marks:
            return [*marks[consts : consts + carry], *map(union, zip(*stacked, strict=True))]
        marks = after


def union(marks: Sequence[int]) -> int:
    """The bits of all of them."""
    return functools.reduce(operator.or_, marks, 0)
