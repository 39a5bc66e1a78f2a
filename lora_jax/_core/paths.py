"""Key paths as text (`encoder/layer_0/query/kernel`), and patterns that match them.

A box around an array (`nn.Partitioned`, an NNX `Variable`) adds no segment to the path: a layer has the same path with
and without boxes.
"""

from __future__ import annotations

import contextlib
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

from .._errors import AdapterError, LoRAError, SpecError, counted, listed
from .stored import StoredLeaf

Pattern = str | re.Pattern[str]
Patterns = Pattern | Sequence[Pattern]


def flatten(tree: Any) -> tuple[dict[str, Any], PyTreeDef]:
    """Flattens a tree to a dict of its leaves by path, in the order of `jax.tree.flatten`.

    Args:
      tree: any pytree: dicts, `FrozenDict`, lists, dataclasses, `nnx.State`, boxed parameters.

    Returns:
      `{path: leaf}`, and the treedef for `unflatten`.

    Raises:
      AdapterError: if two leaves have the same path (keys `1` and `"1"`, or a key that contains `/`).
    """
    leaves: dict[str, Any] = {}
    for keys, leaf in _walk(tree):
        path = "/".join(map(_step, keys))
        if path in leaves:
            raise AdapterError(
                f"Expected every leaf of the tree to have a different path; two leaves have the path {path!r}.\n"
                "  Rename one of the keys."
            )
        leaves[path] = leaf
    return leaves, jax.tree_util.tree_structure(tree, is_leaf=_is_stored)


def _walk(tree: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields each leaf with its key path, without keys of boxes. A box may contain a tree, or another box."""
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)[0]:
        if not _is_box(node):
            yield keys, node
            continue
        parts = jax.tree_util.tree_flatten_with_path(node, is_leaf=functools.partial(operator.is_not, node))[0]
        for part_keys, part in parts:
            for inner_keys, leaf in _walk(part):
                yield (*keys, *(part_keys if len(parts) > 1 else ()), *inner_keys), leaf


def unflatten(treedef: PyTreeDef, leaves: dict[str, Any]) -> Any:
    """Rebuilds the tree from the results of `flatten`, including boxes."""
    return jax.tree_util.tree_unflatten(treedef, list(leaves.values()))


def _is_stored(node: Any) -> bool:
    return isinstance(node, StoredLeaf)


def _is_leaf(node: Any) -> bool:
    return _is_box(node) or _is_stored(node)


def _is_box(node: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")  # importing it is slow, and without it there are no Variables
    return isinstance(node, meta.AxisMetadata) or (nnx is not None and isinstance(node, nnx.Variable))


def _step(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name) | GetAttrKey(name=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
    return str(key)


def matcher(pattern: Pattern) -> re.Pattern[str]:
    """Converts a pattern to a regular expression for the whole path.

    `*` matches any text within one segment, `**` any number of segments, `{a,b}` either name. A compiled regular
    expression is returned unchanged.

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


def as_tuple(patterns: Patterns) -> tuple[Pattern, ...]:
    """Returns one pattern, or several, as a tuple."""
    return tuple(patterns) if isinstance(patterns, Sequence) and not isinstance(patterns, str) else (patterns,)


def pattern_text(pattern: Pattern) -> str:
    """Returns the pattern as the user wrote it."""
    return pattern if isinstance(pattern, str) else pattern.pattern


def matches_any(path: str, patterns: Iterable[Pattern]) -> bool:
    """Whether one of the patterns matches the whole path."""
    return any(matcher(pattern).fullmatch(path) for pattern in patterns)


def matching_paths(
    pattern: Pattern,
    paths: Collection[str],
    expected: str = "every pattern to match a path of the adapter",
    *,
    error: type[LoRAError] = SpecError,
    advice: str = "",
) -> list[str]:
    """Returns the paths that a pattern matches.

    Raises:
      SpecError: or `error`, if no path matches; with a similar pattern that does, or the nearest paths.
    """
    found = [path for path in paths if matcher(pattern).fullmatch(path)]
    if not found:
        similar = _similar_pattern(pattern, paths) if isinstance(pattern, str) else None
        near = f"The nearest paths:\n{listed(nearest(pattern, list(paths)))}"
        raise error(
            f"Expected {expected}; {pattern_text(pattern)!r} matches none of {len(paths)}.\n"
            f"  {similar or near}\n  {advice}".rstrip()
        )
    return found


def _similar_pattern(pattern: str, paths: Collection[str]) -> str | None:
    """Returns a sentence with a pattern that matches, for one that lacks an end or has another syntax."""
    for glob in dict.fromkeys((pattern, pattern.replace(".", "/"))):
        rooted = glob if glob.startswith("**/") else f"**/{glob}"
        for candidate in (glob, rooted, f"{rooted}/kernel", f"{rooted}/**"):
            if count := sum(map(bool, map(matcher(candidate).fullmatch, paths))):
                return f"A pattern is for a whole path, with slashes: {candidate!r} matches {counted(count, 'path')}."
    with contextlib.suppress(re.error):
        if any(map(re.compile(pattern).fullmatch, paths)):
            return f"A string is a glob; for a regular expression, compile it: re.compile({pattern!r})."
    return None


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], *, only_one: str, only_other: str, unlike: str
) -> list[str]:
    """Describes the differences of two mappings, one line per key.

    >>> same = {"only_one": "is gone", "only_other": "is new", "unlike": "was {one} and is {other}"}
    >>> differences({"x": 1, "y": 2}, {"y": 3, "z": 4}, **same)
    ['x is gone', 'z is new', 'y was 2 and is 3']
    """
    gone = [f"{key} {only_one}" for key in one if key not in other]
    new = [f"{key} {only_other}" for key in other if key not in one]
    changed = [key for key, value in one.items() if other.get(key, value) != value]
    return [*gone, *new, *(f"{key} {unlike.format(one=one[key], other=other[key])}" for key in changed)]


def nearest(pattern: Pattern, paths: Sequence[str], most: int = 3) -> list[str]:
    """Returns the paths that are most similar to a pattern, best first."""
    wanted = pattern_text(pattern).strip("*/")
    tails = {path: "/".join(path.split("/")[-(wanted.count("/") + 1) :]) for path in paths}
    score = {path: difflib.SequenceMatcher(None, wanted, tail).ratio() for path, tail in tails.items()}
    return sorted(paths, key=lambda path: -score[path])[:most]
