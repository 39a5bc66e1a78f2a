"""`lora-jax convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from .. import peft
from ..peft._sites import MappingOfRows
from ..peft._stored import stored_tensors
from ._named import mapping as mapping_of
from ._named import params
from ._report import Report, UsageError, check_options
from ._source import check_target, format_of, open_adapter

# The options that have an effect: with formats that have the names of modules; by the format of the source, and
# whether a checkpoint is written.
_BY_NAMES = ("modules", "component")
_USED = {
    ("orbax", False): ("mapping", "base", "base-name", "task", "component"),
    ("peft", True): ("mapping", "base"),
    ("peft", False): ("base", "base-name", "task"),
}


def convert(
    source: Path,
    target: Path,
    /,
    *,
    to: Literal["peft", "orbax", "kohya", "diffusers", "vllm", "llama.cpp", "mlx-lm"],
    mapping: str | None = None,
    base: str | None = None,
    base_name: str | None = None,
    task: str | None = None,
    modules: Path | None = None,
    component: str | None = None,
    force: bool = False,
) -> Report:
    """Converts an adapter: to PEFT's format, a checkpoint of lora_jax, or what a server reads.

    Everything is converted, or nothing is written. For `vllm`, `llama.cpp` and `mlx-lm`, what the server does not read
    is refused, and a scale that it reads otherwise than PEFT is multiplied into the factors.

    Example: `lora-jax convert checkpoints/adapter my_adapter --to peft --mapping smollm2`

    Args:
      source: a checkpoint, a directory in PEFT's format, or a safetensors file of kohya or diffusers.
      target: the directory to write; for kohya, the safetensors file.
      to: the format to write, or the server to write for.
      mapping: from paths to torch modules, if one of the two is a checkpoint: a preset of lora_jax.peft, or
        package.module:function.
      base: the parameters that the adapter is for, if one of the two is a checkpoint: the directory of an Orbax
        checkpoint, or package.module:function. From a checkpoint, needed only for modules that are saved in full and
        trainable tokens. From PEFT's format to that of a server, the directory of the model in safetensors files.
      base_name: what PEFT's configuration names as the base.
      task: PEFT's name of the task, such as CAUSAL_LM.
      modules: to read a file of kohya: the directory of the model in safetensors files, or a text file with a name of a
        module in each line.
      component: the part of a pipeline that PEFT's files are of, such as unet.
      force: write to a directory that is not empty.
    """
    check_target(target, [source], force=force)
    kind = format_of(source)
    if kind == to or (kind != "peft" and to == "orbax") or (kind, to) == ("orbax", "kohya"):
        what = "another format than" if kind == to else "PEFT's format as"
        raise UsageError(f"Expected {what} that of the source, to convert to {to!r}; {source} has {kind!r}.")
    options: dict[str, object] = {"mapping": mapping, "base": base, "base-name": base_name, "task": task}
    options |= {"modules": modules, "component": component}
    by_names = kind == "safetensors" or (kind == "peft" and to in ("kohya", "diffusers"))
    check_options(f"{kind} to {to}", options, _BY_NAMES if by_names else _USED[kind, to == "orbax"])
    if by_names:
        names = None if modules is None else _modules(modules)
        peft.convert(source, target, to=to, modules=names, component=component)
    elif to == "orbax":
        _to_checkpoint(source, target, mapping_of(mapping), base)
    else:
        rows = mapping_of(mapping) if kind == "orbax" else {}
        found = open_adapter(source, Path(base) if base and kind == "peft" else None)
        peft.export(
            target,
            found.adapter,
            rows or found.mapping,
            base=params(base) if base and kind == "orbax" else found.params,
            base_name=base_name or found.base,
            task_type=task or found.task,
            for_server=None if to == "peft" else to,
            component=component,
        )
    data = {"source": str(source), "target": str(target), "from": kind, "to": to}
    return Report(data, lambda: [f"{target}: written in the format {to!r}"])


def _to_checkpoint(source: Path, target: Path, rows: MappingOfRows, base: str | None) -> None:
    from .. import checkpoint

    if base is None:
        raise UsageError("Expected --base, the parameters that the adapter is for, to write a checkpoint.")
    tree = params(base)
    checkpoint.save(target, peft.load(source, rows, tree), base=tree)


def _modules(names: Path) -> list[str]:
    """Returns the names of modules: those of the tensors of a model, or the lines of a file."""
    if names.is_dir():
        return list(dict.fromkeys(name.rpartition(".")[0] for name in stored_tensors(names)))
    return names.read_text().split()
