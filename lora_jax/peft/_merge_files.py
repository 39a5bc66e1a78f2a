"""Merges an adapter in PEFT's format into the files of its base, tensor by tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._core.adapter import Adapter
from .._errors import AdapterError, MergeError, counted, listed
from .._merge.fold import fold
from .._merge.merge import check_fits, check_mergeable
from .._variants import Full, Rows
from ._row import Row
from ._safetensors import FLOATS, NAMES, Stored
from ._shards import check_empty, write_model
from ._stored import stored_tensors
from ._torch_adapter import read_with_base
from ._untrusted import invalid
from ._write import Entry, bytes_of, entry

# The names of input embeddings, and the most frequent name of a head that is tied to one, in `transformers`.
_TABLES, _HEAD = ("embed_tokens", "wte", "embed_in", "word_embeddings", "shared"), "lm_head"
_COPIED = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"}


def merge_files(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    untie: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Merges an adapter in PEFT's format into the safetensors files of its base, without a model.

    Each adapted tensor is read, merged as `merge` does, in float32 or wider with one cast to its dtype, and written
    before the next one is read; the others are copied byte by byte. So memory is bounded by the largest adapted tensor
    and the adapter. The result has the tensors of the base, and those that the adapter has in full and the base lacks,
    such as a classifier; a tied head is stored as in the base. The configuration and the tokenizer are copied.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax as lj
    >>> params, mapping = {"up": {"kernel": jnp.ones((4, 3))}}, lj.peft.layer("up", "model.fc1")
    >>> part = lj.Adapter(lj.LoRA(rank=1, alpha=2), "io", a=jnp.ones((4, 1)), b=jnp.ones((1, 3)))
    >>> with tempfile.TemporaryDirectory() as path:
    ...     lj.peft.export_merged(f"{path}/base", params, mapping)
    ...     lj.peft.export(f"{path}/adapter", {"up/kernel": part}, mapping, base=params)
    ...     merge_files(f"{path}/base", f"{path}/adapter", f"{path}/merged")
    ...     lj.peft.load_params(f"{path}/merged", mapping, params)["up"]["kernel"][0].tolist()
    [3.0, 3.0, 3.0]

    Args:
      base: the directory of the model: `model.safetensors`, or shards with `model.safetensors.index.json`.
      adapter: has `adapter_model.safetensors` and `adapter_config.json`.
      out: a new or empty directory.
      max_shard_size: the size of a file, in bytes or as a text such as `"5GB"`.
      untie: the name of the head's module, such as `"lm_head"`: it gets a tensor of its own if the adapter changes it
        and the embedding that it is tied to in different ways, and `tie_word_embeddings` of the configuration becomes
        false. None refuses such an adapter.
      overwrite: replace a model in `out`.
      progress: called after each tensor with the bytes written and the bytes in total.

    Raises:
      AdapterError: if the base lacks a module of the adapter, or has it in another shape or not in floating point. One
        error lists all, before anything is written.
      CheckpointError: where `read` raises it; if the base cannot be read; if `out` has files or cannot be written.
      MergeError: if a merged tensor overflows its dtype; for `ALoRA`, whose update differs between tokens; if a
        head is tied to an embedding and the adapter changes them in different ways.
      SpecError: if `max_shard_size` is not a size.
    """
    base, adapter, out = Path(base), Path(adapter), Path(out)
    check_empty(out, overwrite)
    settings = _settings(base)
    model = _merged(base, adapter, is_tied=_is_tied(settings), untie=untie)
    others: dict[str, Path | bytes] = dict(_other_files(base))
    if model.untied:
        others["config.json"] = (json.dumps(settings | {"tie_word_embeddings": False}, indent=2) + "\n").encode()
    write_model(
        out,
        model.entries(),
        model.contents(),
        max_shard_size=max_shard_size,
        others=others,
        overwrite=overwrite,
        progress=progress,
    )


def _merged(base: Path, adapter: Path, *, is_tied: bool, untie: str | None) -> _Model:
    """Returns what is to be written, or raises; keeps the adapter, and no tensors of the base."""
    found, tensors = read_with_base(adapter, stored_tensors(base))
    assert tensors is not None
    model = _Model(tensors)
    for path, part in found.adapter.items():
        model.add(path.replace("/", "."), part, found.mapping[path], found.params[path])
    if is_tied:
        model.tie(untie=untie)
    model.refuse(base)
    return model


class _Model:
    """The tensors of a base, under the adapter's names, and what is merged into each."""

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        self.tensors = tensors
        self.untied: dict[str, str] = {}  # heads that get a tensor of their own, and the tables that they had
        self._updates: dict[str, Adapter] = {}
        self._rows: dict[str, Row] = {}
        self._values: dict[str, Any] = {}  # the shapes that the adapter expects, or its copies of the base's values

    def add(self, name: str, part: Adapter, row: Row, value: Any) -> None:
        """Adds one leaf of the adapter; `value` is its shape, or its value in the base."""
        for tensor in (name, f"{row.head}.weight") if f"{row.head}.weight" in self.tensors else (name,):
            self._updates[tensor], self._rows[tensor], self._values[tensor] = part, row, value

    def tie(self, *, untie: str | None) -> None:
        """Finds what the adapter does to a head that is tied to a table.

        Raises:
          MergeError: if it changes them in different ways, unless `untie`.
        """
        head = f"{untie or _HEAD}.weight"
        ends = [[table, "weight"] for table in _TABLES]
        tables = [name for name, one in self.tensors.items() if name.split(".")[-2:] in ends and one.dtype in FLOATS]
        if head in self.tensors or len(tables) != 1:
            return
        part, (table,) = self._updates.get(head), tables
        update = self._updates.get(table)
        if part is not None and isinstance(part.variant, Full):  # a copy, if it has the same values
            saved = update if update is not None and isinstance(update.variant, Full) else None
            if np.array_equal(part.value, self.tensors[table].read() if saved is None else saved.value):
                del self._updates[head]
                part, update = None, update if saved is None else None
        tied = update is None or self._rows[table].head is not None or isinstance(update.variant, Rows)
        if part is None and tied:
            return
        if untie is None:
            got = "each has its own" if part and update else f"only {head if part else table!r} has one"
            raise MergeError(
                f"Expected one adapter of {table!r} and of the head that is tied to it; {got}.\n"
                f"  Pass untie={_HEAD!r}, or what the head's module is called, to write it as a tensor of its own."
            )
        self.untied[head] = table

    def refuse(self, base: Path) -> None:
        """Raises if the base lacks a tensor, or has another shape or no floating-point values."""
        check_mergeable(self._updates)
        found = []
        for name, part in self._updates.items():
            stored, value = self.tensors.get(self.untied.get(name, name)), self._values[name]
            if stored is None:
                if not isinstance(part.variant, Full):
                    found.append(f"{name!r} is not in the base")
            elif stored.shape != tuple(value.shape):
                found.append(f"{name!r} has shape {stored.shape} in the base; the adapter is for {tuple(value.shape)}")
            elif stored.dtype not in FLOATS:
                found.append(f"{name!r} is stored as {stored.dtype} in the base; expected one of {', '.join(FLOATS)}")
            elif isinstance(value, np.ndarray) and not np.array_equal(value, stored.read()):
                found.append(f"{name!r} has other values in the base than in the adapter's copy of it")
        if found:
            raise AdapterError(
                f"Expected an adapter of the model in {base}; got {counted(len(found), 'problem')}:\n{listed(found)}\n"
                "  Pass the base that the adapter was trained for; nothing was written."
            )
        self._values.clear()  # a table of the base may be among them

    def entries(self) -> list[Entry]:
        """Returns the tensors to write: those of the base, then the others."""
        kept = [Entry(stored.name, stored.dtype, stored.shape, stored.size) for stored in self.tensors.values()]
        heads = [self.tensors[table] for table in self.untied.values()]
        kept += [entry(name, one.dtype, one.shape) for name, one in zip(self.untied, heads, strict=True)]
        return kept + [entry(name, NAMES[part.value.dtype], part.value.shape) for name, part in self._added().items()]

    def contents(self) -> Iterator[Iterable[Any]]:
        """Yields the content of each tensor."""
        heads = {head: self.tensors[table] for head, table in self.untied.items()}
        for name, stored in {**self.tensors, **heads}.items():
            part = self._updates.get(name)
            yield stored.pieces() if part is None else [bytes_of(_folded(name, stored, part))]
        for part in self._added().values():
            yield [bytes_of(part.value)]

    def _added(self) -> dict[str, Adapter]:
        """Returns what the base lacks and the adapter has in full."""
        known = {*self.tensors, *self.untied}
        return {name: part for name, part in self._updates.items() if name not in known}


def _folded(name: str, stored: Stored, part: Adapter) -> Any:
    w = stored.read()
    merged = fold(w, part)
    check_fits({name: w}, {name: part}, {name: merged})
    return merged


def _settings(base: Path) -> dict[str, Any]:
    """Returns the configuration of a model; an empty one if it has none."""
    try:
        settings = json.loads((base / "config.json").read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise invalid(base / "config.json", f"{type(error).__name__}: {error}") from error
    return settings if isinstance(settings, dict) else {}


def _is_tied(settings: Mapping[str, Any]) -> bool:
    """Whether the head of a model without a tensor of its own is tied; in `transformers`, that is the default."""
    names = settings.get("architectures") or ()
    is_language_model = any("LM" in name or "ConditionalGeneration" in name for name in map(str, names))
    return is_language_model and settings.get("tie_word_embeddings", True) is not False


def _other_files(base: Path) -> dict[str, Path]:
    """Returns the configuration, the tokenizer and what else belongs to a model and is not its weights."""
    found = {path.name: path for path in sorted(base.iterdir()) if path.is_file() and not path.name.startswith(".")}
    return {
        name: path
        for name, path in found.items()
        if (path.suffix in _COPIED and not name.endswith(".index.json")) or name.startswith("LICENSE")
    }
