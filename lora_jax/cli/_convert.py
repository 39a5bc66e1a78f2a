"""`lora-jax convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from .. import peft
from ._named import mapping as mapping_of
from ._named import params
from ._report import Report, UsageError
from ._source import Source, check_target, is_peft, open_adapter


def convert(
    source: Path,
    target: Path,
    /,
    *,
    to: Literal["peft", "orbax"],
    mapping: str | None = None,
    base: str | None = None,
    base_name: str | None = None,
    task: str | None = None,
    force: bool = False,
) -> Report:
    """Converts an adapter between checkpoints of lora_jax and PEFT's format.

    Example: `lora-jax convert checkpoints/adapter for_peft --to peft --mapping smollm2`

    Args:
      source: an adapter.
      target: the directory to write.
      to: the format to write.
      mapping: from paths to torch modules: a preset of lora_jax.peft, or package.module:function.
      base: the parameters that the adapter is for: the directory of an Orbax checkpoint, or package.module:function.
        Needed to read PEFT's format; to write it, only for modules that are saved in full and trainable tokens.
      base_name: what the configuration of PEFT names as the base.
      task: PEFT's name of the task, such as CAUSAL_LM.
      force: write to a directory that is not empty.
    """
    check_target(target, [source], force=force)
    rows = mapping_of(mapping)
    if to == "peft":
        if is_peft(source):
            raise UsageError(f"Expected a checkpoint of lora_jax to write PEFT's format; {source} has PEFT's.")
        found = open_adapter(source)
        tree = found.params if base is None else params(base)
        peft.export(target, found.adapter, rows, base=tree, base_name=base_name, task_type=task)
        adapter = found.adapter
    else:
        from .. import checkpoint

        if base is None:
            raise UsageError("Expected --base, the parameters that the adapter is for, to read PEFT's format.")
        tree = params(base)
        adapter = peft.load(source, rows, tree)
        checkpoint.save(target, adapter, base=tree)
    data = {"source": str(source), "target": str(target), "format": to, "paths": list(adapter)}
    return Report(data, lambda: [f"{target}: {len(adapter)} adapted parameters in the format {to!r}"])
