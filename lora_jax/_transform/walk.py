"""A walk over a traced program that marks each value, and repeats loops until the marks of their carry are stable.

A mark is a set of bits. A subclass of `Walk` defines the marks of an equation's results.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from .._compat import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, is_transposed, normal_parameters, primitives

Marks = tuple[int, ...]
Place = tuple[int, ...]  # the ids of an equation and of those around it, outermost first


class Walk:
    """An abstract walk over a program. `mark_results` must be monotone in the marks of the operands.

    Attributes:
      constants: the mark of arrays that the model closes over.
    """

    def __init__(self, constants: int) -> None:
        self.constants = constants

    def mark_results(self, eqn: JaxprEqn, operands: Marks, *, transposed: bool) -> Sequence[int]:
        """Returns the marks of the results of an equation without inner functions."""
        raise NotImplementedError

    def equations(self, jaxpr: Jaxpr) -> Sequence[JaxprEqn]:
        """Returns the equations to walk over: all, unless a subclass leaves some out."""
        return jaxpr.eqns

    def visit(self, place: Place, operands: Marks, *, transposed: bool) -> None:
        """Called at each equation, in a loop once for each pass over its body."""

    def mark(self, jaxpr: Jaxpr, marks: Sequence[int], outer: Place = (), *, transposed: bool = False) -> list[int]:
        """Returns the marks of a function's results, given those of its arguments."""
        marked: dict[Any, int] = dict.fromkeys(jaxpr.constvars, self.constants)
        marked |= dict(zip(jaxpr.invars, marks, strict=True))

        def read(atom: Any) -> int:
            if not isinstance(atom, Literal):
                return marked[atom]
            return self.constants if getattr(atom.val, "ndim", 0) else 0

        for eqn in self.equations(jaxpr):
            place, operands = (*outer, id(eqn)), tuple(map(read, eqn.invars))
            in_reverse = transposed or is_transposed(eqn)
            self.visit(place, operands, transposed=in_reverse)
            marked |= zip(eqn.outvars, self._results(eqn, operands, place, in_reverse), strict=True)
        return list(map(read, jaxpr.outvars))

    def _results(self, eqn: JaxprEqn, operands: Marks, place: Place, transposed: bool) -> Sequence[int]:
        params = normal_parameters(eqn)

        def mark_inner(jaxpr: ClosedJaxpr, marks: Sequence[int]) -> list[int]:
            return self.mark(jaxpr.jaxpr, marks, place, transposed=transposed)

        if eqn.primitive is primitives.scan_p:
            consts, carry = params["num_consts"], params["num_carry"]
            return _mark_loop(lambda marks: mark_inner(params["jaxpr"], marks), operands, consts, carry)
        if eqn.primitive is primitives.while_p:
            cond_consts, consts = params["cond_nconsts"], params["body_nconsts"]
            carry = len(operands) - cond_consts - consts

            def iteration(marks: Sequence[int]) -> list[int]:
                mark_inner(params["cond_jaxpr"], (*operands[:cond_consts], *marks[consts:]))
                return mark_inner(params["body_jaxpr"], marks)

            return _mark_loop(iteration, operands[cond_consts:], consts, carry)
        if eqn.primitive is primitives.cond_p:
            branches = [mark_inner(branch, operands[1:]) for branch in params["branches"]]
            return [union((operands[0], *results)) for results in zip(*branches, strict=True)]
        jaxpr = params.get("jaxpr", params.get("call_jaxpr"))
        if isinstance(jaxpr, ClosedJaxpr) and len(jaxpr.jaxpr.invars) == len(operands):  # a call
            return mark_inner(jaxpr, operands)
        return self.mark_results(eqn, operands, transposed=transposed)


def _mark_loop(iteration: Callable[[Marks], list[int]], operands: Marks, consts: int, carry: int) -> list[int]:
    """Returns the marks of a loop's results, repeating the body until the marks of the carry are stable."""
    marks, stacked = operands, []
    while True:
        out = iteration(marks)
        stacked.append(out[carry:])
        carried = map(operator.or_, marks[consts : consts + carry], out)
        next_marks = (*marks[:consts], *carried, *marks[consts + carry :])
        if next_marks == marks:
            return [*marks[consts : consts + carry], *map(union, zip(*stacked, strict=True))]
        marks = next_marks


def union(marks: Sequence[int]) -> int:
    """Returns the bits that any of the marks has."""
    return functools.reduce(operator.or_, marks, 0)
