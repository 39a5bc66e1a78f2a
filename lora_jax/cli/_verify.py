"""`lora-jax verify`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import RenderableType
from rich.text import Text

from .._core.linalg import has_factors
from .._core.variant import LowRank
from .._errors import CheckpointError, counted
from ..peft._servers import server as server_of
from ..peft._sites import compiled, find, sites
from ..peft._stored import named_for, stored_tensors
from ._named import params
from ._report import Report, UsageError, advice, check_options, few, printable
from ._source import Source, format_of, open_adapter

_OTHER_FILES = ("diffusers", "mlx-lm")
_VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank from the default
_VLLM = {  # entries of PEFT's configuration with the values that vLLM accepts
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga"),
}


def verify(
    directory: Path,
    /,
    *,
    base: str | None = None,
    server: Literal["vllm", "llama.cpp", "diffusers", "mlx-lm"] | None = None,
    component: str | None = None,
) -> Report:
    """Verifies an adapter: its files, and whether it fits a base and a server.

    The files are complete and valid, all values are finite, and tensors and configuration agree. With a base, each
    module is there, with the same shape. With a server, nothing is refused or read with another scale. The exit code is
    1 if there is a problem.

    Example: `lora-jax verify my_adapter --base Qwen3-8B --server vllm`

    Args:
      directory: an adapter.
      base: the directory of the model in safetensors files; of a checkpoint, the parameters: the directory of an Orbax
        checkpoint, or package.module:function.
      server: the program that is to read the adapter.
      component: for diffusers, the part of the pipeline that the adapter is of, such as unet.
    """
    data = verified(directory, base, server, component)
    return Report(data, lambda: _shown(data), code=0 if data["valid"] else 1)


def verified(directory: Path, base: str | None, server: str | None, component: str | None) -> dict[str, Any]:
    """Returns the problems of an adapter; None for what was not verified."""
    problems: dict[str, list[str] | None] = {"files": [], "base": None, "server": None}
    if server != "diffusers":
        check_options(f"--server {server}" if server else "verify without --server", {"component": component}, ())
    kind = format_of(directory)
    data: dict[str, Any] = {"path": str(directory), "format": kind, "valid": False, "problems": problems, "notes": []}
    if server is not None and kind == "orbax":
        raise UsageError("Expected PEFT's format for --server; got a checkpoint. Convert it first: lora-jax convert.")
    if base is not None and kind == "peft":
        stored_tensors(Path(base))  # raises if it is not a model
    try:
        found = open_adapter(directory, Path(base) if base and kind == "peft" else None)
    except CheckpointError as error:
        if kind == "safetensors":
            raise
        problems["files"] = [advice(str(error))]
        return data
    if base is not None:
        problems["base"] = _of_base(found, base)
    if server is not None:
        problems["server"] = _of_server(found, server, component)
    if problems["server"] and server not in _OTHER_FILES:
        data["notes"].append(f"{server} can serve the merged model: lora-jax merge")
    if zero := [name for name, layer in found.layers.items() if layer.norm() == 0]:
        data["notes"].append(f"{counted(len(zero), 'layer')} with an update of zero: {few(zero)}")
    ranks = [part.a.shape[-1] for part in found.adapter.values() if has_factors(part)]
    if server == "vllm" and max(ranks, default=0) > _VLLM_RANKS[0]:
        least = next((rank for rank in _VLLM_RANKS if rank >= max(ranks)), None)
        data["notes"].append(f"vLLM needs --max-lora-rank {least}" if least else "vLLM has no --max-lora-rank so large")
    if server == "llama.cpp" and not found.base:
        data["notes"].append("llama.cpp needs --base to convert the files, as the configuration names none")
    return data | {"valid": not any(problems.values())}


def _of_base(found: Source, base: str) -> list[str]:
    """Returns which modules a base lacks, or has in another shape."""
    if found.format == "orbax":
        from ..checkpoint import manifest
        from ..checkpoint._manifest import check_base

        try:
            check_base(manifest(found.path), params(base), allow_base_mismatch=False, where=found.path)
        except CheckpointError as error:
            return [str(error)]
        return []
    adapted = {path: part for path, part in found.adapter.items() if part.variant.needs_axes}
    tensors = named_for({path.partition("/")[0] for path in adapted}, stored_tensors(Path(base)))
    problems = []
    for path in found.adapter:
        shape, stored = tuple(found.params[path].shape), tensors.get(path.replace("/", "."))
        if stored is None and path in adapted:
            problems.append(f"{found.name(path)!r}: the base has no such module")
        elif stored is not None and stored.shape != shape:
            problems.append(
                f"{found.name(path)!r}: the base has the shape {stored.shape}, and the adapter is for {shape}"
            )
    return problems


def _of_server(found: Source, name: str, component: str | None) -> list[str]:
    """Returns what a server refuses, or reads with another scale."""
    server, rows = server_of(name, component), compiled(found.mapping)
    problems = [f"{server.name} reads other files than PEFT's; lora-jax convert writes them"] * (name in _OTHER_FILES)
    problems += _of_configuration(found.stated, name)
    for path, part in found.adapter.items():
        row = find(path, rows)
        assert row is not None
        places = sites(path, tuple(found.params[path].shape), row)
        assert not isinstance(places, str)
        if (problem := server.refusal(part, places, component)) is not None:
            problems.append(f"{found.name(path)!r}: {problem}")
        elif name == "llama.cpp" and isinstance(part.variant, LowRank):
            read = found.stated.get("lora_alpha", 0) / part.variant.rank or 1.0  # α of 0 stands for the scale 1
            if not math.isclose(read, part.variant.scale, rel_tol=1e-6):
                text = f"llama.cpp reads the scale {read:g}, and PEFT {part.variant.scale:g}"
                problems.append(
                    f"{found.name(path)!r}: {text}; lora-jax convert --to llama.cpp multiplies it into the factors"
                )
    return problems


def _of_configuration(stated: Mapping[str, Any], name: str) -> list[str]:
    """Returns what a server refuses in PEFT's configuration, whatever the tensors are."""
    needed = {"vllm": ("r", "lora_alpha", "target_modules"), "llama.cpp": ("lora_alpha",)}.get(name, ())
    problems = [f"{key} is missing in the configuration" for key in needed if stated.get(key) is None]
    for key, accepted in _VLLM.items() if name == "vllm" else ():
        if stated.get(key) not in accepted:
            problems.append(f"{key} is {stated[key]!r}, which vLLM refuses")
    return problems


def _shown(data: Mapping[str, Any]) -> Iterable[RenderableType]:
    parts = [name for name, found in data["problems"].items() if found is not None]
    count = sum(len(found or ()) for found in data["problems"].values())
    yield f"{data['path']}: {counted(count, 'problem') if count else 'valid'} ({', '.join(parts)} verified)"
    for name, found in data["problems"].items():
        for problem in found or ():
            yield Text(printable(f"{name}: {problem}"), style="red")
    for text in data["notes"]:
        yield f"note: {text}"
