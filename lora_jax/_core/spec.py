"""Resolves a spec to a variant for each leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import SpecError, listed
from .stored import StoredLeaf
from .targets import Key, Rules, key_text, matching_leaves
from .uses import Kernel
from .variant import LowRank, Variant, largest_rank

Spec = Rules[Variant | None]

_VECTORS = {"bias", "scale", "mean", "var"}  # names of vectors in Flax, which a scan stacks into matrices


class Choice(NamedTuple):
    """The variant that a spec selects for one leaf.

    Attributes:
      pattern: the key of the rule that decides, a pattern or a target.
      variant: the variant or format of the rule; after `fit`, that for the leaf.
      axes: the roles of the leaf's axes; empty if the variant does not need them, and before `fit`.
    """

    pattern: Key
    variant: Any
    axes: str = ""


class Problem(NamedTuple):
    """Why one leaf cannot be adapted as a spec says.

    Attributes:
      path: the path of the leaf.
      leaf: the leaf.
      choice: what the spec selects for it.
      reason: what was expected and what was got.
      advice: what to do; the same text for leaves with the same problem, so that it is shown once.
    """

    path: str
    leaf: Any
    choice: Choice
    reason: str
    advice: str = ""


def spec(kernels: Mapping[str, Kernel], rules: Spec) -> dict[str, Variant]:
    """Expands a spec to exact paths and the roles of axes, to be printed, edited or stored.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params = {"query": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))}
    >>> apply = lambda p, x: jnp.einsum("td,dhk->thk", x, p["query"]) + p["bias"]
    >>> kernels = lj.kernels(apply, params, jnp.ones((5, 8)))
    >>> lj.spec(kernels, {"query": lj.LoRA(rank=2, alpha=4), lj.targets.biases: lj.Full()})
    {'bias': Full(), 'query': LoRA(rank=2, alpha=4, axes='ioo')}

    Args:
      kernels: from `kernels(apply, params, *args)`.
      rules: a spec, as for `init`.

    Returns:
      `{path: variant}`, a spec for which `init` does not need `kernels=`.

    Raises:
      SpecError: if `init` would raise it.
    """
    leaves = {path: jax.ShapeDtypeStruct(kernel.shape, kernel.dtype) for path, kernel in kernels.items()}
    return {
        path: dataclasses.replace(variant, axes=axes) if variant.needs_axes else variant
        for path, (_, variant, axes) in fit(rules, leaves, kernels).items()
    }


def fit(
    spec: Rules[Any],
    leaves: Mapping[str, Any],
    kernels: Mapping[str, Kernel] | None,
    only: Collection[str] | None = None,
    *,
    kind: Any = Variant,
) -> dict[str, Choice]:
    """Returns the variant and the roles of the axes for each leaf that the spec adapts.

    Args:
      spec: ordered mapping from patterns and targets to variants, or to None for "leave frozen".
      leaves: arrays, or their shapes and dtypes, by path.
      kernels: from `lora_jax.kernels`, for the roles of axes and for targets; or None.
      only: the paths to consider; None for all.
      kind: the class of the spec's values, `Variant` or `Format`.

    Raises:
      SpecError: from `resolve`; or one error for all leaves that cannot be adapted as the spec says.
    """
    resolved = resolve(spec, leaves, kernels, kind=kind)
    chosen = {path: choice for path, choice in resolved.items() if only is None or path in only}
    problems, fitted = [], {}
    for path, choice in chosen.items():
        leaf, variant = leaves[path], choice.variant
        if (problem := _problem_with_leaf(path, leaf, choice)) is not None:
            problems.append(problem)
            continue
        axes = _axes_for(path, leaf, choice, kernels)
        if isinstance(axes, Problem):
            problems.append(axes)
            continue
        try:
            variant.check(leaf.shape, axes)
        except SpecError as error:
            problems.append(Problem(path, leaf, choice._replace(axes=axes), str(error), kind.advice))
            continue
        fitted[path] = Choice(choice.pattern, variant.fitted(leaf.shape, axes), axes)
    refuse(problems, len(chosen), kind.verb)
    return fitted


def refuse(problems: Sequence[Problem], total: int, verb: str = Variant.verb) -> None:
    """Raises one `SpecError` for all problems, with advice; returns if there are none. `total` counts the leaves."""
    if not problems:
        return
    lines = [f"{_leaf_text(problem)}: {problem.reason}" for problem in problems]
    advice = dict.fromkeys(problem.advice for problem in problems if problem.advice)
    if (rank_advice := _rank_advice(problems)) is not None:
        advice[rank_advice] = None
    advice_text = "  " + "\n  ".join(advice) if advice else ""
    if len(lines) == 1:
        raise SpecError(f"Cannot {verb} {lines[0]}.\n{advice_text}".rstrip())
    raise SpecError(
        f"Cannot {verb} {len(lines)} of the {total} leaves that the spec matches:\n"
        f"{listed(lines, most=len(lines))}\n{advice_text}".rstrip()
    )


def resolve(
    spec: Rules[Any],
    leaves: Mapping[str, Any],
    kernels: Mapping[str, Kernel] | None = None,
    *,
    kind: Any = Variant,
) -> dict[str, Choice]:
    """Returns the variant of the first matching key for each leaf; omits leaves with None or without a match.

    Args:
      spec: ordered mapping from patterns and targets to variants, or to None for "leave frozen".
      leaves: arrays, or their shapes and dtypes, by path.
      kernels: from `lora_jax.kernels`, for targets; or None.
      kind: the class of the spec's values, `Variant` or `Format`.

    Raises:
      SpecError: if a rule matches nothing, if earlier rules match all its leaves, or if no leaf is adapted.
    """
    if not isinstance(spec, Mapping):
        raise SpecError(f"Expected a spec, a mapping such as {{'**/kernel': {kind.example}}}; got {spec!r}.")
    decided: dict[str, Choice] = {}
    for pattern, variant in spec.items():
        if variant is not None and not isinstance(variant, kind):
            raise SpecError(
                f"Expected a {kind.noun} such as {kind.example}, or None, for {key_text(pattern)}; got {variant!r}."
            )
        found = matching_leaves(pattern, leaves, kernels)
        undecided = [path for path in found if path not in decided]
        if not undecided:
            earlier = dict.fromkeys(key_text(decided[path].pattern) for path in found)
            raise SpecError(
                f"Expected every rule to have an effect; {key_text(pattern)} has none, because earlier rules match "
                f"{f'all {len(found)} leaves' if len(found) > 1 else 'the only leaf'} that it matches.\n"
                f"  The earlier rules: {', '.join(earlier)}.\n"
                "  The first match decides: put the more specific rule first, or delete this one."
            )
        decided |= dict.fromkeys(undecided, Choice(pattern, variant))
    adapted = {path: decided[path] for path in leaves if path in decided and decided[path].variant is not None}
    if not adapted:
        raise SpecError(f"Expected a spec that {kind.verb}s at least one leaf; got {dict(spec)!r}.")
    return adapted


def _problem_with_leaf(path: str, leaf: Any, choice: Choice) -> Problem | None:
    """Returns a problem that does not depend on the roles of the leaf's axes, or None."""
    variant, name = choice.variant, path.split("/")[-1]
    freeze = f"Put a rule before it that leaves it frozen: {{{path!r}: None}}."
    if not isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct, StoredLeaf)):
        return Problem(path, leaf, choice, f"it is not an array, but {leaf!r}", freeze)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return Problem(path, leaf, choice, f"it is not floating-point, but {leaf.dtype}", freeze)
    if variant.needs_axes and (leaf.ndim < 2 or (name in _VECTORS and variant.axes is None)):
        advice = f"End the pattern in `/kernel`, or put a rule before it: {{{'**/' + name!r}: None}} to leave it frozen"
        advice += ", Full() to train all of it." if isinstance(variant, Variant) else "."
        return Problem(path, leaf, choice, f"it is a vector, and {variant} is for kernels", advice)
    return None


def _axes_for(path: str, leaf: Any, choice: Choice, kernels: Mapping[str, Kernel] | None) -> str | Problem:
    """Returns the roles of a leaf's axes, from the variant, the traced model, or `io` for a matrix."""
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
    variant_text = f"{type(variant).__name__}(..., axes=...)"
    if kernels is None:
        if leaf.ndim == 2:
            return "io"
        reason = f"which of its {leaf.ndim} axes are inputs, outputs or batch is not known"
        advice = (
            f"Read the axes from the model: {variant.function}(..., kernels=lora_jax.kernels(apply, params, *args)),\n"
            f"  or write them in the spec: {variant_text}, such as 'ioo' for a query kernel (d, heads, head_dim) or "
            "'bio' for a stack of layers."
        )
        return Problem(path, leaf, choice, reason, advice)
    retrace = (
        f"Trace with the parameters that `{variant.function}` gets, or write the axes in the spec: {variant_text}."
    )
    if path not in kernels:
        return Problem(path, leaf, choice, "it is not in `kernels`", retrace)
    traced = kernels[path]
    if len(traced.shape) != leaf.ndim:
        return Problem(path, leaf, choice, f"it had shape {traced.shape} when `kernels` was traced", retrace)
    if traced.axes is None:
        reason = f"the traced model does not determine which of its axes are inputs and outputs: {traced.unknown}"
        advice = f"Leave it out of the spec ({{{path!r}: None}}), or write the axes there: {variant_text}."
        if any(use.kind == "opaque" for use in traced.uses):
            advice += f" Then `lora` must be allowed to materialize it: lora(apply, materialize=[{path!r}])."
        return Problem(path, leaf, choice, reason, advice)
    return traced.axes


def _leaf_text(problem: Problem) -> str:
    shape = getattr(problem.leaf, "shape", None)
    shape_text = "" if shape is None else f" of shape {tuple(shape)}"
    return f"{problem.path!r}{shape_text}, by the rule {key_text(problem.choice.pattern)}"


def _rank_advice(problems: Sequence[Problem]) -> str | None:
    """Suggests rules for leaves whose rank is too large: with `clip_rank`, or with a smaller rank for each leaf."""
    clipped, smaller = {}, {}
    for path, leaf, (pattern, variant, axes), *_ in problems:
        if not isinstance(variant, LowRank) or not {"i", "o"} <= set(axes):
            continue
        if 0 < (most := largest_rank(leaf.shape, axes)) < variant.rank:
            clipped[key_text(pattern)] = dataclasses.replace(variant, clip_rank=True)
            smaller[repr(path)] = dataclasses.replace(variant, rank=most)
    if not smaller:
        return None
    by_rule, by_leaf = (", ".join(f"{key}: {rule}" for key, rule in rules.items()) for rules in (clipped, smaller))
    return (
        f"Reduce the rank to what each kernel allows: {{{by_rule}}},\n"
        f"  or put more specific rules first: {{{by_leaf}}}."
    )
