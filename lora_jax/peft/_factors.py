"""The factors of torch modules without a mapping, as the files of all formats have them, and how they are in PEFT's."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np

from .._core.values import is_finite
from .._errors import AdapterError
from ._config import Config, Scale, prepared, ranks_to_config, scale_of
from ._layout import Values
from ._names import EMBEDDING_SUFFIXES, PREFIX, parse, suffix

Arrays = dict[str, dict[str, Values]]  # of each module, by our names

ARRAYS = ("a", "b", "bias", "magnitude")  # what a module with factors may have, by our names


@dataclasses.dataclass(frozen=True)
class Factors:
    """The factors of one torch module, whose weight changes by `scale·b·a`.

    Attributes:
      a: (rank, in, …); of an embedding, (rank, rows).
      b: (out, rank, …).
      scale: α/rank, or another.
      magnitude: of DoRA, (out,); of a convolution, (1, out, 1, …).
      bias: of `b`, (out,).
      kind: as that of a row, `"linear"`, `"embedding"` or `"conv"`.
    """

    a: Values
    b: Values
    scale: float
    magnitude: Values | None = None
    bias: Values | None = None
    kind: str = "linear"

    @property
    def rank(self) -> int:
        """The rank."""
        return int(self.a.shape[0])

    @property
    def alpha(self) -> float:
        """The α that gives the scale, as α/rank."""
        return float(np.float32(self.scale * self.rank))

    def rescaled(self, scale: float, module: str) -> Factors:
        """Returns factors with another scale and the same product: the ratio is multiplied into `b` and its bias.

        Raises:
          AdapterError: if the dtype has no values as large; it names the module.
        """
        if scale == self.scale:
            return self
        ratio = self.scale / scale

        def times(x: Values) -> Values:
            with np.errstate(over="ignore"):
                product = (x.astype(np.promote_types(x.dtype, np.float32)) * ratio).astype(x.dtype)
            if not is_finite(product):
                raise AdapterError(
                    f"Expected a scale that can be multiplied into the factors of {module!r}; {self.scale / scale:g} "
                    f"times values of up to {float(np.abs(x).max()):g} is not finite in {x.dtype}.\n"
                    "  Cast the adapter to float32."
                )
            return product

        bias = None if self.bias is None else times(self.bias)
        return dataclasses.replace(self, scale=scale, b=times(self.b), bias=bias)

    def padded(self, rank: int) -> Factors:
        """Returns factors of a larger rank with the same scale and product: the other ranks are zero."""
        more = rank - self.rank
        a = np.pad(self.a, [(0, more)] + [(0, 0)] * (self.a.ndim - 1))
        b = np.pad(self.b, [(0, 0), (0, more)] + [(0, 0)] * (self.b.ndim - 2))
        return dataclasses.replace(self, a=a, b=b)


def most_common(values: Iterable[float]) -> float | None:
    """Returns the most frequent value that is not zero; None if there is none."""
    found = collections.Counter(value for value in values if value)
    return found.most_common(1)[0][0] if found else None


def mixed(factors: Mapping[str, Factors]) -> list[str]:
    """Returns the modules without a magnitude, if others have one; a configuration has one setting of DoRA."""
    without = [module for module, own in factors.items() if own.magnitude is None]
    lines = [f"{module!r} has no magnitude, and others have" for module in without]
    return lines if len(without) < len(factors) else []


def put(arrays: Arrays, module: str, ours: str, tensor: Values, problems: list[str]) -> None:
    """Adds a tensor of a module; notes a second one of the same kind, which other names may hide."""
    if ours in arrays.setdefault(module, {}):
        problems.append(f"{module!r} has two tensors that are its {ours}")
    arrays[module][ours] = tensor


def of_modules(
    arrays: Arrays, scale: Callable[[str, int], float], problems: list[str], tables: Collection[str] = ()
) -> dict[str, Factors]:
    """Makes the factors of modules from their arrays by our names, and notes those that do not fit together.

    Args:
      arrays: of each module, by our names.
      scale: from the module and its rank.
      problems: what does not fit is added.
      tables: the modules that are embeddings.
    """
    found = {}
    for module, own in arrays.items():
        a, b = own.get("a"), own.get("b")
        if a is None or b is None:
            problems.append(f"{module!r} has only one of its two factors")
            continue
        fit = a.ndim == b.ndim >= 2 and a.shape[0] == b.shape[1] > 0 and b.shape[2:] == (1,) * (b.ndim - 2)
        if not fit:
            problems.append(f"{module!r} has factors of shapes {a.shape} and {b.shape}, which do not fit together")
            continue
        kind = "embedding" if module in tables else "conv" if a.ndim > 2 else "linear"
        vector = (1, b.shape[0], *b.shape[2:]) if kind == "conv" else (b.shape[0],)
        bad = [
            f"{module!r} has a {name} of shape {own[name].shape}; expected {expected}"
            for name, expected in (("bias", b.shape[:1]), ("magnitude", vector))
            if name in own and own[name].shape != expected
        ]
        if "alpha" in own and own["alpha"].size != 1:
            bad.append(f"{module!r} has an alpha of shape {own['alpha'].shape}; expected one value")
        problems += bad
        if not bad:
            found[module] = Factors(a, b, scale(module, a.shape[0]), own.get("magnitude"), own.get("bias"), kind)
    return found


def from_peft(tensors: Mapping[str, Values], config: Config, problems: list[str]) -> dict[str, Factors]:
    """Returns the factors in PEFT's format, by module; notes the tensors that are of no factors."""
    arrays: Arrays = {}
    tables = set()
    for name, tensor in sorted(tensors.items()):
        module, ours = parse(name) or ("", "")
        if ours not in ARRAYS:
            problems.append(f"{name!r} {tensor.shape} is not of the factors of a module")
            continue
        put(arrays, module, ours, tensor, problems)
        if name.endswith(tuple(EMBEDDING_SUFFIXES.values())):
            tables.add(module)
    stated = prepared(config)
    ranks = {module: scale_of(stated, module) for module in arrays}
    stabilized = bool(config.get("use_rslora"))
    found = of_modules(arrays, lambda module, rank: ranks[module].scale(stabilized), problems, tables)
    problems += other_ranks(found, ranks)
    return found


def other_ranks(factors: Mapping[str, Factors], stated: Mapping[str, Scale]) -> list[str]:
    """Returns the modules with another rank than their configuration states."""
    return [
        f"{module!r} has rank {own.rank}, and the configuration states {stated[module].rank}"
        for module, own in factors.items()
        if module in stated and own.rank != stated[module].rank
    ]


def to_peft(factors: Mapping[str, Factors]) -> tuple[dict[str, Values], dict[str, Any]]:
    """Returns the tensors and the configuration of factors in PEFT's format."""
    tensors = {
        f"{PREFIX}{module}{suffix(own.kind, name)}": array
        for module, own in factors.items()
        for name in ARRAYS
        if (array := getattr(own, name)) is not None
    }
    return tensors, scales_to_config(factors) | {
        "peft_type": "LORA",
        "target_modules": sorted(factors),
        "use_dora": any(own.magnitude is not None for own in factors.values()),
        "lora_bias": any(own.bias is not None for own in factors.values()),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def scales_to_config(factors: Mapping[str, Factors]) -> dict[str, Any]:
    """Returns the ranks and scales of factors as PEFT's configuration has them."""
    scales = {module: Scale(own.rank, own.alpha) for module, own in factors.items()}
    return ranks_to_config(scales) | {"use_rslora": False}
