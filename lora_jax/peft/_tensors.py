"""The tensors of a file by torch module, which of them leaves have taken, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ._layout import Values, outputs_from_torch, scaled
from ._names import expected_shape, from_torch, parse, suffix
from ._parameters import stored_as
from ._sites import Site


class Tensors:
    """The tensors of a file.

    Attributes:
      arrays: by their names in the file.
      modules: for each torch module, the names in the file by our names.
      taken: the names in the file of those that leaves have taken.
      problems: what does not fit.
    """

    def __init__(self, arrays: Mapping[str, Values]) -> None:
        self.arrays = dict(arrays)
        self.modules: dict[str, dict[str, str]] = {}
        self.taken: set[str] = set()
        self.problems: list[str] = []
        self._dtypes: dict[tuple[str, str], np.dtype[Any]] = {}
        for name in arrays:
            if ".modules_to_save." in name or ".original_module." in name:
                self.taken.add(name)  # PEFT saves them next to others that they repeat, and reads none
            elif (parsed := parse(name)) is not None:
                module, ours = parsed
                self.modules.setdefault(module, {})[ours] = name

    def find_parameters(self, places: list[Site], is_adapted: Callable[[str], bool]) -> None:
        """Finds the tensors of parameters without a module under the modules that PEFT stores them with.

        Args:
          places: of one leaf.
          is_adapted: whether a parameter, by the name of its site, has factors.
        """
        for site in places:
            if site.row.is_parameter and site.module not in self.modules and is_adapted(site.module):
                names = self.modules.pop(stored_as(site.module, site.row, is_adapted), {})
                swapped = {"a": "b", "b": "a"} if site.row.kind.startswith("swapped") else {}
                if names:
                    self.modules[site.module] = {swapped.get(name, name): stored for name, stored in names.items()}

    def lacking(self, places: list[Site]) -> list[Site]:
        """Returns the modules that the file has no tensors of."""
        return [site for site in places if site.module not in self.modules]

    def left(self) -> list[str]:
        """Returns the tensors that no leaf has taken. A bias of zeros changes nothing, and needs no leaf."""
        rest = sorted(name for name in self.arrays if name not in self.taken)
        zero = [name for name in rest if name.endswith(suffix("linear", "bias")) and not self.arrays[name].any()]
        return [f"{name!r} {self.arrays[name].shape}" for name in rest if name not in zero]

    def has(self, site: Site, name: str) -> bool:
        return name in self.modules.get(site.module, ())

    def take(self, site: Site, name: str, rank: int) -> Values | None:
        """Returns a tensor as a matrix, with the leaf's outputs; None, after noting a problem, if it does not fit."""
        stored = self.modules.get(site.module, {}).get(name)
        if stored is None:
            self.problems.append(f"{site.module!r} has no tensor {suffix(site.row.kind, name)}")
            return None
        self.taken.add(stored)
        tensor = self.arrays[stored]
        plain = name.replace("base.", "saved.")
        d_out = site.last - site.first if site.part.of is None else site.part.of[1]
        expected = expected_shape(plain, site.layout, d_out, rank)
        if not stored.endswith(suffix(site.row.kind, plain)):
            self.problems.append(
                f"{stored!r} is not a tensor of a module of kind {site.row.kind!r}, as {site.path!r} is"
            )
            return None
        if tensor.shape != expected:
            of_rank = f" and rank {rank}" if name in ("a", "b", "e") else ""
            self.problems.append(
                f"{stored!r} has shape {tensor.shape}; expected {expected}, for {site.path!r}{of_rank}"
            )
            return None
        if (dtype := self._dtypes.setdefault((site.path, name), tensor.dtype)) != tensor.dtype:
            self.problems.append(f"{stored!r} has dtype {tensor.dtype}, and another tensor of {site.path!r} {dtype}")
            return None
        matrix = from_torch(plain, tensor, site.layout)
        return matrix if name in ("a", "e", "lambda_d") else outputs_from_torch(site.of_module(matrix), site.part)

    def outputs(
        self, places: list[Site], name: str, start: Values | None, relative: Mapping[Site, float] | None = None
    ) -> Values:
        """Returns an array whose last axis is the outputs, from all modules of a leaf; `start` where there is none."""
        layout = places[0].layout
        result = None if start is None else np.array(start)
        complete = all(self.has(site, name) for site in places)
        for site in places:
            if not self.has(site, name):
                if start is None:
                    self.problems.append(f"{site.module!r} has no tensor {suffix('linear', name)}")
                continue
            if (tensor := self.take(site, name, 0)) is None:
                continue
            if relative is not None:
                tensor = scaled(tensor, relative[site])
            if result is None:
                result = np.zeros((*layout.batch, layout.d_out), tensor.dtype)
            result = result.astype(tensor.dtype if complete else _wider(result.dtype, tensor.dtype))
            result[(*site.index, ..., site.outputs)] = tensor
        return np.zeros((*layout.batch, layout.d_out), np.float32) if result is None else result


def _wider(one: np.dtype[Any], other: np.dtype[Any]) -> np.dtype[Any]:
    """Returns a dtype that has the values of two: of bfloat16 and float16, neither has those of the other."""
    if one.itemsize == other.itemsize and one != other:
        return np.dtype(np.float32)
    return one if one.itemsize > other.itemsize else other
