"""Plots of the measures, with one entry for each layer of a stack.

matplotlib is imported only when something is drawn, and `pyplot` and its global state are not used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jax import Array

from .._core.values import on_host
from .._errors import AdapterError
from ._matrix import Amplification, Intruders

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_MAX_LEGEND = 12


def plot_subspace_similarity(similarity: Mapping[str, Array]) -> Figure:
    """Draws φ(i, j) as a heat map for each layer, as in figure 3 of the LoRA paper.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> figure = lj.analysis.plot_subspace_similarity({"kernel": jnp.ones((8, 64))})
    >>> figure.axes[0].get_title()
    'kernel'

    Args:
      similarity: from `subspace_similarity`.

    Returns:
      A matplotlib figure.
    """
    layers = _layers(similarity, ndim=2)
    columns = min(4, len(layers))
    figure = _figure(3.2 * columns, 2.8 * math.ceil(len(layers) / columns))
    for index, (name, values) in enumerate(layers.items(), start=1):
        panel = figure.add_subplot(math.ceil(len(layers) / columns), columns, index)
        image = _heat(panel, values, left=1, top=1)
        panel.set(title=name, xlabel="j", ylabel="i")
    figure.colorbar(image, ax=figure.axes, label="φ(i, j)")
    return figure


def plot_singular_values(values: Mapping[str, Array]) -> Figure:
    """Draws the singular values of each update, a line for each layer.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> figure = lj.analysis.plot_singular_values({"layers": jnp.ones((3, 8))})
    >>> len(figure.axes[0].lines)
    3

    Args:
      values: from `singular_values`.

    Returns:
      A matplotlib figure.
    """
    layers = _layers(values, ndim=1)
    figure = _figure(6, 4)
    panel = figure.subplots()
    for name, line in layers.items():
        panel.plot(range(1, len(line) + 1), line, marker=".", label=name)
    panel.set(xlabel="number", ylabel="singular value of s·A·B", yscale="log" if _positive(layers) else "linear")
    if len(layers) <= _MAX_LEGEND:
        panel.legend()
    return figure


def plot_relative_norms(norms: Mapping[str, Array]) -> Figure:
    """Draws ‖s·A·B‖ / ‖W0‖, a bar for each layer.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> figure = lj.analysis.plot_relative_norms({"kernel": jnp.array(0.1), "layers": jnp.array([0.1, 0.2])})
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['kernel', 'layers[0]', 'layers[1]']

    Args:
      norms: from `relative_norms`.

    Returns:
      A matplotlib figure.
    """
    layers = _layers(norms, ndim=0)
    figure, panel = _rows(layers)
    panel.barh(range(len(layers)), [float(value) for value in layers.values()])
    panel.set(xlabel="‖s·A·B‖ / ‖W0‖")
    return figure


def plot_amplification(found: Mapping[str, Amplification]) -> Figure:
    """Draws the norm of each kernel along its update, along its own first directions and along random directions.

    The label of each layer contains its amplification factor.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> found = lj.analysis.Amplification(*map(jnp.array, (6.91, 61.95, 0.32, 21.67, 0.02, 21.6)))
    >>> figure = lj.analysis.plot_amplification({"query": found})
    >>> figure.axes[0].get_yticklabels()[0].get_text()
    'query (×21.6)'

    Args:
      found: from `amplification`.

    Returns:
      A matplotlib figure.
    """
    fields = {name: _layers({path: getattr(result, name) for path, result in found.items()}, 0) for name in _ALONG}
    factors = _layers({path: result.factor for path, result in found.items()}, ndim=0)
    figure, panel = _rows({f"{name} (×{float(factor):.3g})": factor for name, factor in factors.items()})
    for name, label in _ALONG.items():
        panel.plot(list(fields[name].values()), range(len(factors)), marker="o", linestyle="", label=label)
    panel.set(xlabel="‖Uᵀ·W0·V‖", xscale="log" if _positive(fields["along_delta"]) else "linear")
    panel.legend()
    return figure


_ALONG = {"along_delta": "along ΔW", "along_kernel": "along W0", "along_random": "along random directions"}


def plot_intruders(found: Mapping[str, Intruders]) -> Figure:
    """Draws the similarity of the first singular vectors of each adapted kernel to its base; crosses are intruders.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> similarity = jnp.array([0.1, 0.9])
    >>> found = lj.analysis.Intruders(similarity, similarity < 0.5, jnp.array([2.0, 1.0]), jnp.array(1))
    >>> figure = lj.analysis.plot_intruders({"kernel": found})
    >>> len(figure.axes[0].texts)
    1

    Args:
      found: from `intruders`.

    Returns:
      A matplotlib figure.
    """
    similarity = _layers({path: result.similarity for path, result in found.items()}, ndim=1)
    intruder = _layers({path: result.intruder for path, result in found.items()}, ndim=1)
    figure, panel = _rows(similarity)
    width = max(len(row) for row in similarity.values())
    grid = np.full((len(similarity), width), np.nan)
    for index, (name, row) in enumerate(similarity.items()):
        grid[index, : len(row)] = row
        for column in np.flatnonzero(intruder[name]):
            panel.text(float(column + 1), index, "×", color="red", ha="center", va="center")
    image = _heat(panel, grid, left=1, top=0)
    panel.set(xlabel="singular vector of the adapted kernel")
    figure.colorbar(image, ax=panel, label="largest |cos| with one of W0")
    return figure


def _layers(found: Mapping[str, Array], ndim: int) -> dict[str, Any]:
    """Splits stacks into layers with `ndim` axes each, named `path[3]`."""
    if not found:
        raise AdapterError("Expected something to plot; got nothing.\n  Was anything adapted with factors?")
    layers = {}
    for path, values in found.items():
        array = on_host(values)
        for index in np.ndindex(array.shape[: array.ndim - ndim]):
            layers[f"{path}{list(index) if index else ''}"] = array[index]
    return layers


def _heat(panel: Axes, grid: Any, *, left: int, top: int) -> AxesImage:
    """Draws values in [0, 1]; `left` and `top` are the coordinates of the first column and row."""
    rows, columns = grid.shape
    extent = (left - 0.5, left + columns - 0.5, top + rows - 0.5, top - 0.5)
    return panel.imshow(grid, vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest")


def _positive(layers: Mapping[str, Any]) -> bool:
    return all(np.all(values > 0) for values in layers.values())


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _rows(layers: Mapping[str, Any]) -> tuple[Figure, Axes]:
    """Makes a figure with a row for each layer, the first one at the top."""
    figure = _figure(7, 1.2 + 0.25 * len(layers))
    panel = figure.subplots()
    panel.set_yticks(range(len(layers)), list(layers))
    panel.invert_yaxis()
    return figure, panel
