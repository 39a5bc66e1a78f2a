"""Targets: keys of a spec that select all leaves of a kind, according to their use in the traced model."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from .._errors import SpecError
from .paths import Pattern, matching_paths, pattern_text
from .uses import Kernel


@dataclasses.dataclass(frozen=True)
class Target:
    """A key of a spec that selects all leaves of some kinds. `lora_jax.targets` has all targets.

    Attributes:
      name: name in `lora_jax.targets`.
      kinds: the values of `Kernel.kind` that it selects.
    """

    name: str
    kinds: tuple[str, ...]

    def __repr__(self) -> str:
        return f"targets.{self.name}"


all_linear = Target("all_linear", ("attention", "mlp"))
attention = Target("attention", ("attention",))
mlp = Target("mlp", ("mlp",))
output_head = Target("output_head", ("head",))
embeddings = Target("embeddings", ("embedding",))
convolutions = Target("convolutions", ("convolution",))
biases = Target("biases", ("bias",))
norms = Target("norms", ("norm",))

Key = Pattern | Target
_T = TypeVar("_T")
# The keys of a `Mapping` are invariant: without the first two, a checker refuses a variable of type `dict[str, LoRA]`.
Rules = Mapping[str, _T] | Mapping[Target, _T] | Mapping[Key, _T]


def key_text(key: Key) -> str:
    """Formats a key of a spec for an error: a pattern in quotes, a target by name."""
    return repr(key) if isinstance(key, Target) else repr(pattern_text(key))


def matching_leaves(key: Key, leaves: Collection[str], kernels: Mapping[str, Kernel] | None) -> list[str]:
    """Returns the paths that a key of a spec matches.

    Raises:
      SpecError: if it matches none, or if it is a target and `kernels` is None.
    """
    if not isinstance(key, Target):
        advice = "`lora_jax.kernels(apply, params, *args)` lists all leaves and their uses."
        return matching_paths(key, leaves, "every rule to match a leaf", advice=advice)
    if kernels is None:
        raise SpecError(
            f"Expected `kernels`, because {key} selects leaves by their use in the traced model; got none.\n"
            "  Pass kernels=lora_jax.kernels(apply, params, *args), or call lora_jax.adapt, which traces the model."
        )
    found = [path for path in leaves if path in kernels and kernels[path].kind in key.kinds]
    if not found:
        by_kind: dict[Any, int] = {}
        for path in leaves:
            kind = kernels[path].kind if path in kernels else None
            by_kind[kind] = by_kind.get(kind, 0) + 1
        counts = ", ".join(f"{count} {kind or 'of another kind'}" for kind, count in by_kind.items())
        raise SpecError(
            f"Expected every rule to match a leaf; {key} matches none of {len(leaves)} leaves ({counts}).\n"
            "  `lora_jax.kernels(apply, params, *args)` shows the kind of each leaf; to select leaves "
            "by path, use a pattern."
        )
    return found
