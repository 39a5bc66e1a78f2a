"""Resolves a spec: which variant each leaf gets, or an error that says which rule cannot have been meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._errors import SpecError, listed
from ._paths import Pattern, matcher, nearest, pattern_text
from ._variants import Variant

Spec = Mapping[Pattern, Variant | None]

_VECTORS = {"bias", "scale", "mean", "var"}  # what Flax calls its vectors, which a scan stacks into matrices


def resolve(spec: Spec, leaves: Mapping[str, Any]) -> dict[str, Variant]:
    """Gives each leaf the variant of the first pattern that matches its path; leaves with None or no match get none.

    Args:
      spec: ordered: pattern to variant, or to None for "leave alone".
      leaves: arrays, or their shapes and dtypes, by path.

    Raises:
      SpecError: if a rule matches nothing, if earlier rules decide all that it matches, if it gives a low-rank update
        to a leaf that cannot have one, or if nothing is adapted at all.
    """
    if not isinstance(spec, Mapping):
        raise SpecError(f"Expected a spec, a mapping such as {{'**/kernel': LoRA(rank=8, alpha=16)}}; got {spec!r}.")
    decided: dict[str, Pattern] = {}
    for pattern, variant in spec.items():
        _check_rule(pattern, variant)
        matched = [path for path in leaves if matcher(pattern).fullmatch(path)]
        fresh = [path for path in matched if path not in decided]
        if not matched:
            near = nearest(pattern, list(leaves))
            raise SpecError(
                f"Expected every rule to match a leaf; {pattern_text(pattern)!r} matches none of {len(leaves)}.\n"
                f"  The nearest paths:\n{listed(near)}\n"
                "  `lora_jax.kernels(apply, params, *args)` lists all, with their use."
            )
        if not fresh:
            first = dict.fromkeys(pattern_text(decided[path]) for path in matched)
            raise SpecError(
                f"Expected every rule to decide something; {pattern_text(pattern)!r} can never act: earlier rules "
                f"decide all {len(matched)} leaves that it matches.\n"
                f"  The earlier rules: {', '.join(map(repr, first))}.\n"
                "  The first match counts: put the narrower rule first, or delete this one."
            )
        decided |= dict.fromkeys(fresh, pattern)
    chosen = {path: spec[decided[path]] for path in leaves if path in decided}
    adapted = {path: variant for path, variant in chosen.items() if variant is not None}
    if not adapted:
        raise SpecError(f"Expected a spec that adapts at least one leaf; got {dict(spec)!r}.")
    for path, variant in adapted.items():
        _check_leaf(path, leaves[path], variant, decided[path])
    return adapted


def _check_rule(pattern: Pattern, variant: Any) -> None:
    if variant is not None and not isinstance(variant, Variant):
        raise SpecError(
            f"Expected a variant such as LoRA(rank=8, alpha=16), or None, for {pattern_text(pattern)!r}; "
            f"got {variant!r}."
        )


def _check_leaf(path: str, leaf: Any, variant: Variant, pattern: Pattern) -> None:
    rule = f"by the rule {pattern_text(pattern)!r}"
    if not isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        raise SpecError(f"Expected an array to adapt; got {leaf!r} at {path!r}, {rule}.")
    where = f"{path!r} of shape {tuple(leaf.shape)}, {rule}"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise SpecError(f"Expected a floating-point leaf to adapt; got {leaf.dtype} at {where}.")
    if not variant.needs_axes:
        return
    name = path.split("/")[-1]
    if leaf.ndim < 2 or (name in _VECTORS and variant.axes is None):
        raise SpecError(
            f"Expected a kernel for {variant}; got a vector, {where}.\n"
            f"  End the pattern in `/kernel`, or put a rule for this leaf before it: {'**/' + name!r}: None to leave "
            "it alone, Full() to train it whole."
        )
