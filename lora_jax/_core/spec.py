"""Resolves a spec: which variant each leaf gets, or an error that says which rule cannot have been meant."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import SpecError, listed
from .base import StoredLeaf
from .targets import Key, key_text, matching_leaves
from .uses import Kernel
from .variant import LowRank, Variant, largest_rank

Spec = Mapping[Key, Variant | None]

_VECTORS = {"bias", "scale", "mean", "var"}  # what Flax calls its vectors, which a scan stacks into matrices


class Choice(NamedTuple):
    """What a spec says of one leaf.

    Attributes:
      pattern: the key of the rule that decides, a pattern or a target.
      variant: its variant; from `fit`, as it fits the leaf.
      axes: the roles of the leaf's axes; empty where they do not matter, or are not known yet.
    """

    pattern: Key
    variant: Variant
    axes: str = ""


class Problem(NamedTuple):
    """Why one leaf cannot be adapted as a spec says.

    Attributes:
      path: of the leaf.
      leaf: what is there.
      choice: what the spec says of it.
      reason: what was expected, and what was got.
      advice: what to do; alike for leaves that have the same problem.
    """

    path: str
    leaf: Any
    choice: Choice
    reason: str
    advice: str = ""


def spec(kernels: Mapping[str, Kernel], rules: Spec) -> dict[str, Variant]:
    """Makes a spec of exact paths, with the roles of axes filled in: to be printed, edited and stored.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params = {"query": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))}
    >>> apply = lambda p, x: jnp.einsum("td,dhk->thk", x, p["query"]) + p["bias"]
    >>> kernels = lj.kernels(apply, params, jnp.ones((5, 8)))
    >>> lj.spec(kernels, {"query": lj.LoRA(rank=2, alpha=4), lj.targets.biases: lj.Full()})
    {'bias': Full(), 'query': LoRA(rank=2, alpha=4, axes='ioo')}

    Args:
      kernels: from `kernels(apply, params, *args)`.
      rules: a spec, as `init` takes it.

    Returns:
      `{path: variant}`, which `init` takes as it takes `rules`, without `kernels=`.

    Raises:
      SpecError: where `init` would raise it.
    """
    leaves = {path: jax.ShapeDtypeStruct(kernel.shape, kernel.dtype) for path, kernel in kernels.items()}
    return {
        path: dataclasses.replace(variant, axes=axes) if variant.needs_axes else variant
        for path, (_, variant, axes) in fit(rules, leaves, kernels).items()
    }


def fit(
    spec: Spec,
    leaves: Mapping[str, Any],
    kernels: Mapping[str, Kernel] | None,
    only: Collection[str] | None = None,
) -> dict[str, Choice]:
    """Gives each leaf that the spec names its variant, as it fits the leaf, and the roles of its axes.

    Args:
      spec: ordered: pattern or target to variant, or to None for "leave alone".
      leaves: arrays, or their shapes and dtypes, by path.
      kernels: from `lora_jax.kernels`, for the roles of axes, and for targets; or None.
      only: the paths that matter; None for all.

    Raises:
      SpecError: what `resolve` raises; or one for all the leaves that cannot be adapted as the spec says.
    """
    chosen = {path: choice for path, choice in resolve(spec, leaves, kernels).items() if only is None or path in only}
    problems, fitted = [], {}
    for path, choice in chosen.items():
        leaf, variant = leaves[path], choice.variant
        if (problem := _unfit(path, leaf, choice)) is not None:
            problems.append(problem)
            continue
        axes = _axes_for(path, leaf, choice, kernels)
        if isinstance(axes, Problem):
            problems.append(axes)
            continue
        try:
            variant.check(leaf.shape, axes)
        except SpecError as error:
            problems.append(Problem(path, leaf, choice._replace(axes=axes), str(error)))
            continue
        fitted[path] = Choice(choice.pattern, variant.fitted(leaf.shape, axes), axes)
    refuse(problems, len(chosen))
    return fitted


def refuse(problems: Sequence[Problem], total: int) -> None:
    """Raises one `SpecError` for all problems with a number of leaves, and says what to write; nothing for none."""
    if not problems:
        return
    lines = [f"{_leaf(problem)}: {problem.reason}" for problem in problems]
    advice = dict.fromkeys(problem.advice for problem in problems if problem.advice)
    if (ranks := _ranks_to_write(problems)) is not None:
        advice[ranks] = None
    what = "  " + "\n  ".join(advice) if advice else ""
    if len(lines) == 1:
        raise SpecError(f"Cannot adapt {lines[0]}.\n{what}".rstrip())
    raise SpecError(
        f"Cannot adapt {len(lines)} of the {total} leaves that the spec names:\n"
        f"{listed(lines, most=len(lines))}\n{what}".rstrip()
    )


def resolve(spec: Spec, leaves: Mapping[str, Any], kernels: Mapping[str, Kernel] | None = None) -> dict[str, Choice]:
    """Gives each leaf the variant of the first key that matches it; leaves with None or no match get none.

    Args:
      spec: ordered: pattern or target to variant, or to None for "leave alone".
      leaves: arrays, or their shapes and dtypes, by path.
      kernels: from `lora_jax.kernels`, for targets; or None.

    Raises:
      SpecError: if a rule matches nothing, if earlier rules decide all that it matches, or if nothing is adapted.
    """
    if not isinstance(spec, Mapping):
        raise SpecError(f"Expected a spec, a mapping such as {{'**/kernel': LoRA(rank=8, alpha=16)}}; got {spec!r}.")
    decided: dict[str, Key] = {}
    for pattern, variant in spec.items():
        _check_rule(pattern, variant)
        found = matching_leaves(pattern, leaves, kernels)
        fresh = [path for path in found if path not in decided]
        if not fresh:
            first = dict.fromkeys(key_text(decided[path]) for path in found)
            raise SpecError(
                f"Expected every rule to decide something; {key_text(pattern)} can never act: earlier rules "
                f"decide all {len(found)} leaves that it matches.\n"
                f"  The earlier rules: {', '.join(first)}.\n"
                "  The first match counts: put the narrower rule first, or delete this one."
            )
        decided |= dict.fromkeys(fresh, pattern)
    chosen = {path: (decided[path], spec[decided[path]]) for path in leaves if path in decided}
    adapted = {path: Choice(pattern, variant) for path, (pattern, variant) in chosen.items() if variant is not None}
    if not adapted:
        raise SpecError(f"Expected a spec that adapts at least one leaf; got {dict(spec)!r}.")
    return adapted


def _check_rule(pattern: Key, variant: Any) -> None:
    if variant is not None and not isinstance(variant, Variant):
        raise SpecError(
            f"Expected a variant such as LoRA(rank=8, alpha=16), or None, for {key_text(pattern)}; got {variant!r}."
        )


def _unfit(path: str, leaf: Any, choice: Choice) -> Problem | None:
    """What is wrong with a leaf whatever the roles of its axes are."""
    variant, name = choice.variant, path.split("/")[-1]
    alone = f"Put a rule before it that leaves it alone: {{{path!r}: None}}."
    if not isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct, StoredLeaf)):
        return Problem(path, leaf, choice, f"it is no array, but {leaf!r}", alone)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return Problem(path, leaf, choice, f"it is not floating-point, but {leaf.dtype}", alone)
    if variant.needs_axes and (leaf.ndim < 2 or (name in _VECTORS and variant.axes is None)):
        advice = (
            f"End the pattern in `/kernel`, or put a rule before it: {{{'**/' + name!r}: None}} to leave it alone, "
            "Full() to train it whole."
        )
        return Problem(path, leaf, choice, f"it is a vector, and {variant} is for kernels", advice)
    return None


def _axes_for(path: str, leaf: Any, choice: Choice, kernels: Mapping[str, Kernel] | None) -> str | Problem:
    """The roles of a leaf's axes: from its variant, or from the traced model, or those of a matrix."""
    variant = choice.variant
    if not variant.needs_axes:
        return ""
    if variant.axes is not None:
        if len(variant.axes) == leaf.ndim and set(variant.axes) <= set("bio"):
            return variant.axes
        reason = (
            f"expected a letter for each of its {leaf.ndim} axes (`b` batch, `i` input, `o` output); "
            f"got axes={variant.axes!r}"
        )
        return Problem(path, leaf, choice, reason)
    write = f"{type(variant).__name__}(..., axes=...)"
    if kernels is None:
        if leaf.ndim == 2:
            return "io"
        reason = f"which of its {leaf.ndim} axes are inputs, outputs or batch is not known"
        advice = (
            "Let the model say: init(..., kernels=lora_jax.kernels(apply, params, *args)),\n"
            f"  or say it in the spec: {write}, such as 'ioo' for a query kernel (d, heads, head_dim) or 'bio' for a "
            "stack of layers."
        )
        return Problem(path, leaf, choice, reason, advice)
    again = f"Trace with the parameters that `init` gets, or say the axes in the spec: {write}."
    if path not in kernels:
        return Problem(path, leaf, choice, "`kernels` does not have it", again)
    traced = kernels[path]
    if len(traced.shape) != leaf.ndim:
        return Problem(path, leaf, choice, f"it had shape {traced.shape} when `kernels` was traced", again)
    if traced.axes is None:
        reason = f"the traced model does not say which of its axes are inputs and outputs: {traced.unknown}"
        advice = f"Leave it out of the spec ({{{path!r}: None}}), or say the axes there: {write}."
        if any(use.kind == "opaque" for use in traced.uses):
            advice += f" Then `lora` has to materialize the kernel there: lora(apply, materialize=[{path!r}])."
        return Problem(path, leaf, choice, reason, advice)
    return traced.axes


def _leaf(problem: Problem) -> str:
    shape = getattr(problem.leaf, "shape", None)
    of_shape = "" if shape is None else f" of shape {tuple(shape)}"
    return f"{problem.path!r}{of_shape}, by the rule {key_text(problem.choice.pattern)}"


def _ranks_to_write(problems: Sequence[Problem]) -> str | None:
    """The rules to write where ranks are too large: the same ones with ranks that are clipped, or one for each leaf."""
    clipped, each = {}, {}
    for path, leaf, (pattern, variant, axes), *_ in problems:
        if not isinstance(variant, LowRank) or not {"i", "o"} <= set(axes):
            continue
        if 0 < (most := largest_rank(leaf.shape, axes)) < variant.rank:
            clipped[key_text(pattern)] = dataclasses.replace(variant, clip_rank=True)
            each[repr(path)] = dataclasses.replace(variant, rank=most)
    if not each:
        return None
    always, narrower = (", ".join(f"{at}: {rule}" for at, rule in rules.items()) for rules in (clipped, each))
    return (
        f"Let the rank be at most what a kernel allows: {{{always}}},\n  or put narrower rules first: {{{narrower}}}."
    )
