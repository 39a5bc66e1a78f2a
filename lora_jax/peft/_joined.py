"""Factors of a leaf whose outputs are in several modules, or of a module that has the outputs of several leaves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ._layout import Layout, Values, scaled
from ._sites import Site


def own_ranks(site: Site, a: Values, b: Values) -> tuple[Values, Values]:
    """Returns the factors without the ranks that a module has for other leaves that it fuses."""
    own = b.any((*range(b.ndim - 2), -1))
    return (a, b) if site.part.of is None or not own.any() else (a[..., own], b[..., own, :])


def norms(layout: Layout, kernel: Values) -> Values:
    """Returns the norm of each output of a kernel: the magnitudes of DoRA that change nothing."""
    return np.asarray(np.linalg.norm(layout.to_matrix("kernel", kernel).astype(np.float32), axis=-2))


def joined_factors(
    layout: Layout, pieces: Mapping[Site, tuple[Values, Values]], relative: Mapping[Site, float]
) -> tuple[Values, Values]:
    """Returns the factors of one layer: of one module, or of several that share `a`, or of all ranks."""
    every = [(site, a, scaled(b, relative[site])) for site, (a, b) in pieces.items()]
    first = every[0][1]
    shared = all(np.array_equal(a, first) for _, a, _ in every)
    rank = first.shape[-1] if shared else sum(a.shape[-1] for _, a, _ in every)
    joined = np.zeros((*first.shape[:-2], rank, layout.d_out), every[0][2].dtype)
    at = 0
    for site, a, b in every:
        joined[..., at : at + a.shape[-1], site.outputs] = b
        at += 0 if shared else a.shape[-1]
    return (first if shared else np.concatenate([a for _, a, _ in every], axis=-1)), joined
