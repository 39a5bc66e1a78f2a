"""Marks what each value of a traced program depends on: the model's inputs, and which parameters.

With the marks, uses of a kernel with activations are distinguished from uses with constants, with the kernel itself,
or in a derivative. Nothing is evaluated. A mark has one bit for the inputs and one for each parameter, and the results
of an equation get the bits of all its operands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from .._compat import ClosedJaxpr, JaxprEqn
from .._core.uses import Evidence
from .walk import Marks, Place, Walk, union

INPUTS = 1  # the bit of the model's inputs; the bits of parameters follow


@dataclasses.dataclass(frozen=True, eq=False)
class Origins:
    """What the operands of every equation depend on.

    Attributes:
      bits: the bit of each parameter, by path.
      operands: the marks of an equation's operands, one set for each visit. The first visit of a loop's body has the
        initial carry, later ones that of later iterations.
      transposed: the equations of JAX's reverse-mode differentiation.
    """

    bits: Mapping[str, int]
    operands: dict[Place, set[Marks]]
    transposed: set[Place]

    def evidence(self, place: Place, paths: Sequence[tuple[str, ...]]) -> dict[str, Evidence]:
        """Returns how reliable the roles in a use are, by path, given the paths of each operand."""
        found = {}
        for path in {path for operand in paths for path in operand}:
            others = [position for position, operand in enumerate(paths) if path not in operand]
            visits = [[marks[position] for position in others] for marks in self.operands.get(place, ())]
            meets = max((self._meets(path, marks) for marks in visits), default=0)
            found[path] = Evidence(meets, place not in self.transposed)
        return found

    def _meets(self, path: str, others: Sequence[int]) -> int:
        """`Evidence.meets`, given the marks of the other operands."""
        marks = union(others)
        if not marks & INPUTS:
            return 0
        return 1 if marks & self.bits[path] else 2


def origins(jaxpr: ClosedJaxpr, paths: Sequence[str]) -> Origins:
    """Marks all values of a program whose first arguments are the parameters with these paths.

    If there are no other arguments, arrays that the model closes over count as its inputs.
    """
    bits = {path: INPUTS << 1 + number for number, path in enumerate(paths)}
    others = len(jaxpr.jaxpr.invars) - len(paths)
    found = Origins(bits, {}, set())
    _Origins(found, constants=0 if others else INPUTS).mark(jaxpr.jaxpr, (*bits.values(), *[INPUTS] * others))
    return found


class _Origins(Walk):
    """The walk that fills in an `Origins`."""

    def __init__(self, found: Origins, constants: int) -> None:
        super().__init__(constants)
        self.found = found

    def mark_results(self, eqn: JaxprEqn, operands: Marks, *, transposed: bool) -> Sequence[int]:
        del transposed  # derivatives are marked like other equations
        return [union(operands)] * len(eqn.outvars)

    def visit(self, place: Place, operands: Marks, *, transposed: bool) -> None:
        self.found.operands.setdefault(place, set()).add(operands)
        if transposed:
            self.found.transposed.add(place)
