"""Parameters without a module of their own, such as the stacked kernels of experts; PEFT's `target_parameters`.

PEFT wraps the module that has them once for each, in the order in which the module declares them. The factors of all
experts are in one pair of matrices: `A` has the experts one after the other, and `B` has them innermost.
"""

from __future__ import annotations

from collections.abc import Callable

from ._layout import Layout, Values
from ._row import Row


def stored_as(name: str, row: Row, is_adapted: Callable[[str], bool]) -> str:
    """Returns the module under whose name the factors of a parameter are stored.

    Args:
      name: the module's name and the parameter's.
      row: of the parameter.
      is_adapted: whether a parameter, by its name as above, has factors.
    """
    module = name.removesuffix(f".{row.parameter}")
    later = row.declared[row.declared.index(row.parameter) + 1 :]
    return module + ".base_layer" * sum(is_adapted(f"{module}.{other}") for other in later)


def parameter_shape(name: str, layout: Layout, d_out: int, rank: int) -> tuple[int, ...]:
    """Returns the shape of the tensor of a factor."""
    ranks, features = rank * (layout.experts or 1), layout.d_in if name == "a" else d_out
    return (ranks, features) if _is_first(name, layout) else (features, ranks)


def to_parameter(name: str, matrix: Values, layout: Layout) -> Values:
    """Returns a factor, `a` of (experts, in, rank) or `b` of (experts, rank, out), as a tensor of the file."""
    matrix = matrix if layout.experts else matrix[None]
    ranks = matrix.swapaxes(1, 2) if name == "a" else matrix  # (experts, rank, features)
    features = ranks.shape[2]
    return ranks.reshape(-1, features) if _is_first(name, layout) else ranks.transpose(2, 1, 0).reshape(features, -1)


def from_parameter(name: str, tensor: Values, layout: Layout) -> Values:
    """Inverts `to_parameter`."""
    experts = layout.experts or 1
    if _is_first(name, layout):
        ranks = tensor.reshape(experts, -1, tensor.shape[1])
    else:
        ranks = tensor.reshape(tensor.shape[0], -1, experts).transpose(2, 1, 0)
    matrix = ranks.swapaxes(1, 2) if name == "a" else ranks
    return matrix if layout.experts else matrix[0]


def value_shape(layout: Layout, d_out: int) -> tuple[int, ...]:
    """Returns the shape of the parameter itself."""
    experts = () if layout.experts is None else (layout.experts,)
    return (*experts, *((d_out, layout.d_in) if layout.row.stored == "oi" else (layout.d_in, d_out)))


def turned(matrix: Values, layout: Layout) -> Values:
    """Returns a value, (experts, in, out), as torch stores it, or the reverse."""
    return matrix.swapaxes(-1, -2) if layout.row.stored == "oi" else matrix


def _is_first(name: str, layout: Layout) -> bool:
    """Whether a factor is PEFT's `A`."""
    return (name == "b") == layout.row.kind.startswith("swapped")
