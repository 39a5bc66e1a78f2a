"""What each value of a traced program is made from: the model's inputs, and which of its parameters.

That tells the uses in which a kernel meets activations from those in which it meets constants, itself, or what a
derivative sends back. Nothing is evaluated: a value is a set of bits, one for the inputs and one for each parameter,
and an equation gives to its results those of all its operands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from .._compat import ClosedJaxpr, JaxprEqn
from .._core.uses import Evidence
from .walk import Marks, Place, Walk, union

INPUTS = 1  # the bit of the model's inputs; those of parameters are the next ones


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
    operands: dict[Place, set[Marks]]
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
    _Origins(found, constants=0 if others else INPUTS).through(jaxpr.jaxpr, (*bits.values(), *[INPUTS] * others))
    return found


class _Origins(Walk):
    """Fills in what `Origins` has."""

    def __init__(self, found: Origins, constants: int) -> None:
        super().__init__(constants)
        self.found = found

    def plain(self, eqn: JaxprEqn, operands: Marks, *, transposed: bool) -> Sequence[int]:
        del transposed  # a derivative is made from what its operands are made from
        return [union(operands)] * len(eqn.outvars)

    def visit(self, place: Place, operands: Marks, *, transposed: bool) -> None:
        self.found.operands.setdefault(place, set()).add(operands)
        if transposed:
            self.found.transposed.add(place)
