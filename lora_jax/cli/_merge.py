"""`lora-jax merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import peft
from .._core.table import size
from .._errors import counted
from ..peft._stored import stored_tensors
from ._console import bar
from ._report import Report
from ._source import check_target


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    /,
    *,
    max_shard_size: str = "5GB",
    untie: str | None = None,
    force: bool = False,
) -> Report:
    """Writes the base with an adapter merged into it, as safetensors files that any reader of the base loads.

    One tensor at a time is in memory. Tensors that the adapter does not change are copied.

    Example: `lora-jax merge Qwen3-8B my_adapter merged`

    Args:
      base: the directory of the model, in safetensors files.
      adapter: in PEFT's format.
      out: the directory to write.
      max_shard_size: the largest size of a file, 5GB by default.
      untie: the name of the head's module, such as lm_head: it gets a tensor of its own if the adapter changes it and
        the embedding that it is tied to in different ways.
      force: replace a model in a directory that is not empty.
    """
    check_target(out, [base, adapter], force=force)
    with bar(f"Merging into {out}") as step:
        peft.merge_files(base, adapter, out, max_shard_size=max_shard_size, untie=untie, overwrite=force, progress=step)
    tensors = stored_tensors(out)
    data = {
        "base": str(base),
        "adapter": str(adapter),
        "target": str(out),
        "files": sorted({tensor.file.name for tensor in tensors.values()}),
        "tensors": len(tensors),
        "bytes": sum(tensor.size for tensor in tensors.values()),
    }
    return Report(data, lambda: [_shown(data)])


def _shown(data: dict[str, Any]) -> str:
    files = counted(len(data["files"]), "file")
    return f"{data['target']}: {counted(data['tensors'], 'tensor')} in {files}, {size(data['bytes'])}"
