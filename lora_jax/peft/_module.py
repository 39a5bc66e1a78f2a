"""The tensors of one torch module, collected from leaves."""

from __future__ import annotations

import dataclasses

from .._core.variant import LowRank
from .._variants import VeRA
from ._layout import Layout, Values, outputs_to_torch
from ._sites import Site


@dataclasses.dataclass
class Module:
    """The tensors of one torch module, by our names, and the variant of its factors."""

    layout: Layout
    path: str = ""
    factors: list[tuple[Site, LowRank, Values, Values]] = dataclasses.field(default_factory=list)
    variant: LowRank | None = None
    vera: VeRA | None = None
    biases: list[tuple[Site, float, Values]] = dataclasses.field(default_factory=list)  # with their scales
    rows: tuple[int, ...] | None = None
    tensors: dict[str, Values] = dataclasses.field(default_factory=dict)
    filled: dict[str, list[range]] = dataclasses.field(default_factory=dict)  # outputs of each tensor that are known

    def has(self, site: Site, name: str) -> bool:
        """Whether a leaf's outputs of a tensor are known."""
        outputs = outputs_in_module(site)
        return any(outputs.start < other.stop and other.start < outputs.stop for other in self.filled.get(name, ()))


def outputs_in_module(site: Site) -> range:
    """Returns the outputs of the module that a leaf has."""
    first = 0 if site.part.of is None else site.part.of[0]
    return range(first, first + site.last - site.first)


def module_outputs(site: Site, name: str, array: Values) -> Values:
    """Returns the module's outputs of an array, in torch's order and scale."""
    matrix = site.layout.to_matrix(name, array)[site.index]
    return outputs_to_torch(matrix[..., site.outputs], site.part)


def module_value(site: Site, value: Values) -> Values:
    return module_outputs(site, "vector" if site.row.kind == "vector" else "kernel", value)
