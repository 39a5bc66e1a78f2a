"""`lora-jax diff`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from .._errors import counted
from ._layers import Layer, difference, kind_of
from ._report import Report, UsageError, add_row, few, grouped, spans, table
from ._source import Source, open_adapter

_SHORT = 60  # characters; a longer list of a configuration is counted


def diff(
    one: Path, other: Path, /, *, layers: bool = False, tolerance: float = 0.0, base: Path | None = None
) -> Report:
    """Compares two adapters: configurations, layers, and the updates of each layer.

    The difference of a layer is ‖ΔW - ΔW'‖ relative to the larger of the two norms, from the factors; it does not
    matter how an update is factored. It is between 0 and 2, and reliable above 1e-8. The exit code is 1 if anything
    differs.

    Example: `lora-jax diff my_adapter compressed --layers`

    Args:
      one: an adapter.
      other: another one, in the same format.
      layers: one row for each layer, in place of one for each kind.
      tolerance: relative differences of layers up to this count as equal; 0 by default.
      base: the directory of the model, in safetensors files; for trainable tokens and VeRA only.
    """
    data = compared(open_adapter(one, base), open_adapter(other, base), tolerance)
    return Report(data, lambda: _shown(data, layers), code=0 if data["equal"] else 1)


def compared(one: Source, other: Source, tolerance: float) -> dict[str, Any]:
    """Returns the differences of two adapters."""
    if one.format != other.format:
        formats = f"{one.path}: {one.format}, {other.path}: {other.format}"
        raise UsageError(f"Expected adapters in one format; got {formats}. Convert one first: lora-jax convert.")
    first, second = one.layers, other.layers
    configuration = {}
    for name in sorted({*one.stated, *other.stated}):
        values = [found.stated.get(name) for found in (one, other)]
        if _meaning(values[0]) != _meaning(values[1]):
            configuration[name] = values
    every = [_compared(layer, second[name], tolerance) for name, layer in first.items() if name in second]
    only = [sorted(mine.keys() - yours.keys()) for mine, yours in ((first, second), (second, first))]
    return {
        "paths": [str(one.path), str(other.path)],
        "format": one.format,
        "equal": not configuration and not any(only) and not any(layer["differs"] for layer in every),
        "configuration": configuration,
        "only": only,
        "layers": every,
    }


def _meaning(value: Any) -> Any:
    """Returns a value of a configuration, in which null is the same as false or empty, and names have no order."""
    are_names = isinstance(value, list) and all(isinstance(name, str) for name in value)  # tokens have an order
    return (sorted(value) if are_names else value) or None


def _compared(one: Layer, other: Layer, tolerance: float) -> dict[str, Any]:
    relative = difference(one, other)
    return {
        "name": one.name,
        "kind": kind_of(one.name),
        "relative": relative,
        "differs": relative is None or relative > tolerance,
        "norms": [one.norm(), other.norm()],
        "ranks": [getattr(layer.variant, "rank", None) for layer in (one, other)],
        "scales": [one.scale, other.scale],
        "shapes": [one.shape, other.shape],
        "methods": [type(layer.variant).__name__ for layer in (one, other)],
    }


def _shown(data: Mapping[str, Any], per_layer: bool) -> Iterable[RenderableType]:
    if data["configuration"]:
        shown = table("configuration", *data["paths"])
        for name, values in data["configuration"].items():
            add_row(shown, name, *map(_short, values))
        yield shown
    for path, names in zip(data["paths"], data["only"], strict=True):
        if names:
            yield f"only in {path}: {counted(len(names), 'layer')}: {few(names)}"
    if differing := [layer for layer in data["layers"] if layer["differs"]]:
        yield _table(differing, per_layer)
    equal = len(data["layers"]) - len(differing)
    yield "The adapters are equal." if data["equal"] else f"{len(differing)} layers differ, {equal} are equal."


def _short(value: Any) -> str:
    text = str(value)
    return f"{counted(len(value), 'value')}" if len(text) > _SHORT and isinstance(value, list | dict) else text


def _table(differing: list[dict[str, Any]], per_layer: bool) -> RenderableType:
    shown = table("module", "#layers", "#difference", "#‖ΔW‖", "#‖ΔW'‖")
    for name, some in grouped(differing, "name" if per_layer else "kind").items():
        others = "other methods" if some[0]["methods"][0] != some[0]["methods"][1] else "other shapes"
        relative = spans(layer["relative"] for layer in some) or others
        add_row(shown, name, str(len(some)), relative, *(spans(layer["norms"][at] for layer in some) for at in (0, 1)))
    return shown
