"""Targets by name: keys of a spec that stand for all leaves of a kind, as the traced model uses them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from .._errors import SpecError
from .paths import Pattern, matching_paths, pattern_text
from .uses import Kernel


@dataclasses.dataclass(frozen=True)
class Target:
    """Leaves of some kinds; a key of a spec, as a pattern is. The targets are those of `lora_jax.targets`.

    Attributes:
      name: in `lora_jax.targets`.
      kinds: of the leaves; see `Kernel.kind`.
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


def key_text(key: Key) -> str:
    """A key of a spec as it stands there, for an error: a pattern in quotes, a target by its name."""
    return repr(key) if isinstance(key, Target) else repr(pattern_text(key))


def matching_leaves(key: Key, leaves: Collection[str], kernels: Mapping[str, Kernel] | None) -> list[str]:
    """The paths that a key of a spec matches.

    Raises:
      SpecError: if there is none; for a target, if the model has not been traced.
    """
    if not isinstance(key, Target):
        advice = "`lora_jax.kernels(apply, params, *args)` lists all, with their use."
        return matching_paths(key, leaves, "every rule to match a leaf", advice=advice)
    if kernels is None:
        raise SpecError(
            f"Expected `kernels`, as only the traced model tells which leaves {key} are; got none.\n"
            "  Call init(key, params, spec, kernels=lora_jax.kernels(apply, params, *args)), or lora_jax.adapt, which "
            "does both."
        )
    found = [path for path in leaves if path in kernels and kernels[path].kind in key.kinds]
    if not found:
        have: dict[Any, int] = {}
        for path in leaves:
            kind = kernels[path].kind if path in kernels else None
            have[kind] = have.get(kind, 0) + 1
        counts = ", ".join(f"{count} {kind or 'of no kind'}" for kind, count in have.items())
        raise SpecError(
            f"Expected every rule to match a leaf; {key} matches none of {len(leaves)} leaves ({counts}).\n"
            "  The kind of each is in `lora_jax.kernels(apply, params, *args)`; a pattern matches by path."
        )
    return found
