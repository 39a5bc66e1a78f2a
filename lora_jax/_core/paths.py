"""Key paths as text (`encoder/layer_0/query/kernel`), and the patterns that match them.

A box around an array (`nn.Partitioned`, an NNX `Variable`) is not a step of the path: the same layer has the same path
whether its parameters are boxed or not.
"""

from __future__ import annotations

import difflib
import functools
import operator
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax.core import meta
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, PyTreeDef, SequenceKey

from .._errors import AdapterError, LoRAError, SpecError, listed
from .base import StoredLeaf

Pattern = str | re.Pattern[str]


def flatten(tree: Any) -> tuple[dict[str, Any], PyTreeDef]:
    """Flattens a tree into its leaves by path, in the tree's own order.

    Args:
      tree: any pytree; dicts, `FrozenDict`, lists, dataclasses, `nnx.State`, boxed parameters.

    Returns:
      `{path: leaf}`, and the tree's definition, to be used with `unflatten`.

    Raises:
      AdapterError: if two leaves have the same path (an integer key beside its text, or a key that holds `/`).
    """
    leaves: dict[str, Any] = {}
    for keys, leaf in _walk(tree):
        path = "/".join(map(_step, keys))
        if path in leaves:
            raise AdapterError(
                f"Expected every leaf of the tree to have a path of its own; two leaves have the path {path!r}.\n"
                "  Rename one of the keys."
            )
        leaves[path] = leaf
    return leaves, jax.tree_util.tree_structure(tree, is_leaf=_is_stored)


def _walk(tree: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every leaf and the steps to it, those of boxes left out; a box may hold a tree, or another box."""
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)[0]:
        if not _is_box(node):
            yield keys, node
            continue
        parts = jax.tree_util.tree_flatten_with_path(node, is_leaf=functools.partial(operator.is_not, node))[0]
        for own, part in parts:
            for inner, leaf in _walk(part):
                yield (*keys, *(own if len(parts) > 1 else ()), *inner), leaf


def unflatten(treedef: PyTreeDef, leaves: dict[str, Any]) -> Any:
    """Rebuilds the tree that `flatten` took apart, boxes included."""
    return jax.tree_util.tree_unflatten(treedef, list(leaves.values()))


def _is_stored(node: Any) -> bool:
    return isinstance(node, StoredLeaf)


def _is_leaf(node: Any) -> bool:
    return _is_box(node) or _is_stored(node)


def _is_box(node: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")  # without it loaded there is no Variable to meet, and loading it is slow
    return isinstance(node, meta.AxisMetadata) or (nnx is not None and isinstance(node, nnx.Variable))


def _step(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name) | GetAttrKey(name=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
    return str(key)


def matcher(pattern: Pattern) -> re.Pattern[str]:
    """Turns a pattern into the regular expression that a whole path must match.

    `*` is any text within one segment, `**` any number of segments, `{a,b}` either; a compiled expression is kept.

    >>> bool(matcher("**/{query,value}/kernel").fullmatch("encoder/layer_0/query/kernel"))
    True

    Raises:
      SpecError: if braces are not balanced.
    """
    if isinstance(pattern, re.Pattern):
        return pattern
    expression, depth = "", 0
    for token in re.findall(r"\*\*/|/\*\*(?=[,}]|$)|\*\*|\*|[{},]|[^*{},]", pattern):
        match token:
            case "**/":
                expression += r"(?:[^/]+/)*"
            case "/**":
                expression += r"(?:/.*)?"
            case "**":
                expression += r".*"
            case "*":
                expression += r"[^/]*"
            case "{":
                depth, expression = depth + 1, expression + "(?:"
            case "}":
                depth, expression = depth - 1, expression + ")"
            case "," if depth:
                expression += "|"
            case _:
                expression += re.escape(token)
        if depth < 0:
            break
    if depth:
        raise SpecError(f"Expected a pattern with balanced braces; got {pattern!r}.")
    return re.compile(expression)


def pattern_text(pattern: Pattern) -> str:
    """The pattern as the user wrote it."""
    return pattern if isinstance(pattern, str) else pattern.pattern


def matches_any(path: str, patterns: Iterable[Pattern]) -> bool:
    """Whether one of the patterns matches the whole path."""
    return any(matcher(pattern).fullmatch(path) for pattern in patterns)


def matched(
    pattern: Pattern,
    paths: Collection[str],
    expected: str = "every pattern to match a path of the adapter",
    *,
    error: type[LoRAError] = SpecError,
    advice: str = "",
) -> list[str]:
    """The paths that a pattern matches.

    Raises:
      SpecError: or `error`, if there is none: names the nearest paths.
    """
    found = [path for path in paths if matcher(pattern).fullmatch(path)]
    if not found:
        raise error(
            f"Expected {expected}; {pattern_text(pattern)!r} matches none of {len(paths)}.\n"
            f"  The nearest paths:\n{listed(nearest(pattern, list(paths)))}\n  {advice}".rstrip()
        )
    return found


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], *, only_one: str, only_other: str, unlike: str
) -> list[str]:
    """How two mappings differ, a line for each key.

    >>> same = {"only_one": "is gone", "only_other": "is new", "unlike": "was {one} and is {other}"}
    >>> differences({"x": 1, "y": 2}, {"y": 3, "z": 4}, **same)
    ['x is gone', 'z is new', 'y was 2 and is 3']
    """
    gone = [f"{key} {only_one}" for key in one if key not in other]
    new = [f"{key} {only_other}" for key in other if key not in one]
    changed = [key for key, value in one.items() if other.get(key, value) != value]
    return [*gone, *new, *(f"{key} {unlike.format(one=one[key], other=other[key])}" for key in changed)]


def nearest(pattern: Pattern, paths: Sequence[str], most: int = 3) -> list[str]:
    """The paths that look most like a pattern, best first: what the user may have meant."""
    wanted = pattern_text(pattern).strip("*/")
    tails = {path: "/".join(path.split("/")[-(wanted.count("/") + 1) :]) for path in paths}
    score = {path: difflib.SequenceMatcher(None, wanted, tail).ratio() for path, tail in tails.items()}
    return sorted(paths, key=lambda path: -score[path])[:most]
