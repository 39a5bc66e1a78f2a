"""`lora-jax inspect`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from .._core.table import size
from ._layers import Layer, kind_of
from ._report import Report, add_row, few, grouped, number, spans, table
from ._source import Source, open_adapter


def inspect(directory: Path, /, *, layers: bool = False, base: Path | None = None) -> Report:
    """Shows what an adapter adapts: layers, ranks, scales, norms of the updates, parameters.

    The norms are those of s·A·B in the Frobenius norm, from the factors; no base is needed. An update of zero is
    marked: the layer was not trained, or was reset.

    Example: `lora-jax inspect my_adapter --layers`

    Args:
      directory: an adapter.
      layers: one row for each layer, in place of one for each kind.
      base: the directory of the model, in safetensors files; for trainable tokens and VeRA only.
    """
    data = described(open_adapter(directory, base))
    return Report(data, lambda: _shown(data, layers))


def described(found: Source) -> dict[str, Any]:
    """Returns what is in an adapter."""
    every = [_described(layer) for layer in found.layers.values()]
    return {
        "path": str(found.path),
        "format": found.format,
        "base": found.base,
        "task": found.task,
        "parameters": sum(layer["parameters"] for layer in every),
        "bytes": sum(layer["bytes"] for layer in every),
        "zero": [layer["name"] for layer in every if layer["zero"]],
        "kinds": [_kind(name, some) for name, some in grouped(every, "kind").items()],
        "layers": every,
    }


def _described(layer: Layer) -> dict[str, Any]:
    norm, arrays = layer.norm(), layer.arrays.values()
    return {
        "name": layer.name,
        "kind": kind_of(layer.name),
        "method": type(layer.variant).__name__,
        "rank": getattr(layer.variant, "rank", None),
        "alpha": getattr(layer.variant, "alpha", None),
        "scale": layer.scale,
        "shape": layer.shape,
        "norm": norm,
        "zero": norm == 0,
        "parameters": sum(array.size for array in arrays),
        "bytes": sum(array.nbytes for array in arrays),
        "dtype": ", ".join(sorted({str(array.dtype) for array in arrays})),
    }


def _kind(name: str, some: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    norms = [layer["norm"] for layer in some if layer["norm"] is not None]
    return {
        "name": name,
        "layers": len(some),
        "zero": sum(layer["zero"] for layer in some),
        "norm": {"min": min(norms), "max": max(norms)} if norms else None,
        **{each: _distinct(some, each) for each in ("method", "rank", "scale", "shape")},
        **{each: sum(layer[each] for layer in some) for each in ("parameters", "bytes")},
    }


def _distinct(some: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    values = {repr(layer[name]): layer[name] for layer in some if layer[name] is not None}
    return sorted(values.values())


def _shown(data: Mapping[str, Any], per_layer: bool) -> Iterable[RenderableType]:
    yield ", ".join(
        [
            f"{data['path']}: {'a checkpoint' if data['format'] == 'orbax' else 'in the format of PEFT'}",
            f"base {data['base'] or 'not named'}",
            *([f"task {data['task']}"] if data["task"] else []),
            f"{data['parameters']:,} parameters, {size(data['bytes'])}",
        ]
    )
    yield _per_layer(data["layers"]) if per_layer else _per_kind(data["kinds"])
    if zero := len(data["zero"]):
        yield f"{zero} of {len(data['layers'])} layers have an update of zero."


def _per_kind(kinds: Iterable[Mapping[str, Any]]) -> Table:
    shown = table("module", "#layers", "method", "#rank", "#scale", "#‖ΔW‖", "#zero", "#parameters")
    for kind in kinds:
        norm = spans((kind["norm"] or {}).values())
        few_of = [few(map(number, kind[name])) for name in ("rank", "scale")]
        zero = "" if not kind["zero"] else "all" if kind["zero"] == kind["layers"] else str(kind["zero"])
        cells = [kind["name"], str(kind["layers"]), few(kind["method"]), *few_of, norm, zero, f"{kind['parameters']:,}"]
        add_row(shown, *cells, style="yellow" if zero else None)
    return shown


def _per_layer(every: Iterable[Mapping[str, Any]]) -> Table:
    shown = table("module", "method", "#rank", "#scale", "shape", "#‖ΔW‖", "#parameters")
    for layer in every:
        norm = "zero" if layer["zero"] else number(layer["norm"])
        shape = "" if layer["shape"] is None else "{} × {}".format(*layer["shape"])
        cells = [layer["name"], layer["method"], number(layer["rank"]), number(layer["scale"]), shape, norm]
        add_row(shown, *cells, f"{layer['parameters']:,}", style="yellow" if layer["zero"] else None)
    return shown
