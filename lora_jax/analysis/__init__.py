"""Measures of what an adapter has learned: subspaces, norms and singular vectors, with plots; intruders reduced.

Each kernel is treated as a matrix (in, out), whatever its axes. For a stack of layers or experts, the result has
leading batch axes. Leaves without a term `s·A·B`, such as those of `Full`, are omitted. All functions except the plots
work under `jit` and on sharded arrays.
"""

from ._matrix import Amplification as Amplification
from ._matrix import Intruders as Intruders
from ._measures import amplification as amplification
from ._measures import intruders as intruders
from ._measures import relative_norms as relative_norms
from ._measures import singular_values as singular_values
from ._measures import subspace_similarity as subspace_similarity
from ._plots import plot_amplification as plot_amplification
from ._plots import plot_intruders as plot_intruders
from ._plots import plot_relative_norms as plot_relative_norms
from ._plots import plot_singular_values as plot_singular_values
from ._plots import plot_subspace_similarity as plot_subspace_similarity
from ._reduce import reduce_intruders as reduce_intruders

__all__ = [
    "Amplification",
    "Intruders",
    "amplification",
    "intruders",
    "plot_amplification",
    "plot_intruders",
    "plot_relative_norms",
    "plot_singular_values",
    "plot_subspace_similarity",
    "reduce_intruders",
    "relative_norms",
    "singular_values",
    "subspace_similarity",
]
