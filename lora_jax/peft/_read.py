"""Makes the adapter of each leaf from the tensors of its torch modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.adapter import Adapter
from .._core.base import dense
from .._core.values import on_host
from .._core.variant import LowRank
from .._variants import AdaLoRA, ALoRA, DoRA, Full, LoRA, LoRABias, Rows, RSLoRA, VeRA
from . import _adalora as adalora
from . import _vera as vera
from ._config import Prepared, Scale, is_exact, is_target, rows_of, scale_of, target_of
from ._joined import joined_factors, norms, own_ranks
from ._layout import Layout, Values, outputs_from_torch
from ._module import module_value
from ._names import PREFIX, to_torch
from ._refusal import refusal
from ._sites import Site
from ._tensors import Tensors

_UNREADABLE = Adapter(Full(), "")  # stands for a leaf with problems, which the caller raises


class Reader:
    """Makes adapters from the tensors of a file, and notes what is wrong in its `problems`."""

    def __init__(self, config: Prepared, file: Tensors) -> None:
        self.config, self.file = config, file
        self._changes: dict[str, tuple[set[str], bool]] = {}
        self._generated = None
        self._is_adaptive = config.get("peft_type") == "ADALORA"
        if config.get("peft_type") == "VERA":
            file.taken |= {vera.A, vera.B}
            self._generated = vera.from_config(config, file.arrays)

    def leaf(self, path: str, leaf: Any, places: list[Site]) -> Adapter | None:
        """Returns the adapter of one leaf; None if the file has nothing for it."""
        row = places[0].row

        def has(name: str) -> bool:
            return any(self.file.has(site, name) for site in places)

        plain = [f"saved.{row.parameter}"]
        if row.kind == "vector":
            plain.append(f"base.{row.parameter}")
            if row.parameter == "bias" and has("bias"):
                return self._lora_bias(path, places)
        else:
            self._compare_base(leaf, places)
            is_vera = self.config.get("peft_type") == "VERA"
            if not is_vera and (has("a") or has("b")):
                return self._low_rank(leaf, places)
            if is_vera and (has("lambda_b") or has("lambda_d")):
                return self._from_vera(leaf, places)
            if has("rows"):
                return self._rows(leaf, places)
        return next((self._saved(path, leaf, places, name) for name in plain if has(name)), None)

    def unchanged(self) -> list[str]:
        """Returns the leaves that PEFT stores only because it stores others: of a module in full, or all biases."""
        changed = {group for groups, same in self._changes.values() if not same for group in groups}
        return [path for path, (groups, same) in self._changes.items() if same and groups <= changed]

    def _low_rank(self, leaf: Any, places: list[Site]) -> Adapter | None:
        row, known = places[0].row, len(self.file.problems)
        pieces: dict[Site, tuple[Values, Values]] = {}
        scales: dict[Site, Scale] = {}
        diagonals: dict[Site, Values] = {}
        for site in places:
            if self.file.has(site, "a") or self.file.has(site, "b"):
                scale = scale_of(self.config, target_of(self.config, site.module, site.row))
                if (factors := self._factors(site, scale.rank)) is not None:
                    a, b, diagonal = factors
                    if not scale.rank or self._is_of_others(site, b):
                        continue
                    pieces[site], scales[site] = own_ranks(site, a, b), scale
                    if diagonal is not None:
                        diagonals[site] = diagonal
                    self._check_target(site)
                    if row.head is not None:
                        self._check_head(site, row.head, {"a": "b", "b": "a"})
        if not pieces:
            return None if len(self.file.problems) == known else _UNREADABLE
        return self._assembled(leaf, places, pieces, scales, diagonals)

    def _factors(self, site: Site, rank: int) -> tuple[Values, Values, Values | None] | None:
        """Returns `a`, `b` and the diagonal of AdaLoRA; None, after noting a problem, if a tensor does not fit."""
        if self._is_adaptive:
            adalora.arrange(self.file, site, rank)
        a, b, e = (self.file.take(site, name, rank) if name != "e" or self._is_adaptive else None for name in "abe")
        if a is None or b is None or (self._is_adaptive and e is None):
            return None
        if e is None or adalora.is_kept(site.row):
            return a, b, None if e is None else e[:, 0]
        return a * e[:, 0], b, None

    def _assembled(
        self,
        leaf: Any,
        places: list[Site],
        pieces: Mapping[Site, tuple[Values, Values]],
        scales: Mapping[Site, Scale],
        diagonals: Mapping[Site, Values],
    ) -> Adapter:
        """Returns the adapter of a leaf from the factors of its modules."""
        layout = places[0].layout
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
            b[(*index, ..., slice(one.shape[-1]), slice(None))] = other
        arrays = {"a": layout.from_matrix("a", a), "b": layout.from_matrix("b", b)}
        if isinstance(variant, DoRA):
            bare = len(pieces) < len(places) and all(self.file.has(site, "magnitude") for site in pieces)
            start = norms(layout, self._base(leaf, places[0])) if bare else None  # of modules without factors
            arrays["magnitude"] = layout.from_matrix("vector", self.file.outputs(places, "magnitude", start))
        if isinstance(variant, AdaLoRA):
            arrays["e"] = np.zeros((*layout.batch, rank), next(iter(diagonals.values())).dtype)
            for site, diagonal in diagonals.items():
                arrays["e"][(*site.index, slice(diagonal.size))] = diagonal
        return _adapter(variant.at_rank(rank), layout, arrays)

    def _variant(self, scales: Mapping[Site, Scale]) -> tuple[LowRank, dict[Site, float]]:
        """Returns the variant, and the scale of each module relative to that of the variant."""
        stabilized = bool(self.config.get("use_rslora")) and not self._is_adaptive
        top = max(scales.values(), key=lambda scale: abs(scale.scale(stabilized)))
        fields: dict[str, Any] = {"rank": top.rank, "alpha": top.alpha}
        fields["dropout"] = self.config.get("lora_dropout", self.config.get("vera_dropout", 0.0))
        most = top.scale(stabilized)
        relative = {site: scale.scale(stabilized) / most if most else 1.0 for site, scale in scales.items()}
        if self._is_adaptive:
            return (AdaLoRA if adalora.is_kept(next(iter(scales)).row) else LoRA)(**fields), relative
        if self.config.get("use_dora"):
            return DoRA(**fields, rank_stabilized=stabilized), relative
        if (invocation := self.config.get("alora_invocation_tokens")) is not None:
            fields["alpha"] = most * top.rank if stabilized else top.alpha  # ALoRA divides by the rank
            return ALoRA(**fields, invocation=invocation), relative
        return (RSLoRA if stabilized else LoRA)(**fields), relative

    def _from_vera(self, leaf: Any, places: list[Site]) -> Adapter:
        """Returns `VeRA` if it generates the matrices of the file, and else the same function as `LoRA`."""
        layout, rank = places[0].layout, self.config.get("r", 256)
        a, b = self.file.arrays.get(vera.A), self.file.arrays.get(vera.B)
        found = [site for site in places if self.file.has(site, "lambda_b")]
        vectors: dict[Site, tuple[Values, Values]] = {}
        for site in found:
            one, other = (self.file.take(site, name, rank) for name in ("lambda_d", "lambda_b"))
            if one is not None and other is not None:
                vectors[site] = one, other
        sizes = [site.last - site.first if site.part.of is None else site.part.of[1] for site in found]
        shapes = [() if array is None else array.shape for array in (a, b)]
        if a is None or b is None or not vera.are_large_enough(shapes, rank, layout.d_in, max(sizes, default=0)):
            self.file.problems.append(f"{places[0].path!r}: vera_A and vera_B are missing or too small for its module")
            return _UNREADABLE
        if len(vectors) < len(found) or not found:
            return _UNREADABLE
        for site in found:
            self._check_target(site)
        probe = Adapter(VeRA(rank=rank, seed=0), layout.axes)
        if self._generated is not None and refusal(probe, places[0].row) is None:
            lambda_d = np.zeros((*layout.batch, rank), np.float32)
            lambda_b = np.zeros((*layout.batch, layout.d_out), np.float32)
            for site, (one, other) in vectors.items():
                lambda_d[site.index] = one / np.float32(vera.relative(layout.d_in, a.shape[1]))
                lambda_b[site.index] = other
            arrays = {"lambda_d": lambda_d, "lambda_b": layout.from_matrix("vector", lambda_b)}
            return _adapter(self._generated, layout, arrays)
        pieces = {}
        for (site, (one, other)), size in zip(vectors.items(), sizes, strict=True):
            rows = outputs_from_torch(site.of_module(b[:size].T), dataclasses.replace(site.part, factor=1.0))
            pieces[site] = (a[:, : layout.d_in].T, one[:, None] * rows * other)
        return self._assembled(leaf, places, pieces, dict.fromkeys(found, Scale(rank, rank)), {})

    def _lora_bias(self, path: str, places: list[Site]) -> Adapter:
        layout, stabilized = places[0].layout, bool(self.config.get("use_rslora"))
        scales = {
            site: scale_of(self.config, site.module).scale(stabilized) for site in places if self.file.has(site, "bias")
        }
        most = max(scales.values(), key=abs)
        zero = np.zeros((*layout.batch, layout.d_out), np.float32)
        bias = self.file.outputs(places, "bias", zero, {site: scale / (most or 1.0) for site, scale in scales.items()})
        self._changes[path] = {"lora_bias"}, not bias.any()
        return _adapter(LoRABias(scale=most), layout, {"bias": layout.from_matrix("vector", bias)})

    def _saved(self, path: str, leaf: Any, places: list[Site], name: str) -> Adapter:
        layout = places[0].layout
        array = "vector" if places[0].row.kind == "vector" else "kernel"
        is_known = not isinstance(leaf, jax.ShapeDtypeStruct)
        needed = is_known or not all(self.file.has(site, name) for site in places)
        base = layout.to_matrix(array, self._base(leaf, places[0]) if needed else np.zeros(leaf.shape, leaf.dtype))
        value = self.file.outputs(places, name, base)
        if (head := places[0].row.head) is not None:
            self._check_head(places[0], head, {"saved.weight": "saved.weight"})
        heads = [places[0].row.head] if places[0].row.head is not None else []
        same = is_known and bool(np.array_equal(value, base))
        self._changes[path] = {*(site.module for site in places), *heads}, same
        return _adapter(Full(), layout, {"value": layout.from_matrix(array, value)})

    def _rows(self, leaf: Any, places: list[Site]) -> Adapter:
        site, layout = places[0], places[0].layout
        if (ids := rows_of(self.config, site.module)) is None:
            line = f"{site.module!r} has trainable tokens, and trainable_token_indices does not state them"
            self.file.problems.append(line)
            self.file.taken.add(self.file.modules[site.module]["rows"])
            return _UNREADABLE
        variant = Rows(ids=tuple(ids))
        variant.check(layout.shape, layout.axes)
        if (rows := self.file.take(site, "rows", len(ids))) is None:
            return _UNREADABLE
        base = layout.to_matrix("kernel", self._base(leaf, site))[list(variant.ids)].astype(np.float32)
        return _adapter(variant, layout, {"rows": layout.from_matrix("b", rows - base)})

    def _base(self, leaf: Any, site: Site) -> Values:
        """Returns the values of a leaf of `params`; zeros, after noting a problem, if it has none."""
        if isinstance(leaf, jax.ShapeDtypeStruct):
            self.file.problems.append(
                f"{site.path!r}: its values in `params` are needed, for {site.module!r}; got a shape"
            )
            return np.zeros(leaf.shape, leaf.dtype)
        return on_host(dense(leaf))

    def _is_of_others(self, site: Site, b: Values) -> bool:
        """Whether a module has factors only for other leaves that it fuses."""
        if site.part.of is None or b.any() or self.config.get("use_dora"):
            return False
        return bool(self.file.arrays[self.file.modules[site.module]["b"]].any())

    def _check_target(self, site: Site) -> None:
        if site.row.is_parameter:  # those that are no targets are not found
            return
        name = target_of(self.config, site.module, site.row)
        if is_exact(self.config) and name == site.module and not is_target(self.config, name):
            self.file.problems.append(
                f"{site.module!r} has factors, and is not in target_modules: PEFT would not read them"
            )

    def _check_head(self, site: Site, head: str, names: Mapping[str, str]) -> None:
        """Notes a problem unless the tensors of a tied head are those of its embedding.

        Args:
          site: the embedding.
          head: the head's module.
          names: each tensor of the head, and that of the embedding.
        """
        own, tied = self.file.modules[site.module], self.file.modules.get(head, {})
        self.file.taken |= {tied[name] for name in names if name in tied}
        if not all(name in tied for name in names):
            if not self.config.get("ensure_weight_tying"):
                self.file.problems.append(
                    f"{site.module!r} has an adapter, and the head {head!r} that is tied to it has none; an adapter of "
                    f"{site.path!r} acts on both"
                )
            return
        if "a" in names and scale_of(self.config, site.module) != scale_of(self.config, head):
            self.file.problems.append(f"{head!r} has another rank or alpha than {site.module!r}, to which it is tied")
        pairs = [(self.file.arrays[tied[name]], self.file.arrays[own[other]]) for name, other in names.items()]
        if not all(np.array_equal(one, other if "saved.weight" in names else other.T) for one, other in pairs):
            self.file.problems.append(f"the adapter of {head!r} is not that of {site.module!r}, to which it is tied")

    def _compare_base(self, leaf: Any, places: list[Site]) -> None:
        """Takes the copies of adapted embeddings that PEFT stores, if they are those of the base."""
        head = places[0].row.head
        copies = {f"{PREFIX}{site.module}.base_layer.weight": site for site in places}
        if head is not None:
            copies[f"{PREFIX}{head}.base_layer.weight"] = places[0]
            if "saved.weight" not in self.file.modules.get(places[0].module, ()):
                copies[f"{PREFIX}{head}.weight"] = places[0]
        for name, site in copies.items():
            if (stored := self.file.arrays.get(name)) is None:
                continue
            self.file.taken.add(name)
            base = to_torch("saved.weight", module_value(site, self._base(leaf, site)), site.layout)
            if stored.shape != base.shape or not np.array_equal(stored.astype(base.dtype), base):
                self.file.problems.append(f"{name!r} is not the base's value at {site.path!r}")


def _adapter(variant: Any, layout: Layout, arrays: Mapping[str, Values]) -> Adapter:
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise OverflowError("its values are too large: with their scales or matrices, they are not finite")
    axes = layout.axes if variant.needs_axes else ""
    return Adapter(variant, axes, **{name: jnp.asarray(array) for name, array in arrays.items()})
