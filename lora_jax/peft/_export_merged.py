"""Writes parameters as a model of torch, leaf by leaf: safetensors files that Hugging Face's libraries read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .._core.adapter import Adapter, Adapters
from .._core.attach import check
from .._core.base import dense
from .._core.paths import Patterns, as_tuple, flatten, matches_any
from .._core.values import on_host
from .._errors import AdapterError, sections
from .._merge.fold import fold
from .._merge.merge import check_finite, check_fits, check_mergeable, check_tied
from ._layout import Values, outputs_to_torch
from ._module import outputs_in_module
from ._names import expected_shape, to_torch
from ._orbax import OrbaxLeaf, orbax_leaves
from ._safetensors import NAMES
from ._shards import write_model
from ._sites import MappingOfRows, Site, compiled, find, sites, without_own_heads
from ._write import Entry, bytes_of, entry


def export_merged(
    directory: str | os.PathLike[str],
    params: Any,
    mapping: MappingOfRows,
    *,
    adapter: Adapters | None = None,
    config: Mapping[str, Any] | None = None,
    exclude: Patterns = (),
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes parameters as `model.safetensors` of the torch model, merged with an adapter if there is one.

    The leaves are converted one after the other: merged as `merge` does, dequantized, divided into the layers of a
    stack and the modules that they fuse, in torch's order and scale of the outputs. So memory is bounded by the
    largest leaf. A head that is tied to an embedding has no tensor of its own, as in Hugging Face's files. Every leaf
    is written, or nothing is.

    >>> import pathlib, tempfile, jax.numpy as jnp, lora_jax as lj
    >>> params = {"up": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> mapping = lj.peft.layer("up", "model.fc1")
    >>> with tempfile.TemporaryDirectory() as path:
    ...     export_merged(path, params, mapping, config={"model_type": "mine"})
    ...     sorted(file.name for file in pathlib.Path(path).iterdir())
    ['config.json', 'model.safetensors']

    Args:
      directory: new or empty.
      params: a tree of parameters, or the path of a tree in an Orbax checkpoint, of which one leaf is read at a time.
      mapping: as in `export`; it has a row for every leaf.
      adapter: merged into its leaves; None for `params` as they are.
      config: the configuration of the torch model, written as `config.json`.
      exclude: patterns for paths that the torch model has no parameters for, such as the state of random generators.
      max_shard_size: the size of a file, in bytes or as a text such as `"5GB"`. More tensors are divided into shards,
        with an index.
      overwrite: replace a model in `directory`.
      progress: called after each tensor with the bytes written and the bytes in total.

    Raises:
      AdapterError: if a leaf cannot be written: no row matches its path, it does not fit the row, or the format lacks
        its dtype; if leaves do not fill a module. One error lists all. If the adapter does not belong to `params`.
      CheckpointError: if `directory` has files, or cannot be written; if there is no Orbax checkpoint.
      MergeError: where `merge` raises it, except that adapted leaves may be quantized.
      SpecError: if `mapping` is not a mapping to rows, or `max_shard_size` not a size.
    """
    rows = compiled(mapping)
    adapter = {} if adapter is None else adapter
    leaves = orbax_leaves(Path(params)) if isinstance(params, str | os.PathLike) else flatten(params)[0]
    check(leaves, adapter)
    check_mergeable(adapter)
    check_finite(adapter)
    check_tied(leaves, adapter, advice="Export a tree in which {path!r} is a copy.")
    excluded = as_tuple(exclude)
    model = _Model(without_own_heads(rows, leaves))
    for path, leaf in leaves.items():
        if not matches_any(path, excluded):
            model.add(path, leaf)
    model.refuse()
    contents = _contents(model, leaves, adapter)
    others = {} if config is None else {"config.json": (json.dumps(dict(config), indent=2) + "\n").encode()}
    if jax.process_index() != 0:  # all processes gather the leaves, and one writes them
        for pieces in contents:
            list(pieces)
        return
    write_model(
        Path(directory),
        model.entries,
        contents,
        max_shard_size=max_shard_size,
        others=others,
        overwrite=overwrite,
        progress=progress,
    )


# PEFT's file is the same for modules that store (experts, in, out) and (experts, out, in).
NOT_STORED = (
    "its row does not state how torch stores it: peft.experts(…, stored='oi') for (experts, out, in), as in Mixtral; "
    "'io' as in GPT-OSS"
)


class _Model:
    """The tensors that leaves become, and what cannot be written.

    Attributes:
      places: the torch modules of each leaf.
      entries: the tensors, in the order in which the leaves complete them.
    """

    def __init__(self, rows: list[Any]) -> None:
        self.places: dict[str, list[Site]] = {}
        self.entries: list[Entry] = []
        self._rows = rows
        self._filled: dict[str, list[range]] = {}  # the outputs of each tensor that leaves have
        self._dtypes: dict[str, str] = {}
        self._unmatched: list[str] = []
        self._problems: list[str] = []

    def add(self, path: str, leaf: Any) -> None:
        """Adds the tensors of a leaf."""
        if (found := find(path, self._rows)) is None:
            self._unmatched.append(repr(path))
        elif isinstance(places := sites(path, tuple(leaf.shape), found), str):
            self._problems.append(f"{path!r}: {places}")
        elif places[0].row.is_parameter and places[0].row.stored is None:
            self._problems.append(f"{path!r}: {NOT_STORED}")
        elif isinstance(leaf, jax.ShapeDtypeStruct):
            self._problems.append(f"{path!r}: its values are needed; got a shape")
        elif np.dtype(leaf.dtype) not in NAMES:
            self._problems.append(
                f"{path!r} has dtype {leaf.dtype}, which is not written; cast it, such as to bfloat16"
            )
        else:
            self.places[path] = places
            for site in places:
                self._fill(site, NAMES[np.dtype(leaf.dtype)])

    def _fill(self, site: Site, dtype: str) -> None:
        name, outputs = tensor_of(site), outputs_in_module(site)
        filled = self._filled.setdefault(name, [])
        if any(outputs.start < other.stop and other.start < outputs.stop for other in filled):
            self._problems.append(f"{site.path!r}: another leaf is also stored as {name}")
        if (other := self._dtypes.setdefault(name, dtype)) != dtype:
            self._problems.append(f"{site.path!r} has {dtype}, and another leaf of {name!r} {other}; cast one of them")
        filled.append(outputs)
        total = outputs_of(site)
        if sum(map(len, filled)) == total:
            shape = expected_shape(f"saved.{site.row.parameter}", site.layout, total, 0)
            self.entries.append(entry(name, dtype, shape))

    def refuse(self) -> None:
        """Raises if anything cannot be written."""
        complete = {one.name for one in self.entries}
        problems = self._problems or [
            f"{name!r}: the leaves have {sum(map(len, filled))} of its outputs"
            for name, filled in self._filled.items()
            if name not in complete
        ]
        text = sections(("path", " that no row of the mapping matches", self._unmatched), ("problem", "", problems))
        if text:
            raise AdapterError(
                f"Expected a mapping from every leaf of `params` to a torch module; got:\n{text}\n"
                "  Add rows to the mapping, or patterns to `exclude`; nothing was written."
            )


def tensor_of(site: Site) -> str:
    """Returns the name of the tensor that has a part of a leaf."""
    return site.module if site.row.is_parameter else f"{site.module}.{site.row.parameter}".removeprefix(".")


def outputs_of(site: Site) -> int:
    """Returns the number of outputs of a torch module."""
    return site.last - site.first if site.part.of is None else site.part.of[1]


def _contents(model: _Model, leaves: Mapping[str, Any], adapter: Adapters) -> Iterator[Iterable[Any]]:
    """Yields the content of each entry; one leaf is in memory at a time."""
    joined: dict[str, tuple[Values, list[int]]] = {}  # tensors that several leaves fill, and how many outputs they have
    for path, places in model.places.items():
        layout, name = places[0].layout, f"saved.{places[0].row.parameter}"
        kind = "vector" if layout.row.kind == "vector" else "kernel"
        matrix = layout.to_matrix(kind, _value(path, leaves[path], adapter.get(path)))
        for site in places:
            tensor = outputs_to_torch(matrix[site.index][..., site.outputs], site.part)
            if site.part.of is not None:
                empty = np.empty((*tensor.shape[:-1], outputs_of(site)), tensor.dtype)
                whole, filled = joined.setdefault(tensor_of(site), (empty, []))
                whole[..., outputs_in_module(site).start : outputs_in_module(site).stop] = tensor
                filled.append(tensor.shape[-1])
                if sum(filled) < outputs_of(site):
                    continue
                tensor, _ = joined.pop(tensor_of(site))
            yield [bytes_of(to_torch(name, tensor, layout))]


def _value(path: str, leaf: Any, part: Adapter | None) -> Values:
    """Returns a leaf on the host, dequantized and merged with its adapter."""
    leaf = dense(leaf.read() if isinstance(leaf, OrbaxLeaf) else leaf)
    if part is not None:
        merged = fold(leaf, part)
        check_fits({path: leaf}, {path: part}, {path: merged})
        leaf = merged
    return on_host(leaf)
