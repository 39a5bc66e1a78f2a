"""The rules by primitive: how each operation acts on an adapted kernel."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

from .._compat import Primitive

Rule = Callable[..., Any]
Kind = typing.Literal["low-rank", "moved", "rebuilt"]

RULES: dict[str, tuple[Kind, Rule]] = {}


def rule(primitive: Primitive | str, kind: Kind) -> Callable[[Rule], Rule]:
    """Registers how a primitive acts on an `AdaptedKernel`.

    The rule is called as `rule(site, *operands, **params)` and returns what the primitive returns: a value, or a list
    of values. It names every parameter of its primitive, so that a parameter that a new JAX adds is an error.

    Args:
      primitive: the primitive, or its name if JAX does not export it.
      kind: whether the result has a low-rank term, is a kernel again, or is that of a rebuilt function. `docs/rules.md`
        lists the rules by kind, with the first lines of their docstrings.
    """

    name = primitive if isinstance(primitive, str) else primitive.name

    def register(function: Rule) -> Rule:
        if name in RULES:
            _, old = RULES[name]
            raise ValueError(f"`{name}` already has a rule: {old.__module__}.{old.__name__}.")
        RULES[name] = kind, function
        return function

    return register


def rule_of(primitive: Primitive) -> Rule | None:
    """Returns the rule of a primitive, or None."""
    return RULES[primitive.name][1] if primitive.name in RULES else None


def rules() -> dict[str, tuple[Kind, str]]:
    """Returns the kind and the first line of the docstring of each rule, by primitive."""
    return {name: (kind, (inspect.getdoc(function) or "").split("\n")[0]) for name, (kind, function) in RULES.items()}


@functools.cache
def parameter_names(rule: Rule) -> tuple[list[str], list[str]]:
    """Returns the names of the parameters that a rule requires, and of those that it accepts."""
    named = [p for p in inspect.signature(rule).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    required = [p.name for p in named if p.default is inspect.Parameter.empty]
    return required, [p.name for p in named if p.name not in required]
