"""Reads an adapter in PEFT's format."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._core.adapter import Adapter
from .._core.paths import flatten
from .._errors import CheckpointError, SpecError, listed, sections
from . import _adalora as adalora
from ._config import Config, Prepared, is_exact, is_target, prepared, problems
from ._files import read_config, read_tensors
from ._layout import Values
from ._read import Reader
from ._sites import MappingOfRows, Rows, Site, compiled, find, sites, without_own_heads
from ._tensors import Tensors

# No adapter has more bytes than this and 32 for each parameter, so that a file of any size does not fill the memory.
_SMALL = 2**26


def load(directory: str | os.PathLike[str], mapping: MappingOfRows, params: Any) -> dict[str, Adapter]:
    """Reads an adapter in PEFT's format, such as PEFT's `save_pretrained` or `export` writes.

    Factors become `LoRA`, `RSLoRA`, `DoRA`, `ALoRA` or `AdaLoRA`; `lora_bias`, `LoRABias`; `modules_to_save` and plain
    biases, `Full`; trainable tokens, `Rows`. Layers of a stack, and modules that a kernel fuses, may have different
    ranks and scales, or no factors: the leaf has the largest rank, and differences of scale are multiplied into `b`; of
    DoRA, modules without factors have the magnitudes of the base. Fused modules with different `A` have the sum of
    their ranks. VeRA whose matrices `VeRA` does not generate, and AdaLoRA of fused modules, become `LoRA`.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"embed": {"embedding": jnp.ones((7, 3))}}
    >>> adapter = lj.init(jax.random.key(0), params, {"**/embedding": lj.Rows(ids=[5, 6])})
    >>> mapping = {"embed/embedding": lj.peft.embedding("model.embed_tokens")}
    >>> with tempfile.TemporaryDirectory() as path:
    ...     lj.peft.export(path, adapter, mapping, base=params)
    ...     load(path, mapping, params)
    {'embed/embedding': Adapter(Rows(ids=(5, 6)), 'io', rows=float32[2, 3])}

    Args:
      directory: has `adapter_model.safetensors` and `adapter_config.json`.
      mapping: as in `export`.
      params: the parameters that the adapter is for. Values are read for trainable tokens, for DoRA of some modules of
        a leaf, and to compare parameters that PEFT stores in full.

    Returns:
      `{path: Adapter}`, in the dtypes of the file.

    Raises:
      CheckpointError: if a file is missing, damaged or a pickle; if the configuration states what cannot be read; if a
        tensor fits no leaf, one that the configuration states is missing, or a shape, rank or scale disagrees. One
        error lists all.
      SpecError: if `mapping` is not a mapping to rows.
    """
    leaves = flatten(params)[0]
    rows = without_own_heads(compiled(mapping), leaves)
    directory = Path(directory)
    config = read_config(directory)
    check_config(config, directory)
    most = _SMALL + 32 * sum(math.prod(getattr(leaf, "shape", ())) for leaf in leaves.values())
    return adapter_of(config, read_tensors(directory, most=most).tensors, rows, leaves, directory)


def check_config(config: Config, directory: Path) -> None:
    """Raises `CheckpointError` if a configuration states what cannot be read."""
    if found := problems(config):
        raise _unreadable(directory, found)


def adapter_of(
    stated: Config, arrays: Mapping[str, Values], rows: Rows, leaves: Mapping[str, Any], directory: Path
) -> dict[str, Adapter]:
    """Returns the adapter of the contents of two files; raises as `load`.

    Args:
      stated: the configuration, without problems.
      arrays: the tensors.
      rows: the mapping.
      leaves: the parameters, by path.
      directory: of the files, for errors.
    """
    config = prepared(stated)
    file = Tensors(adalora.as_factors(arrays) if config["peft_type"] == "ADALORA" else arrays)
    try:
        reader = Reader(config, file)
    except SpecError as error:  # from VeRA
        raise _unreadable(directory, [str(error)]) from error
    adapter, unusable = dict[str, Adapter](), list[str]()
    for path, leaf in leaves.items():
        if (row := find(path, rows)) is None:
            continue
        places = sites(path, tuple(leaf.shape), row)
        if isinstance(places, str):
            unusable.append(f"{path!r}: {places}")
            continue
        file.find_parameters(places, functools.partial(is_target, config, parameter=True))
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found
                part = reader.leaf(path, leaf, places)
        except OverflowError as error:
            file.problems.append(f"{path!r}: {error}")
            continue
        except SpecError as error:  # from the variant, which checks what the configuration states
            raise _unreadable(directory, [f"{path!r}: {error}"]) from error
        if part is not None:
            adapter[path] = part
        file.problems += _missing(config, file, places)
    _refuse(file, unusable, directory)
    for path in reader.unchanged():
        del adapter[path]
    return adapter


def _unreadable(directory: Path, found: list[str]) -> CheckpointError:
    found = [line if len(line) < 2_000 else f"{line[:2_000]} …" for line in found]
    return CheckpointError(
        f"Expected a configuration that can be read, in {directory}; got:\n{listed(found)}\n"
        "  Load the adapter with PEFT, and save it as a LoRA adapter without this."
    )


def _missing(config: Prepared, file: Tensors, places: list[Site]) -> list[str]:
    """Returns which modules without tensors the configuration states, other than by the whole name of another one."""
    places = [site for site in file.lacking(places) if site.row.kind != "vector"]
    saved = tuple(name for name in config.get("modules_to_save") or () if name not in file.modules)
    if isinstance(targets := config["target_modules"], frozenset):
        config = Prepared({**config, "target_modules": targets - file.modules.keys()})
    names = [site.module for site in places if not site.row.is_parameter]
    parameters = [site.module for site in places if site.row.is_parameter and is_target(config, site.module, True)]
    found = [f"{name!r} is in modules_to_save, and has no tensor" for name in names if saved and name.endswith(saved)]
    if not found and is_exact(config):
        found = [f"{name!r} is in target_modules, and has no tensors" for name in names if is_target(config, name)]
    return found + [f"{name!r} is in target_parameters, and has no tensors" for name in parameters]


def _refuse(file: Tensors, unusable: list[str], directory: Path) -> None:
    left = file.left()
    text = sections(
        ("tensor", " that no leaf of `params` takes", left),
        ("row", " that do not fit their leaves", unusable if left else []),
        ("problem", "", file.problems),
    )
    if text:
        raise CheckpointError(
            f"Expected every tensor in {directory} to fit a leaf of `params` through the mapping; got:\n{text}\n"
            "  Pass the mapping and the parameters of the model that the adapter was trained for."
        )
