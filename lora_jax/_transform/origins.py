"""What each value of a traced program is made from: the model's inputs, and which of its parameters.

That tells the uses in which a kernel meets activations from those in which it meets constants, itself, or what a
derivative sends back. Nothing is evaluated: a value is a set of bits, one for the inputs and one for each parameter,
and an equation gives to its results those of all its operands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .._compat import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, is_transposed, normal_parameters, primitives
from .._core.uses import Evidence

INPUTS = 1  # the bit of the model's inputs; those of parameters are the next ones
Marks = tuple[int, ...]
Place = tuple[int, ...]  # an equation, after those that it is inside of: they may be there several times


@dataclasses.dataclass(frozen=True, eq=False)
class Origins:
    """What the operands of every equation are made from.

    Attributes:
      bits: of each parameter, by path.
      operands: the marks of an equation's operands, each time that it was come to: in a loop once for its first
        iteration, in which a carry is what it starts from, and then for the later ones.
      transposed: the equations with which JAX differentiates backwards.
    """

    bits: Mapping[str, int]
    operands: Mapping[Place, set[Marks]]
    transposed: set[Place]

    def evidence(self, place: Place, paths: Sequence[tuple[str, ...]]) -> dict[str, Evidence]:
        """How much a use says of the roles of each parameter, given which parameters each of the operands is."""
        found = {}
        for path in {path for operand in paths for path in operand}:
            others = [position for position, operand in enumerate(paths) if path not in operand]
            visits = [[marks[position] for position in others] for marks in self.operands.get(place, ())]
            meets = max((self._meets(path, marks) for marks in visits), default=0)
            found[path] = Evidence(meets, place not in self.transposed)
        return found

    def _meets(self, path: str, others: Sequence[int]) -> int:
        marks = 0
        for other in others:
            marks |= other
        if not marks & INPUTS:
            return 0
        return 1 if marks & self.bits[path] else 2


def origins(jaxpr: ClosedJaxpr, paths: Sequence[str]) -> Origins:
    """Finds what all values of a program are made from; its first arguments are the parameters with these paths.

    Where there are no other arguments, arrays that the model has closed over count as its inputs.
    """
    bits = {path: INPUTS << 1 + number for number, path in enumerate(paths)}
    others = len(jaxpr.jaxpr.invars) - len(paths)
    found = Origins(bits, {}, set())
    walk = _Walk(found.operands, found.transposed, 0 if others else INPUTS)  # type: ignore[arg-type]
    walk.through(jaxpr.jaxpr, (*bits.values(), *[INPUTS] * others), (), transposed=False)
    return found


@dataclasses.dataclass(frozen=True)
class _Walk:
    """One pass over a program, which fills in what `Origins` has.

    Attributes:
      operands: by place, as in `Origins`.
      transposed: as in `Origins`.
      constants: the mark of arrays that the model has closed over.
    """

    operands: dict[Place, set[Marks]]
    transposed: set[Place]
    constants: int

    def through(self, jaxpr: Jaxpr, marks: Sequence[int], within: Place, *, transposed: bool) -> list[int]:
        """The marks of a function's results, given those of its arguments."""
        marked: dict[Any, int] = dict.fromkeys(jaxpr.constvars, self.constants)
        marked |= dict(zip(jaxpr.invars, marks, strict=True))

        def read(atom: Any) -> int:
            if not isinstance(atom, Literal):
                return marked[atom]
            return self.constants if getattr(atom.val, "ndim", 0) else 0

        for eqn in jaxpr.eqns:
            place, operands = (*within, id(eqn)), tuple(map(read, eqn.invars))
            self.operands.setdefault(place, set()).add(operands)
            backwards = transposed or is_transposed(eqn)
            if backwards:
                self.transposed.add(place)
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

            def turn(marks: Sequence[int]) -> list[int]:
                inside(params["cond_jaxpr"], (*operands[:before], *marks[consts:]))
                return inside(params["body_jaxpr"], marks)

            return _repeated(turn, operands[before:], consts, carry)
        if eqn.primitive is primitives.cond_p:
            branches = [inside(branch, operands[1:]) for branch in params["branches"]]
            return [_union((operands[0], *results)) for results in zip(*branches, strict=True)]
        jaxpr = params.get("jaxpr", params.get("call_jaxpr"))
        if isinstance(jaxpr, ClosedJaxpr) and len(jaxpr.jaxpr.invars) == len(operands):  # a call
            return inside(jaxpr, operands)
        return [_union(operands)] * len(eqn.outvars)


def _repeated(turn: Any, operands: Marks, consts: int, carry: int) -> list[int]:
    """The marks of a loop's results: those of its carry, until they do not change any more, and of what it stacks."""
    marks, stacked = list(operands), []
    while True:
        out = turn(marks)
        stacked.append(out[carry:])
        after = [*marks[:consts], *map(int.__or__, marks[consts : consts + carry], out), *marks[consts + carry :]]
        if after == marks:
            return [*marks[consts : consts + carry], *map(_union, zip(*stacked, strict=True))]
        marks = after


def _union(marks: Sequence[int]) -> int:
    union = 0
    for mark in marks:
        union |= mark
    return union
