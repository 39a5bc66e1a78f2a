"""The tensors of one torch module: names, and shapes for each kind of layer."""

from __future__ import annotations

import numpy as np

from ._layout import Layout, Values
from ._parameters import from_parameter, parameter_shape, to_parameter, turned, value_shape

PREFIX = "base_model.model."

# Suffixes of names in the file, by our names of the tensors. A plain parameter has its own name as suffix.
SUFFIXES = {
    "a": ".lora_A.weight",
    "b": ".lora_B.weight",
    "e": ".lora_E",
    "bias": ".lora_B.bias",
    "magnitude": ".lora_magnitude_vector",
    "lambda_b": ".vera_lambda_b",
    "lambda_d": ".vera_lambda_d",
    "rows": ".token_adapter.trainable_tokens_delta",
}
EMBEDDING_SUFFIXES = {"a": ".lora_embedding_A", "b": ".lora_embedding_B"}
_OF_KIND = {"embedding": EMBEDDING_SUFFIXES, "swapped parameter": {"a": SUFFIXES["b"], "b": SUFFIXES["a"]}}


def suffix(kind: str, name: str) -> str:
    """Returns the suffix of a tensor of a module of this kind."""
    return (SUFFIXES | _OF_KIND.get(kind, {})).get(name, f".{name.removeprefix('saved.')}")


def parse(name: str) -> tuple[str, str] | None:
    """Returns the module and our name of a tensor in the file; None if it is not of an adapter.

    >>> parse("base_model.model.model.norm.weight"), parse("base_model.model.fc.lora_B.bias")
    (('model.norm', 'saved.weight'), ('fc', 'bias'))
    """
    if not name.startswith(PREFIX):
        return None
    rest = name.removeprefix(PREFIX)
    for table in (SUFFIXES, EMBEDDING_SUFFIXES):
        for ours, end in table.items():
            if rest.endswith(end):
                return rest.removesuffix(end), ours
    module, _, parameter = rest.rpartition(".")
    if ".lora_" in rest or ".vera_" in rest or not module:
        return None
    base = module.removesuffix(".base_layer")
    return (base, f"base.{parameter}") if base != module else (module, f"saved.{parameter}")


def to_torch(name: str, matrix: Values, layout: Layout) -> Values:
    """Returns a matrix `(in, out)`, or a vector of outputs, in the shape that the torch module has it in."""
    row = layout.row
    if row.is_parameter:
        return turned(matrix, layout) if name.startswith("saved.") else to_parameter(name, matrix, layout)
    spatial = _spatial(layout)
    if row.keep_shape and name.startswith("saved."):
        return matrix.reshape(_outputs(layout))
    if name == "b" and row.kind == "conv":
        return matrix.T[(..., *(None,) * len(spatial))]
    if name == "magnitude" and row.kind == "conv":
        return matrix[(None, slice(None), *(None,) * len(spatial))]
    if name in ("a", "saved.weight") and row.kind == "conv":
        return np.moveaxis(matrix.T.reshape(-1, *spatial, layout.d_in // int(np.prod(spatial))), -1, 1)
    if name == "saved.weight" and (row.kind == "embedding" or row.conv1d):
        return matrix
    return matrix.T if name in ("a", "b", "saved.weight") and row.kind != "vector" else matrix


def from_torch(name: str, tensor: Values, layout: Layout) -> Values:
    """Inverts `to_torch`, for a tensor of the shape that `expected_shape` states."""
    row = layout.row
    if row.keep_shape and name.startswith("saved."):
        return tensor.reshape(-1)
    if row.is_parameter:
        return turned(tensor, layout) if name.startswith("saved.") else from_parameter(name, tensor, layout)
    if row.kind == "conv" and name in ("b", "magnitude"):
        tensor = tensor.reshape(-1, tensor.shape[1]) if name == "b" else tensor.reshape(-1)
    if row.kind == "conv" and name in ("a", "saved.weight"):
        tensor = np.moveaxis(tensor, 1, -1).reshape(tensor.shape[0], -1)
    if name == "saved.weight" and (row.kind == "embedding" or row.conv1d):
        return tensor
    return tensor.T if name in ("a", "b", "saved.weight") and row.kind != "vector" else tensor


def expected_shape(name: str, layout: Layout, d_out: int, rank: int) -> tuple[int, ...]:
    """Returns the shape of a tensor of a module with `d_out` outputs. For `rows`, the rank is the number of rows."""
    row, d_in, spatial = layout.row, layout.d_in, tuple[int, ...]()
    if row.is_parameter:
        return value_shape(layout, d_out) if name.startswith("saved.") else parameter_shape(name, layout, d_out, rank)
    if row.kind == "conv":
        spatial, d_in = _spatial(layout), layout.shape[layout.inputs[-1]]
    ones = (1,) * len(spatial)
    weight = (d_in, d_out) if row.kind == "embedding" or row.conv1d else (d_out, d_in, *spatial)
    shapes = {
        "a": (rank, d_in, *spatial),
        "b": (d_out, rank, *ones),
        "magnitude": (1, d_out, *ones) if row.kind == "conv" else (d_out,),
        "rows": (rank, d_out),
        "lambda_d": (rank,),
        "e": (rank, 1),
        "saved.weight": (d_out,) if row.kind == "vector" else weight,
    }
    if row.keep_shape and name.startswith("saved."):
        return _outputs(layout)
    return shapes.get(name, (d_out,))


def _spatial(layout: Layout) -> tuple[int, ...]:
    """Returns the sizes of a convolution kernel's spatial axes: all input axes but the last."""
    return tuple(layout.shape[axis] for axis in layout.inputs[:-1])


def _outputs(layout: Layout) -> tuple[int, ...]:
    """Returns the sizes of the output axes, in torch's order."""
    return tuple(layout.shape[axis] for axis in layout.outputs)
