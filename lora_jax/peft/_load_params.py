"""Reads a model of torch into a tree of parameters, leaf by leaf."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.paths import Patterns, as_tuple, flatten, matches_any, unflatten
from .._core.values import is_finite
from .._errors import CheckpointError, sections
from ._export_merged import NOT_STORED, outputs_of, tensor_of
from ._layout import outputs_from_torch
from ._names import expected_shape, from_torch
from ._safetensors import FLOATS, Stored
from ._sites import MappingOfRows, Site, compiled, find, sites, without_own_heads
from ._stored import named_for, stored_tensors


def load_params(
    directory: str | os.PathLike[str],
    mapping: MappingOfRows,
    params: Any,
    *,
    exclude: Patterns = (),
    unused: Patterns = (),
) -> Any:
    """Reads the safetensors files of a torch model into a tree of parameters; inverts `export_merged`.

    The leaves are read one after the other, and each tensor of a leaf after the other, so memory on the host is bounded
    by the largest leaf.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"up": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> mapping = lj.peft.layer("up", "model.fc1")
    >>> with tempfile.TemporaryDirectory() as path:
    ...     lj.peft.export_merged(path, params, mapping)
    ...     load_params(path, mapping, jax.eval_shape(lambda: params))["up"]["kernel"].shape
    (4, 3)

    Args:
      directory: has `model.safetensors`, or shards with `model.safetensors.index.json`.
      mapping: as in `export_merged`.
      params: the tree, of arrays or `jax.ShapeDtypeStruct`s: each leaf gets the dtype, and the sharding if it has one.
      exclude: patterns for paths that the files have nothing for; these leaves are returned as they are.
      unused: patterns for names of tensors that the tree has no leaves for, such as `"**.inv_freq"`.

    Returns:
      A tree like `params`, of arrays.

    Raises:
      CheckpointError: if there are no safetensors files or they are damaged; if a leaf has no row or no tensor, or does
        not fit it; if a tensor has no leaf. One error lists all, before anything is read. If a value overflows the
        dtype of its leaf.
      SpecError: if `mapping` is not a mapping to rows.
    """
    directory, rows, excluded = Path(directory), compiled(mapping), as_tuple(exclude)
    leaves, treedef = flatten(params)
    rows = without_own_heads(rows, leaves)
    places, problems = dict[str, list[Site]](), list[str]()
    for path, leaf in leaves.items():
        if matches_any(path, excluded):
            continue
        if (found := find(path, rows)) is None:
            problems.append(f"{path!r}: no row of the mapping matches it")
        elif isinstance(some := sites(path, tuple(leaf.shape), found), str):
            problems.append(f"{path!r}: {some}")
        elif some[0].row.is_parameter and some[0].row.stored is None:
            problems.append(f"{path!r}: {NOT_STORED}")
        elif not jnp.issubdtype(leaf.dtype, jnp.floating):
            problems.append(f"{path!r}: it has dtype {leaf.dtype}; expected one in floating point, as the values are")
        else:
            places[path] = some
    modules = {tensor_of(site).rpartition(".")[0] for some in places.values() for site in some}
    tensors = named_for(modules, stored_tensors(directory))
    for path, some in places.items():
        problems += [f"{path!r}: {problem}" for site in some if (problem := _problem(site, tensors))]
    taken = {tensor_of(site) for some in places.values() for site in some}
    left = [name for name in tensors if name not in taken and not matches_any(name, as_tuple(unused))]
    for some in places.values():
        if (head := f"{some[0].row.head}.weight") in left:
            left.remove(head)
            if not _same(tensors[head], tensors.get(tensor_of(some[0]))):
                problems.append(f"{head!r} is not {tensor_of(some[0])!r}, to which the mapping ties it")
    _refuse(directory, left, problems)
    read = {path: _leaf(leaves[path], some, tensors) for path, some in places.items()}
    return unflatten(treedef, leaves | read)


def _problem(site: Site, tensors: Mapping[str, Stored]) -> str | None:
    """Returns what is wrong with the tensor of a part of a leaf."""
    name = tensor_of(site)
    if (stored := tensors.get(name)) is None:
        return f"there is no tensor {name!r}"
    expected = expected_shape(f"saved.{site.row.parameter}", site.layout, outputs_of(site), 0)
    if stored.shape != expected:
        return f"{name!r} has shape {stored.shape}; expected {expected}"
    return f"{name!r} is stored as {stored.dtype}" if stored.dtype not in FLOATS else None


def _same(one: Stored, other: Stored | None) -> bool:
    if other is None or one.shape != other.shape or not {one.dtype, other.dtype} <= set(FLOATS):
        return False
    return bool(np.array_equal(one.read(), other.read()))


def _leaf(leaf: Any, places: list[Site], tensors: Mapping[str, Stored]) -> jax.Array:
    """Reads a leaf in its dtype, with its sharding."""
    layout, name = places[0].layout, f"saved.{places[0].row.parameter}"
    kind = "vector" if layout.row.kind == "vector" else "kernel"
    core = (layout.d_out,) if kind == "vector" else (layout.d_in, layout.d_out)
    matrix = np.empty((*layout.batch, *core), leaf.dtype)
    for site in places:
        stored = tensors[tensor_of(site)].read()
        tensor = outputs_from_torch(site.of_module(from_torch(name, stored, layout)), site.part)
        with np.errstate(over="ignore"):
            matrix[(*site.index, ..., site.outputs)] = tensor
        if not is_finite(matrix[(*site.index, ..., site.outputs)]) and is_finite(stored):
            raise CheckpointError(
                f"Expected values that {leaf.dtype}, the dtype of {site.path!r}, can hold; got up to "
                f"{float(np.abs(stored).max()):g} in {tensor_of(site)!r}.\n  Load into a leaf of a wider dtype."
            )
    array = layout.from_matrix(kind, matrix)
    if (sharding := getattr(leaf, "sharding", None)) is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _refuse(directory: Path, left: list[str], problems: list[str]) -> None:
    names = list(map(repr, left))
    if text := sections(("tensor", " that no leaf of `params` takes", names), ("problem", "", problems)):
        raise CheckpointError(
            f"Expected every leaf of `params` to have tensors in {directory}, and every tensor a leaf; got:\n{text}\n"
            "  Add rows to the mapping, or patterns to `exclude` and `unused`; nothing was read."
        )
