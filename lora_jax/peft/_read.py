"""Makes the adapter of each leaf from the tensors of its torch modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.adapter import Adapter
from .._core.base import dense
from .._core.values import on_host
from .._core.variant import LowRank
from .._variants import ALoRA, DoRA, Full, LoRA, LoRABias, Rows, RSLoRA
from ._config import Config, Scale, is_exact, is_target, rows_of, scale_of
from ._joined import joined_factors, own_ranks
from ._layout import Layout, Values, outputs_from_torch
from ._names import PREFIX, expected_shape, from_torch, parse, suffix
from ._sites import Site


class Reader:
    """The tensors of a file by torch module, which of them leaves have taken, and what is wrong."""

    def __init__(self, config: Config, tensors: Mapping[str, Values]) -> None:
        self.config, self.tensors = config, tensors
        self.problems: list[str] = []
        self._modules: dict[str, dict[str, str]] = {}  # names in the file
        self._taken: set[str] = set()
        self._changes: dict[str, tuple[set[str], bool]] = {}
        for name in tensors:
            if (parsed := parse(name)) is not None:
                module, ours = parsed
                self._modules.setdefault(module, {})[ours] = name

    def leaf(self, path: str, leaf: Any, places: list[Site]) -> Adapter | None:
        """Returns the adapter of one leaf; None if the file has nothing for it."""
        row = places[0].row

        def has(name: str) -> bool:
            return any(self._has(site, name) for site in places)

        plain = [f"saved.{row.parameter}"]
        if row.kind == "vector":
            plain.append(f"base.{row.parameter}")
            if row.parameter == "bias" and has("bias"):
                return self._lora_bias(path, places)
        else:
            self._compare_base(leaf, places)
            if has("a") or has("b"):
                return self._low_rank(places)
            if has("rows"):
                return self._rows(leaf, places)
        return next((self._saved(path, leaf, places, name) for name in plain if has(name)), None)

    def lacking(self, places: list[Site]) -> list[Site]:
        """Returns the modules that the file has no tensors of."""
        return [site for site in places if site.module not in self._modules]

    def left(self) -> list[str]:
        """Returns the tensors that no leaf has taken. A bias of zeros changes nothing, and needs no leaf."""
        rest = sorted(name for name in self.tensors if name not in self._taken)
        zero = [name for name in rest if name.endswith(suffix("linear", "bias")) and not self.tensors[name].any()]
        return [f"{name!r} {self.tensors[name].shape}" for name in rest if name not in zero]

    def unchanged(self) -> list[str]:
        """Returns the leaves that PEFT stores only because it stores others: of a module in full, or all biases."""
        changed = {group for groups, same in self._changes.values() if not same for group in groups}
        return [path for path, (groups, same) in self._changes.items() if same and groups <= changed]

    def _low_rank(self, places: list[Site]) -> Adapter | None:
        layout, row, known = places[0].layout, places[0].row, len(self.problems)
        pieces: dict[Site, tuple[Values, Values]] = {}
        scales: dict[Site, Scale] = {}
        for site in places:
            if self._has(site, "a") or self._has(site, "b"):
                scale = scale_of(self.config, site.module)
                factors = [self._take(site, name, scale.rank) for name in "ab"]
                if factors[0] is not None and factors[1] is not None:
                    if self._is_of_others(site, factors[1]):
                        continue
                    pieces[site], scales[site] = own_ranks(site, factors[0], factors[1]), scale
                    self._check_target(site)
                    if row.head is not None:
                        self._check_head(site, row.head, {"a": "b", "b": "a"})
        if not pieces:
            return None if len(self.problems) == known else _empty(layout)
        variant, relative = self._variant(scales)
        by_index: dict[tuple[Any, ...], list[Site]] = {}
        for site in pieces:
            by_index.setdefault(site.index, []).append(site)
        joined = {
            index: joined_factors(layout, {site: pieces[site] for site in some}, relative)
            for index, some in by_index.items()
        }
        rank = max(a.shape[-1] for a, _ in joined.values())
        dtypes = [factor.dtype for factor in next(iter(pieces.values()))]
        a = np.zeros((*layout.batch, layout.d_in, rank), dtypes[0])
        b = np.zeros((*layout.batch, rank, layout.d_out), dtypes[1])
        for index, (one, other) in joined.items():
            a[(*index, ..., slice(one.shape[-1]))] = one
            b[(*index, slice(one.shape[-1]))] = other
        arrays = {"a": layout.from_matrix("a", a), "b": layout.from_matrix("b", b)}
        if isinstance(variant, DoRA):
            arrays["magnitude"] = layout.from_matrix("vector", self._outputs(places, "magnitude", None))
        return _adapter(variant.at_rank(rank), layout, arrays)

    def _variant(self, scales: Mapping[Site, Scale]) -> tuple[LowRank, dict[Site, float]]:
        """Returns the variant, and the scale of each module relative to that of the variant."""
        stabilized = bool(self.config.get("use_rslora"))
        top = max(scales.values(), key=lambda scale: abs(scale.scale(stabilized)))
        fields: dict[str, Any] = {"rank": top.rank, "alpha": top.alpha}
        fields["dropout"] = self.config.get("lora_dropout", 0.0)
        most = top.scale(stabilized)
        relative = {site: scale.scale(stabilized) / most if most else 1.0 for site, scale in scales.items()}
        if self.config.get("use_dora"):
            return DoRA(**fields, rank_stabilized=stabilized), relative
        if (invocation := self.config.get("alora_invocation_tokens")) is not None:
            return ALoRA(**fields, invocation=invocation), relative
        return (RSLoRA if stabilized else LoRA)(**fields), relative

    def _lora_bias(self, path: str, places: list[Site]) -> Adapter:
        layout, stabilized = places[0].layout, bool(self.config.get("use_rslora"))
        scales = {
            site: scale_of(self.config, site.module).scale(stabilized) for site in places if self._has(site, "bias")
        }
        most = max(scales.values(), key=abs)
        zero = np.zeros((*layout.batch, layout.d_out), np.float32)
        bias = self._outputs(places, "bias", zero, {site: scale / most for site, scale in scales.items() if most})
        self._changes[path] = {"lora_bias"}, not bias.any()
        return _adapter(LoRABias(scale=most), layout, {"bias": layout.from_matrix("vector", bias)})

    def _saved(self, path: str, leaf: Any, places: list[Site], name: str) -> Adapter:
        layout = places[0].layout
        array = "vector" if places[0].row.kind == "vector" else "kernel"
        base = layout.to_matrix(array, self._base(leaf, places[0]))
        value = self._outputs(places, name, base)
        if (head := places[0].row.head) is not None:
            self._check_head(places[0], head, {"saved.weight": "saved.weight"})
        heads = [places[0].row.head] if places[0].row.head is not None else []
        same = bool(np.array_equal(value, base))
        self._changes[path] = {*(site.module for site in places), *heads}, same
        return _adapter(Full(), layout, {"value": layout.from_matrix(array, value)})

    def _rows(self, leaf: Any, places: list[Site]) -> Adapter:
        site, layout = places[0], places[0].layout
        ids = rows_of(self.config, site.module)
        rows = None if ids is None else self._take(site, "rows", len(ids))
        if ids is None or rows is None:
            if ids is None:
                self.problems.append(
                    f"{site.module!r} has trainable tokens, and trainable_token_indices does not state them"
                )
                self._taken.add(self._modules[site.module]["rows"])
            return _empty(layout)
        base = layout.to_matrix("kernel", self._base(leaf, site))[ids].astype(np.float32)
        return _adapter(Rows(ids=tuple(ids)), layout, {"rows": layout.from_matrix("b", rows - base)})

    def _base(self, leaf: Any, site: Site) -> Values:
        """Returns the values of a leaf of `params`; zeros, after noting a problem, if it has none."""
        if isinstance(leaf, jax.ShapeDtypeStruct):
            self.problems.append(f"{site.path!r}: its values in `params` are needed, for {site.module!r}; got a shape")
            return np.zeros(leaf.shape, leaf.dtype)
        return on_host(dense(leaf))

    def _outputs(
        self, places: list[Site], name: str, start: Values | None, relative: Mapping[Site, float] | None = None
    ) -> Values:
        """Returns an array whose last axis is the outputs, from all modules of a leaf; `start` where there is none."""
        layout = places[0].layout
        result = None if start is None else np.array(start)
        for site in places:
            if not self._has(site, name):
                if start is None:
                    self.problems.append(f"{site.module!r} has no tensor {suffix('linear', name)}")
                continue
            if (tensor := self._take(site, name, 0)) is None:
                continue
            if relative is not None and relative[site] != 1:
                tensor = tensor * np.asarray(relative[site], tensor.dtype)
            if result is None:
                result = np.zeros((*layout.batch, layout.d_out), tensor.dtype)
            result = result.astype(tensor.dtype)
            result[(*site.index, ..., site.outputs)] = tensor
        return np.zeros((*layout.batch, layout.d_out), np.float32) if result is None else result

    def _has(self, site: Site, name: str) -> bool:
        return name in self._modules.get(site.module, ())

    def _take(self, site: Site, name: str, rank: int) -> Values | None:
        """Returns a tensor as a matrix, with the leaf's outputs; None, after noting a problem, if it does not fit."""
        stored = self._modules.get(site.module, {}).get(name)
        if stored is None:
            self.problems.append(f"{site.module!r} has no tensor {suffix(site.row.kind, name)}")
            return None
        self._taken.add(stored)
        tensor = self.tensors[stored]
        plain = name.replace("base.", "saved.")
        d_out = site.last - site.first if site.part.of is None else site.part.of[1]
        expected = expected_shape(plain, site.layout, d_out, rank)
        if not stored.endswith(suffix(site.row.kind, plain)):
            self.problems.append(
                f"{stored!r} is not a tensor of a module of kind {site.row.kind!r}, as {site.path!r} is"
            )
            return None
        if tensor.shape != expected:
            of_rank = f" and rank {rank}" if name in ("a", "b") else ""
            self.problems.append(f"{stored!r} has shape {tensor.shape}; {site.path!r}{of_rank} need {expected}")
            return None
        matrix = from_torch(plain, tensor, site.layout)
        if name == "a":
            return matrix
        if site.part.of is not None:
            matrix = matrix[..., site.part.of[0] : site.part.of[0] + site.last - site.first]
        return outputs_from_torch(matrix, site.part)

    def _is_of_others(self, site: Site, b: Values) -> bool:
        """Whether a module has factors only for other leaves that it fuses."""
        if site.part.of is None or b.any() or self.config.get("use_dora"):
            return False
        return bool(self.tensors[self._modules[site.module]["b"]].any())

    def _check_target(self, site: Site) -> None:
        if is_exact(self.config) and not is_target(self.config, site.module):
            self.problems.append(f"{site.module!r} has factors, and is not in target_modules: PEFT would not read them")

    def _check_head(self, site: Site, head: str, names: Mapping[str, str]) -> None:
        """Notes a problem unless the tensors of a tied head are those of its embedding.

        Args:
          site: the embedding.
          head: the head's module.
          names: each tensor of the head, and that of the embedding.
        """
        own, tied = self._modules[site.module], self._modules.get(head, {})
        self._taken |= {tied[name] for name in names if name in tied}
        if not all(name in tied for name in names):
            if not self.config.get("ensure_weight_tying"):
                self.problems.append(
                    f"{site.module!r} has an adapter, and the head {head!r} that is tied to it has none; an adapter of "
                    f"{site.path!r} acts on both"
                )
            return
        pairs = [(self.tensors[tied[name]], self.tensors[own[other]]) for name, other in names.items()]
        if not all(np.array_equal(one, other if "saved.weight" in names else other.T) for one, other in pairs):
            self.problems.append(f"the adapter of {head!r} is not that of {site.module!r}, to which it is tied")

    def _compare_base(self, leaf: Any, places: list[Site]) -> None:
        """Takes the copies of adapted embeddings that PEFT stores, if they are those of the base."""
        row, head = places[0].row, places[0].row.head
        copies = {f"{PREFIX}{site.module}.base_layer.weight" for site in places}
        if head is not None:
            copies.add(f"{PREFIX}{head}.base_layer.weight")
            if "saved.weight" not in self._modules.get(places[0].module, ()):
                copies.add(f"{PREFIX}{head}.weight")
        for name in sorted(copies & set(self.tensors)):
            self._taken.add(name)
            base, stored = self._base(leaf, places[0]), self.tensors[name]
            base = base if row.kind == "embedding" else base.T
            if stored.shape != base.shape or not np.array_equal(stored.astype(base.dtype), base):
                self.problems.append(f"{name!r} is not the base's value at {places[0].path!r}")


def _adapter(variant: Any, layout: Layout, arrays: Mapping[str, Values]) -> Adapter:
    axes = layout.axes if variant.needs_axes else ""
    return Adapter(variant, axes, **{name: jnp.asarray(array) for name, array in arrays.items()})


def _empty(layout: Layout) -> Adapter:
    """Stands for a leaf with problems, which the caller raises."""
    del layout
    return Adapter(Full(), "")
