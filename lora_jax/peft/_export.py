"""Writes an adapter in PEFT's format."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from .._core.adapter import Adapter, Adapters
from .._core.attach import check
from .._core.paths import flatten
from .._core.variant import LowRank
from .._errors import AdapterError, CheckpointError
from .._variants import Layers, in_stack
from ._files import write
from ._modules import Exported
from ._servers import server
from ._sites import MappingOfRows, compiled, find, sites, without_own_heads


def export(
    directory: str | os.PathLike[str],
    adapter: Adapters,
    mapping: MappingOfRows,
    *,
    base: Any,
    base_name: str | None = None,
    task_type: str | None = None,
    for_server: str | None = None,
    component: str | None = None,
) -> None:
    """Writes an adapter in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`.

    `LoRA`, `RSLoRA`, `DoRA` and `ALoRA` become factors, `VeRA` its vectors and matrices, `LoRABias` becomes
    `lora_bias`, `Full` becomes `modules_to_save`, and `Rows` becomes trainable tokens. Ranks and scales may differ
    between leaves; of `Layers`, only the modules of its layers have factors. Everything is written, or nothing is: an
    adapter that the format cannot express is an error.

    If there are several processes, each must call it. The first one writes, and the others wait for it; arrays that are
    sharded over them are gathered.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"up": {"kernel": jnp.ones((4, 3))}}
    >>> adapter = lj.init(jax.random.key(0), params, {"**/kernel": lj.LoRA(rank=2, alpha=4)})
    >>> mapping = lj.peft.layer("up", "model.fc1")
    >>> with tempfile.TemporaryDirectory() as path:
    ...     export(path, adapter, mapping, base=params)
    ...     lj.peft.load(path, mapping, params)
    {'up/kernel': Adapter(LoRA(rank=2, alpha=4), 'io', a=float32[4, 2], b=float32[2, 3])}

    Args:
      directory: created if missing. An adapter there is replaced.
      adapter: from `init`, `restore` or training.
      mapping: from patterns for paths to rows, such as `peft.presets.bert()`; the first pattern that matches decides.
      base: the tree that the adapter was initialized for. Values are read for `Full` and `Rows` only, because PEFT
        stores a module with all of its parameters, and rows rather than differences.
      base_name: name or path of the torch model, for readers that look it up.
      task_type: PEFT's name of the task, such as `"CAUSAL_LM"`.
      for_server: the program that is to read the files: `"vllm"`, `"llama.cpp"`, `"diffusers"` or `"mlx-lm"`. What it
        does not read is refused, and a scale that it reads otherwise than PEFT is multiplied into `b`. For
        `"diffusers"` and `"mlx-lm"` the files are in their formats. None for PEFT.
      component: for `"diffusers"`, the component that the adapter is of, such as `"unet"`; None if the names of the
        mapping's modules begin with one.

    Raises:
      AdapterError: if the adapter does not belong to `base`, or if a leaf cannot be written: no row matches its path,
        its axes or outputs disagree with the row, or the format or the server has no place for its variant. One error
        lists all.
      CheckpointError: if the files cannot be written.
      SpecError: if `mapping` is not a mapping to rows, or `for_server` or `component` is not one that is known.
    """
    reader = server(for_server, component)
    leaves = flatten(base)[0]
    rows = without_own_heads(compiled(mapping), leaves)
    check(leaves, adapter, tree="base")
    if not adapter:
        raise AdapterError("Expected an adapter to export, with at least one leaf; got an empty one.")
    exported = Exported()
    for path, whole in adapter.items():
        part, layers = _stacked(whole, leaves[path])
        if (found := find(path, rows)) is None:
            exported.unmatched.append(repr(path))
        elif isinstance(places := sites(path, tuple(leaves[path].shape), found, part.axes), str):
            exported.problems.append(f"{path!r}: {places}")
        else:
            if layers is not None and not found.row.experts_first:  # else, those of zeros are written as well
                places = [site for site in places if not site.index or site.index[0] in layers]
            if (problem := reader.refusal(part, places, component)) is not None:
                exported.problems.append(f"{path!r}: {problem}")
            exported.add(path, part, places, leaves[path])
    for path, leaf in leaves.items() if exported.saved else ():
        if path not in adapter and (found := find(path, rows)) is not None:
            places = sites(path, tuple(leaf.shape), found)
            exported.complete(path, [] if isinstance(places, str) else places, leaf)
    config = exported.config()
    if reader.reads is not None and config["bias"] != "none":
        exported.problems.append(f"{reader.name} does not read Full of the bias of a layer that has factors")
    exported.refuse(reader.name, "" if reader.reads is None else ", or serve the merged model, `peft.export_merged`")
    config |= {"base_model_name_or_path": base_name, "task_type": task_type}
    files = reader.contents(exported.tensors(), config, exported.heads.values(), component)
    _in_first_process(lambda: write(Path(directory), files), directory)


def _stacked(part: Adapter, leaf: Any) -> tuple[Adapter, tuple[int, ...] | None]:
    """Returns factors of some layers as those of the whole stack, and the numbers of these layers; None for all."""
    if isinstance(part.variant, Layers) and isinstance(part.variant.variant, LowRank):
        return in_stack(part, leaf.shape), part.variant.layers
    return part, None


def _in_first_process(write: Callable[[], None], directory: str | os.PathLike[str]) -> None:
    """Writes in the first process, for which the others wait."""
    failure = None
    if jax.process_index() == 0:
        try:
            write()
        except CheckpointError as error:
            failure = error
    count = jax.process_count()
    if count > 1 and multihost_utils.broadcast_one_to_all(np.array(failure is not None)) and failure is None:
        failure = CheckpointError(
            f"The first of {count} processes could not write a PEFT adapter to {directory}; its error says why."
        )
    if failure is not None:
        raise failure
