"""What an adapter has learned: the paper's measures of its subspaces, norms and singular vectors, and their plots.

Every measure is one of each kernel taken as a matrix (in, out), whatever its axes; a stack of layers or experts has one
for each of them, in the leading axes of the result. They are of the term `s·A·B`, or of the adapted kernel; leaves that
have none, as those of `Full`, are left out. Everything works under `jit` and on sharded arrays, the plots excepted.
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
    "relative_norms",
    "singular_values",
    "subspace_similarity",
]
