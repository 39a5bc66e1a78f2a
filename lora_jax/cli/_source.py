"""Opens an adapter, in PEFT's format or as a checkpoint of `lora_jax.save`, and writes one in the same format."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from .. import peft
from .._core.adapter import Adapters
from .._errors import CheckpointError
from ..peft._files import CONFIG, TENSORS, read_config
from ..peft._sites import MappingOfRows
from ._layers import Layer, layers_of
from ._report import UsageError


@dataclasses.dataclass(frozen=True)
class Source:
    """An adapter in a directory.

    Attributes:
      path: the directory.
      format: of the files.
      adapter: of PEFT's format, with the names of the torch modules.
      stated: PEFT's configuration; or the variant of each path.
      mapping: for PEFT's format, to write an adapter with the same paths.
      params: the base as far as it is known: shapes, or what the files have of it.
    """

    path: Path
    format: Literal["peft", "orbax"]
    adapter: Adapters
    stated: Mapping[str, Any]
    mapping: MappingOfRows
    params: Any

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers by name."""
        return layers_of({self.name(path): part for path, part in self.adapter.items()})

    def name(self, path: str) -> str:
        """Returns the name of a leaf as its users know it: of PEFT's format, the torch module or the parameter."""
        module, _, parameter = path.partition("/")
        if self.format == "orbax":
            return path
        return module if self.adapter[path].variant.needs_axes else f"{module}.{parameter}"

    @property
    def base(self) -> str | None:
        """The name of the base; None if it is not stated."""
        return self._text("base_model_name_or_path")

    @property
    def task(self) -> str | None:
        """PEFT's name of the task."""
        return self._text("task_type")

    def _text(self, name: str) -> str | None:
        value = self.stated.get(name) if self.format == "peft" else None
        return value if isinstance(value, str) else None


def format_of(path: Path) -> Literal["peft", "orbax", "safetensors"]:
    """Returns the format of an adapter; files that are neither PEFT's nor a checkpoint are those of other programs."""
    if any((path / name).exists() for name in (CONFIG, TENSORS, "adapter_model.bin")):
        return "peft"
    manifests = [*path.glob("adapter.json"), *path.glob("*/adapter/adapter.json")]
    return "orbax" if manifests else "safetensors"


def open_adapter(directory: Path, base: Path | None = None) -> Source:
    """Opens an adapter.

    Args:
      directory: in PEFT's format, or a checkpoint.
      base: of PEFT's format, the directory of the model.

    Raises:
      CheckpointError: if it is neither, or it is damaged.
    """
    kind = format_of(directory)
    if kind == "peft":
        config = read_config(directory)
        found = peft.read(directory, base=base)
        return Source(directory, kind, found.adapter, config, found.mapping, found.params)
    if kind != "orbax":
        what = "has neither" if directory.is_dir() else "is not a directory"
        others = "Files of kohya and diffusers can be converted: lora-jax convert."
        wrote = "Pass the directory that PEFT, `peft.export` or `lora_jax.save` wrote to."
        raise CheckpointError(
            f"Expected an adapter: {CONFIG} and {TENSORS}, or a checkpoint of lora_jax; {directory} {what}.\n"
            f"  {others if directory.exists() else wrote}"
        )
    from .. import checkpoint  # here, because Orbax is slow to import
    from ..checkpoint._fingerprint import SavedLeaf, saved_weights

    adapter = checkpoint.restore(directory, base=None)
    weights = saved_weights(checkpoint.manifest(directory)["base"], adapter)
    params = {path: SavedLeaf(leaf) for path, leaf in weights.items()}
    return Source(directory, kind, adapter, {path: repr(part.variant) for path, part in adapter.items()}, {}, params)


def write_like(found: Source, directory: Path, adapter: Adapters) -> None:
    """Writes an adapter with paths of an opened one, in the same format."""
    if found.format == "peft":
        names = {"base_name": found.base, "task_type": found.task}
        peft.export(directory, adapter, found.mapping, base=found.params, **names)
    else:
        from .. import checkpoint

        checkpoint.save(directory, adapter, base=found.params)


def check_target(target: Path, sources: Collection[Path], *, force: bool) -> None:
    """Raises if a command must not write to a directory.

    Raises:
      UsageError: if it is a source, or if it exists and is not an empty directory, and `force` is false.
    """
    taken = [*sources, *(source.parent for source in sources if source.is_file())]
    if target.resolve() in {path.resolve() for path in taken}:
        raise UsageError(f"Expected another directory than that of the input, or another file; got {target}.")
    if target.is_file() and not (force and target.suffix == ".safetensors"):
        raise UsageError(f"Expected a new or an empty directory; {target} is a file.")
    if not force and target.is_dir() and (entries := len(list(target.iterdir()))):
        raise UsageError(
            f"Expected a new or an empty directory; {target} has {entries} entries. Pass --force to write."
        )
