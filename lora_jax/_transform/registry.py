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
    """Registers how a primitive, or by its name one that JAX keeps to itself, acts on an `AdaptedKernel`.

    The kind says what becomes of the kernel: a low-rank term, a kernel again, or an operand of a function rebuilt
    around it; the first line of the rule's doc-string says how. `docs/rules.md` is made of them.

    The rule is called as `rule(site, *operands, **params)` and names every parameter of its primitive, so that one
    which a new JAX adds is an error and not dropped. It returns what the primitive would: a value, or a list of values.
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
    """The rule of a primitive, if there is one."""
    return RULES[primitive.name][1] if primitive.name in RULES else None


def rules() -> dict[str, tuple[Kind, str]]:
    """For each primitive with a rule: what becomes of a kernel there, and how."""
    return {name: (kind, (inspect.getdoc(function) or "").split("\n")[0]) for name, (kind, function) in RULES.items()}


@functools.cache
def named_by(rule: Rule) -> tuple[list[str], list[str]]:
    """The parameters of a primitive that its rule needs, and those that it takes where they are given."""
    named = [p for p in inspect.signature(rule).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    required = [p.name for p in named if p.default is inspect.Parameter.empty]
    return required, [p.name for p in named if p.name not in required]
