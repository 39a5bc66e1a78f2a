"""`lora-jax compress`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType

from .._core.linalg import has_factors
from .._core.values import on_host
from .._merge.compress import compress as compressed
from ._console import bar
from ._layers import kind_of
from ._report import Report, UsageError, add_row, grouped, spans, table
from ._source import check_target, open_adapter, write_like


def compress(
    directory: Path,
    out: Path,
    /,
    *,
    rank: int | None = None,
    energy: float | None = None,
    layers: bool = False,
    base: Path | None = None,
    force: bool = False,
) -> Report:
    """Writes an adapter of lower rank: the best approximation of each update.

    The format is that of the input. Other arrays are unchanged, such as biases and magnitudes of DoRA.

    Example: `lora-jax compress my_adapter smaller --energy 0.95`

    Args:
      directory: an adapter.
      out: the directory to write.
      rank: the rank of all layers; those of this rank or a lower one are unchanged.
      energy: in place of a rank, the fraction of ‖ΔW‖² that each layer keeps, in (0, 1).
      layers: one row for each layer, in place of one for each kind.
      base: the directory of the model, in safetensors files; for trainable tokens and VeRA only.
      force: write to a directory that is not empty.
    """
    if (rank is None) == (energy is None):
        raise UsageError("Expected either --rank or --energy.")
    check_target(out, [directory], force=force)
    found = open_adapter(directory, base)
    smaller, errors = dict(found.adapter), {}
    factored = [path for path, part in smaller.items() if has_factors(part)]
    with bar("Compressing") as step:
        for done, path in enumerate(factored):
            step(done, len(factored))
            one, residual = compressed({path: smaller[path]}, rank, energy=energy)
            smaller |= one
            errors[path] = float(np.max(on_host(residual[path]), initial=0.0))
    write_like(found, out, smaller)
    data = {
        "source": str(directory),
        "target": str(out),
        "parameters": [_count(found.adapter), _count(smaller)],
        "leaves": [
            {
                "name": (name := found.name(path)),
                "kind": kind_of(name),
                "ranks": [adapter[path].a.shape[-1] for adapter in (found.adapter, smaller)],
                "error": error,
            }
            for path, error in errors.items()
        ],
    }
    return Report(data, lambda: _shown(data, layers))


def _count(adapter: Mapping[str, Any]) -> int:
    return sum(array.size for part in adapter.values() for array in part.arrays.values())


def _shown(data: Mapping[str, Any], per_layer: bool) -> Iterable[RenderableType]:
    shown = table("module", "#layers", "#rank", "#new rank", "#relative error")
    for name, some in grouped(data["leaves"], "name" if per_layer else "kind").items():
        ranks = [spans(leaf["ranks"][at] for leaf in some) for at in (0, 1)]
        add_row(shown, name, str(len(some)), *ranks, spans(leaf["error"] for leaf in some))
    if data["leaves"]:
        yield shown
    yield "{}: {:,} of {:,} parameters".format(data["target"], *reversed(data["parameters"]))
