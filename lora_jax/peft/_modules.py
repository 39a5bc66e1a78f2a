"""Collects the torch modules of an adapter: their tensors, the configuration, and what cannot be written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from .._core.adapter import Adapter
from .._core.base import dense
from .._core.values import is_concrete, is_finite, on_host
from .._core.variant import LowRank
from .._errors import AdapterError, sections
from .._variants import ALoRA, DoRA, LoRABias, Rows, RSLoRA, VeRA
from ._config import Scale, ranks_to_config
from ._layout import Values, scaled
from ._module import Module, module_outputs, module_value, outputs_in_module
from ._names import PREFIX, suffix, to_torch
from ._parameters import stored_as
from ._refusal import refusal
from ._sites import Site
from ._vera import matrices, relative, to_config

# PEFT ties adapters of layers with these names, and warns if it is asked to and there are none.
_TIED_BY_PEFT = {"embed_tokens", "lm_head"}


class Exported:
    """The torch modules of an adapter, and what cannot be written."""

    def __init__(self) -> None:
        self.modules: dict[str, Module] = {}
        self.heads: dict[str, str] = {}
        self.saved: set[str] = set()
        self.shared: dict[str, Values] = {}  # tensors of no module, by their names in the file
        self.unmatched: list[str] = []
        self.problems: list[str] = []

    def add(self, path: str, part: Adapter, places: list[Site], leaf: Any) -> None:
        """Adds one leaf of the adapter."""
        variant = part.variant
        if (problem := refusal(part, places[0].row)) is not None:
            self.problems.append(f"{path!r}: {problem}")
            return
        arrays = {name: on_host(array) for name, array in part.arrays.items()}
        for site in places:
            module = self._module(site)
            if isinstance(variant, LowRank):
                module.path = path
                if site.row.head is not None:
                    self.heads[site.module] = site.row.head
                a = site.layout.to_matrix("a", arrays["a"])[site.index]
                module.factors.append((site, variant, a, module_outputs(site, "b", arrays["b"])))
                if "magnitude" in arrays:
                    self._put(site, "magnitude", module_outputs(site, "vector", arrays["magnitude"]))
            elif isinstance(variant, VeRA):
                module.path, module.vera = path, variant
                self._put(site, "lambda_b", module_outputs(site, "vector", arrays["lambda_b"]))
                module.tensors["lambda_d"] = arrays["lambda_d"][site.index]
            elif isinstance(variant, LoRABias):
                module.biases.append((site, variant.scale, module_outputs(site, "vector", arrays["bias"])))
            elif isinstance(variant, Rows):
                module.rows = variant.ids
                if (values := self._base(site, leaf)) is not None:
                    rows = values[list(variant.ids)].astype(np.float32) + module_outputs(site, "b", arrays["rows"])
                    self._put(site, "rows", rows)
            else:
                value = module_value(site, arrays["value"])
                self.saved.add(site.module)
                self._put(site, f"saved.{site.row.parameter}", value)
                if site.row.head is not None:
                    self.heads[site.module] = site.row.head
                    self._save_head(site, value)

    def complete(self, path: str, places: list[Site], leaf: Any) -> None:
        """Adds the base's values of a parameter, if its module is saved because of another parameter."""
        for site in places:
            name = f"saved.{site.row.parameter}"
            if site.module in self.saved and not self.modules[site.module].has(site, name):
                if (values := self._base(site, leaf)) is not None:
                    self._put(site, name, values)
            if site.row.head in self.saved and (values := self._base(site, leaf)) is not None:
                self._save_head(site, values)

    def config(self) -> dict[str, Any]:
        """Joins what modules fuse and returns the configuration; what it cannot state becomes a problem."""
        for name, module in self.modules.items():
            self._join(name, module)
        if vera := {name: module for name, module in self.modules.items() if module.vera is not None}:
            return self._vera(vera)
        low = {name: module for name, module in self.modules.items() if module.variant is not None}
        variants: dict[str, Any] = {name: module.variant for name, module in low.items()}
        stabilized = bool(variants) and all(map(_is_stabilized, variants.values()))
        for what, kind in (("DoRA", DoRA), ("ALoRA", ALoRA)):
            self._same(what, {low[name].path: isinstance(variant, kind) for name, variant in variants.items()})
        self._same("dropout", {low[name].path: variant.dropout for name, variant in variants.items()})
        invocations = {low[name].path: getattr(variant, "invocation", None) for name, variant in variants.items()}
        self._same("invocation", invocations)
        scales = {}
        for name, variant in variants.items():
            alpha = variant.alpha if _is_stabilized(variant) == stabilized else variant.scale * variant.rank
            scales[name] = Scale(variant.rank, alpha)
            if name in self.heads:
                scales[self.heads[name]] = scales[name]
        biased = self._biases(low)
        parameters = self._parameters(low)
        saved = {name for name in self.saved if name not in low}
        tied = {name.split(".")[-1] for pair in self.heads.items() for name in pair}
        rows = {name: list(module.rows) for name, module in self.modules.items() if module.rows is not None}
        first: Any = next(iter(variants.values()), None)
        return ranks_to_config(scales, parameters) | {
            "peft_type": "LORA",
            **_targets(scales, parameters),
            "lora_dropout": getattr(first, "dropout", 0.0),
            "use_rslora": stabilized,
            "use_dora": isinstance(first, DoRA),
            "alora_invocation_tokens": list(first.invocation) if isinstance(first, ALoRA) else None,
            "fan_in_fan_out": any(module.layout.row.conv1d for module in low.values()),
            "lora_bias": biased,
            "bias": "lora_only" if self.saved & set(low) else "none",
            "modules_to_save": sorted(saved) or None,
            "trainable_token_indices": rows or None,
            "ensure_weight_tying": bool(tied & _TIED_BY_PEFT),
            "init_lora_weights": True,
            "inference_mode": True,
        }

    def tensors(self) -> dict[str, Values]:
        """Returns the tensors by their names in the file."""
        found = dict(self.shared)
        for name, module in self.modules.items():
            for ours, matrix in module.tensors.items():
                place = f"{name}.base_layer" if ours.startswith("saved.") and module.variant is not None else name
                if module.layout.row.is_parameter:
                    place = stored_as(name, module.layout.row, self.modules.__contains__)
                tensor = to_torch(ours, matrix, module.layout)
                found[f"{PREFIX}{place}{suffix(module.layout.row.kind, ours)}"] = tensor
            if name in self.heads:
                head = f"{PREFIX}{self.heads[name]}"
                for ours, tied in (("a", "b"), ("b", "a")):
                    if tied in module.tensors:
                        found[head + suffix("linear", ours)] = module.tensors[tied]
        return found

    def refuse(self, reader: str, advice: str) -> None:
        """Raises if anything cannot be written for a reader."""
        problems = list(dict.fromkeys(self.problems))  # a stack repeats those of its layers
        text = sections(("path", " that no row of the mapping matches", self.unmatched), ("problem", "", problems))
        if text:
            raise AdapterError(
                f"Expected an adapter that {reader} and the mapping can express; got:\n{text}\n"
                f"  Add rows to the mapping, or change the leaves{advice}; nothing was written."
            )

    def _vera(self, vera: Mapping[str, Module]) -> dict[str, Any]:
        """Returns the configuration of VeRA, and makes the matrices of the largest modules."""
        (first, variant), *_ = [(module.path, module.vera) for module in vera.values()]
        assert variant is not None
        self._same("VeRA", {module.path: module.vera for module in vera.values()})
        for name, module in self.modules.items():
            if module.variant is not None or module.biases or module.rows is not None:
                self.problems.append(
                    f"{name!r} has factors, LoRABias or Rows, and {first!r} has VeRA; PEFT has one or the other"
                )
        d_in, d_out = (max(getattr(module.layout, name) for module in vera.values()) for name in ("d_in", "d_out"))
        self.shared = matrices(variant, d_in, d_out)
        for module in vera.values():
            module.tensors["lambda_d"] = module.tensors["lambda_d"] * np.float32(relative(module.layout.d_in, d_in))
        conv1d = any(module.layout.row.conv1d for module in vera.values())
        return to_config(variant, vera, conv1d) | {"modules_to_save": sorted(self.saved) or None}

    def _join(self, name: str, module: Module) -> None:
        """Makes the factors of a module from those of the leaves that it fuses: blocks, unless they share `a`."""
        for site, variant, a, b in module.factors:
            if module.variant is None:
                shared = all(np.array_equal(a, other) for _, _, other, _ in module.factors)
                ranks = [a.shape[-1]] if shared else [other.shape[-1] for _, _, other, _ in module.factors]
                alike = [one for _, one, _, _ in module.factors if _setting(one) == _setting(variant)]
                module.variant, at = max(alike, key=lambda one: abs(one.scale)).at_rank(sum(ranks)), 0
                self._put(site, "a", a if shared else np.concatenate([one for _, _, one, _ in module.factors], axis=-1))
            elif _setting(variant) != _setting(module.variant):
                self.problems.append(f"{site.path!r}: {name!r} fuses {variant} with {module.variant}")
            relative = variant.scale / module.variant.scale if module.variant.scale else 1.0
            rows = np.zeros((*b.shape[:-2], sum(ranks), b.shape[-1]), b.dtype)
            rows[..., at : at + b.shape[-2], :] = scaled(b, relative)
            at += 0 if shared else b.shape[-2]
            self._put(site, "b", rows)
        for site, scale, bias in module.biases:
            own = module.variant.scale if module.variant is not None else scale
            self._put(site, "bias", scaled(bias, scale / own if own else 1.0))
        for tensor, filled in module.filled.items():
            width = module.tensors[tensor].shape[-1]
            known = sum(map(len, filled))
            if known < width and tensor.startswith(("magnitude", "saved")):
                what = tensor.removeprefix("saved.")
                self.problems.append(f"{name!r} fuses {width} outputs, and the leaves have {known} of its {what}")

    def _module(self, site: Site) -> Module:
        module = self.modules.setdefault(site.module, Module(site.layout))
        if module.layout.row.kind == "vector":  # the kernel's layout also has the shapes of the factors
            module.layout = site.layout
        return module

    def _put(self, site: Site, name: str, matrix: Values) -> None:
        module, tensors = self._module(site), self._module(site).tensors
        if module.has(site, name):
            self.problems.append(f"{site.path!r}: another leaf is also stored as {site.module}{suffix('linear', name)}")
        elif not is_finite(np.asarray(matrix, np.float32)):
            self.problems.append(f"{site.path!r}: its {name.removeprefix('saved.')} has values that are not finite")
        if site.part.of is None or name == "a":
            tensors[name] = matrix
        else:
            whole = tensors.get(name, np.zeros((*matrix.shape[:-1], site.part.of[1]), matrix.dtype))
            tensors[name] = whole.astype(np.promote_types(whole.dtype, matrix.dtype))  # leaves may have other dtypes
            tensors[name][..., outputs_in_module(site).start : outputs_in_module(site).stop] = matrix
        if name != "a":
            module.filled.setdefault(name, []).append(outputs_in_module(site))

    def _save_head(self, site: Site, table: Values) -> None:
        """Saves a head with the table that it is tied to."""
        assert site.row.head is not None
        self.saved.add(site.row.head)
        module = self.modules.setdefault(site.row.head, Module(site.layout))
        module.layout, module.tensors["saved.weight"] = site.layout, table

    def _base(self, site: Site, leaf: Any) -> Values | None:
        """Returns the base's values of a parameter."""
        if isinstance(leaf, jax.ShapeDtypeStruct) or not all(map(is_concrete, jax.tree.leaves(leaf))):
            self.problems.append(f"{site.path!r}: its values in `base` are needed; got a shape")
            return None
        return module_value(site, on_host(dense(leaf)))

    def _biases(self, low: Mapping[str, Module]) -> bool:
        """Whether the adapter has biases of `b`; completes them, because PEFT has them for all modules or none."""
        biased = {name: module for name, module in self.modules.items() if module.biases}
        for name, module in biased.items():
            variant = low[name].variant if name in low else None
            if variant is None:
                self.problems.append(f"{name!r} has LoRABias, and its kernel has no factors")
            known = [one.scale for _, one, _, _ in module.factors]
            for scale in [scale for _, scale, _ in module.biases if variant is not None]:
                if not any(math.isclose(scale, one, rel_tol=1e-6) for one in known):
                    self.problems.append(f"{name!r} has LoRABias(scale={scale}), and its kernel {variant}")
        for module in low.values() if biased else ():
            if isinstance(module.variant, DoRA) or module.layout.row.kind == "embedding":
                what = "an embedding" if module.layout.row.kind == "embedding" else "DoRA"
                self.problems.append(
                    f"{module.path!r}: PEFT has no lora_bias for {what}, and other leaves have LoRABias"
                )
            b = module.tensors["b"]
            module.tensors.setdefault("bias", np.zeros(b.shape[1:], b.dtype))
        return bool(biased)

    def _parameters(self, low: Mapping[str, Module]) -> list[str]:
        """Returns the parameters without a module; notes what PEFT does not have alongside them."""
        found = sorted(name for name, module in low.items() if module.layout.row.is_parameter)
        for module in low.values() if found else ():
            variant, biased = module.variant, bool(module.biases)
            has = {"dropout": variant.dropout if variant else 0, "Conv1D": module.layout.row.conv1d, "LoRABias": biased}
            for what in filter(has.get, has):
                self.problems.append(
                    f"{module.path!r}: PEFT has no {what} alongside a parameter without a module, {found[0]!r}"
                )
        return found

    def _same(self, what: str, values: Mapping[str, Any]) -> None:
        if len(set(values.values())) > 1:
            first, *rest = values.items()
            path, value = next(item for item in rest if item[1] != first[1])
            self.problems.append(
                f"{path!r}: PEFT has one setting of {what} for all modules; here it is {value}, and {first[1]} at "
                f"{first[0]!r}"
            )


def _targets(names: Iterable[str], parameters: list[str]) -> dict[str, Any]:
    """Returns the entries of the modules with factors, and of the parameters without a module."""
    modules = sorted(set(names) - set(parameters))
    if parameters:
        return {"target_modules": modules, "target_parameters": parameters}
    return {"target_modules": modules or "dummy-target-modules"}  # PEFT's name for none


def _setting(variant: LowRank) -> tuple[Any, ...]:
    """Returns what PEFT has one setting of for a module, besides the rank and the scale."""
    return type(variant), variant.dropout, getattr(variant, "invocation", None)


def _is_stabilized(variant: LowRank) -> bool:
    return isinstance(variant, RSLoRA) or getattr(variant, "rank_stabilized", False)
