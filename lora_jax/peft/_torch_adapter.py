"""Reads an adapter in PEFT's format without a mapping: its leaves are named by the torch modules."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from .._core.adapter import Adapter
from .._errors import CheckpointError, counted, listed
from . import _adalora as adalora
from ._config import Config, Prepared, prepared, scale_of
from ._files import read_config, read_tensors
from ._layout import Values
from ._load import adapter_of, check_config
from ._row import Part, Row
from ._rows import embedding, linear, vector
from ._safetensors import FLOATS, Stored
from ._sites import compiled, without_own_heads
from ._stored import named_for, stored_tensors
from ._tensors import Tensors


class TorchAdapter(NamedTuple):
    """An adapter whose leaves are named by torch modules, such as `model.layers.0.mlp.up_proj/weight`.

    Attributes:
      adapter: `{path: Adapter}`. Kernels have torch's axes: `"oi"` for `Linear`, `"io"` for `Embedding` and `Conv1D`,
        `"oii…"` for convolutions.
      mapping: one row for each path.
      params: the shape of each leaf, or its value where the file or the base has it and it is needed.
    """

    adapter: dict[str, Adapter]
    mapping: dict[str, Row]
    params: dict[str, Any]


def read(directory: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None) -> TorchAdapter:
    """Reads an adapter in PEFT's format, of any model, without a mapping.

    The result is an adapter as any other: `compress`, `many.combine` and `analysis` take it, and `export` writes it
    with `mapping` and `base=params`. What `load` would do with the same tensors is done here. If a head has the factors
    of an embedding, transposed, the two are tied, and the head has no leaf of its own.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"up": {"kernel": jnp.ones((4, 3))}}
    >>> adapter = lj.init(jax.random.key(0), params, {"**/kernel": lj.LoRA(rank=2, alpha=4)})
    >>> with tempfile.TemporaryDirectory() as path:
    ...     lj.peft.export(path, adapter, lj.peft.layer("up", "model.fc1"), base=params)
    ...     found = read(path)
    >>> found.adapter
    {'model.fc1/weight': Adapter(LoRA(rank=2, alpha=4), 'oi', a=float32[4, 2], b=float32[2, 3])}
    >>> smaller, _ = lj.compress(found.adapter, rank=1)
    >>> with tempfile.TemporaryDirectory() as path:
    ...     lj.peft.export(path, smaller, found.mapping, base=found.params)

    Args:
      directory: has `adapter_model.safetensors` and `adapter_config.json`.
      base: the directory of the model, with safetensors files. Needed for trainable tokens, which are stored here as
        differences from the base, and for VeRA, whose tensors do not show the inputs of each module.

    Returns:
      The adapter, with the mapping and the shapes that it belongs to.

    Raises:
      CheckpointError: where `load` raises it; if the tensors do not determine the shape of a module; if `base` is
        needed and missing, or lacks a module. One error lists all.
    """
    directory = Path(directory)
    return read_with_base(directory, None if base is None else stored_tensors(Path(base)))[0]


def read_with_base(
    directory: Path, base: Mapping[str, Stored] | None
) -> tuple[TorchAdapter, Mapping[str, Stored] | None]:
    """Reads an adapter as `read`; also returns the tensors of its base, under the names that its modules have."""
    config = read_config(directory)
    check_config(config, directory)
    arrays = read_tensors(directory).tensors
    modules = _Modules(config, arrays, base)
    if modules.problems:
        raise CheckpointError(
            f"Expected tensors of torch modules in {directory}; got "
            f"{counted(len(modules.problems), 'problem')}:\n{listed(modules.problems)}\n"
            "  Pass `base=`, the directory of the model, if it is needed; or load the adapter with a mapping."
        )
    rows = without_own_heads(compiled(modules.mapping), modules.params)
    adapter = adapter_of(config, arrays, rows, modules.params, directory)
    return TorchAdapter(adapter, modules.mapping, modules.params), modules.base


class _Modules:
    """The rows and shapes of the modules of a file.

    Attributes:
      mapping: a row for each path.
      params: the shape or the value of each path.
      base: the tensors of the base, under the names that the modules of the file have; None without a base.
      problems: what the tensors do not determine.
    """

    def __init__(self, config: Config, arrays: Mapping[str, Values], base: Mapping[str, Stored] | None) -> None:
        self.mapping: dict[str, Row] = {}
        self.params: dict[str, Any] = {}
        self.problems: list[str] = []
        self._tied_by_peft = bool(config.get("ensure_weight_tying"))
        self._conv1d = bool(config.get("fan_in_fan_out"))
        arrays = adalora.as_factors(arrays) if config.get("peft_type") == "ADALORA" else arrays
        if config.get("target_parameters"):
            self.problems.append("target_parameters is set, whose tensors do not show the experts: load with a mapping")
        by_module = Tensors(arrays).modules
        modules = {
            name: {ours: arrays[stored] for ours, stored in sorted(by_module[name].items())}
            for name in sorted(by_module, key=_by_numbers)  # a file has them in no order
        }
        changed = [module for module, some in modules.items() if any("." not in ours for ours in some)]
        # Of those that are stored in full, some may be new, such as a classifier.
        self.base = None if base is None else named_for(changed or list(modules), base)
        for module, tensors in modules.items():
            if set("*{}/") & set(module).union(*tensors):
                self.problems.append(f"{module!r} is not the name of a torch module, or has a parameter without one")
            else:
                self._module(module, tensors, by_module[module])
        if not config.get("use_dora"):
            self._tie(modules, prepared(config))

    def _module(self, module: str, tensors: Mapping[str, Values], names: Mapping[str, str]) -> None:
        if "a" in tensors or "b" in tensors:
            self._factors(module, tensors, is_table=names.get("a", "").endswith(".lora_embedding_A"))
        elif "lambda_b" in tensors or "lambda_d" in tensors:
            if (entry := self._needed(module, "VeRA")) is not None:
                self._kernel(module, entry.shape[::-1] if self._conv1d else entry.shape, tensors)
        elif "rows" in tensors:
            if (entry := self._needed(module, "trainable tokens")) is not None:
                self._add(module, "weight", embedding(module), entry.read())
        if "bias" in tensors:
            self._add(module, "bias", vector(module), jax.ShapeDtypeStruct(tensors["bias"].shape, np.float32))
        for ours, tensor in tensors.items():
            kind, _, parameter = ours.partition(".")
            if kind == "saved" or (kind == "base" and parameter != "weight"):
                self._saved(module, parameter, tensor)

    def _factors(self, module: str, tensors: Mapping[str, Values], *, is_table: bool) -> None:
        shapes = [tensors[name].shape for name in "ab" if name in tensors]
        if len(shapes) < 2 or len(shapes[0]) != len(shapes[1]) or len(shapes[0]) < 2:
            self.problems.append(f"{module!r} has factors of shapes {', '.join(map(str, shapes))}; expected A and B")
            return
        (_, d_in, *spatial), (d_out, *_) = shapes
        if is_table:
            self._add(module, "weight", embedding(module), _value((d_in, d_out), tensors))
            return
        self._kernel(module, (d_out, d_in, *spatial), tensors)

    def _kernel(self, module: str, shape: tuple[int, ...], tensors: Mapping[str, Values]) -> None:
        """Adds a kernel, whose shape as of `Linear` is `(out, in, spatial…)`."""
        entry = None if self.base is None else self.base.get(f"{module}.weight")
        if self._conv1d and len(shape) == 2 and (entry is None or entry.shape == shape[::-1]):
            self._add(module, "weight", linear(module, axes="io", conv1d=True), _value(shape[::-1], tensors))
        elif len(shape) == 2:
            self._add(module, "weight", linear(module, axes="oi"), _value(shape, tensors))
        else:
            self._add(module, "weight", _conv(module, len(shape)), _value(shape, tensors))

    def _saved(self, module: str, parameter: str, tensor: Values) -> None:
        """Adds a parameter that is stored in full."""
        if tensor.ndim == 1:
            row = vector(module, parameter=parameter)
        elif parameter == "weight" and tensor.ndim == 2:
            row = linear(module, axes="oi")
        elif parameter == "weight" and tensor.ndim > 2:
            row = _conv(module, tensor.ndim)
        else:
            row = vector(module, parameter=parameter, keep_shape=True)
        self._add(module, parameter, row, jax.ShapeDtypeStruct(tensor.shape, tensor.dtype))

    def _add(self, module: str, parameter: str, row: Row, value: Any) -> None:
        self.mapping[f"{module}/{parameter}"] = row
        self.params[f"{module}/{parameter}"] = value

    def _needed(self, module: str, what: str) -> Stored | None:
        """Returns the base's weight of a module; None after noting a problem."""
        entry = None if self.base is None else self.base.get(f"{module}.weight")
        if self.base is None:
            self.problems.append(f"{module!r} has {what}, which `base` is needed for")
        elif entry is None or len(entry.shape) != 2 or entry.dtype not in FLOATS:
            got = "no weight" if entry is None else f"a weight {entry.shape} of dtype {entry.dtype}"
            self.problems.append(f"{module!r} has {what}, and `base` has {got}")
        else:
            return entry
        return None

    def _tie(self, modules: Mapping[str, Mapping[str, Values]], config: Prepared) -> None:
        """Makes one leaf of an embedding and the head that has its factors, transposed."""
        for module, tensors in modules.items():
            row = self.mapping.get(f"{module}/weight")
            if row is None or row.kind != "embedding" or "a" not in tensors:
                continue
            heads = [
                head
                for head, some in modules.items()
                if head != module
                and _is_transposed(tensors, some)
                and scale_of(config, head) == scale_of(config, module)
            ]
            if self._tied_by_peft and module.endswith("embed_tokens") and "a" not in modules.get("lm_head", {}):
                heads = ["lm_head"]  # PEFT's name, which need not be in the file
            for head in heads[:1]:
                self.mapping[f"{module}/weight"] = embedding(module, head=head)
                self.mapping.pop(f"{head}/weight", None)
                self.params.pop(f"{head}/weight", None)


def _is_transposed(table: Mapping[str, Values], other: Mapping[str, Values]) -> bool:
    """Whether a module has the factors of a table, transposed, and no others."""
    pairs = [(table.get(name), other.get(tied)) for name, tied in ("ab", "ba")]
    return "bias" not in other and all(
        one is not None and two is not None and one.shape == two.shape[::-1] and np.array_equal(one, two.T)
        for one, two in pairs
    )


def _by_numbers(module: str) -> list[Any]:
    """Returns a key that sorts layer 2 before layer 10."""
    return [(len(text), text) if at % 2 else text for at, text in enumerate(re.split(r"(\d+)", module))]


def _conv(module: str, ndim: int) -> Row:
    """Returns the row of a kernel `(out, in, spatial…)`; the library's order of inputs is spatial, then channels."""
    inputs = (*range(1, ndim - 1), 0)
    return Row(kind="conv", parts=(Part(module),), axes="o" + "i" * (ndim - 1), inputs=inputs)


def _value(shape: tuple[int, ...], tensors: Mapping[str, Values]) -> Any:
    """Returns the copy of the base's weight that the file has, or the shape."""
    copy = tensors.get("base.weight")
    return copy if copy is not None else jax.ShapeDtypeStruct(shape, np.float32)
