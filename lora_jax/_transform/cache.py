"""Rebuilt control flow, kept: outside `jit`, a second call would rebuild it, and JAX would compile it, again."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax

from .._compat import user_line

Function = Callable[..., Any]


class ProgramCache:
    """The functions that were rebuilt for one adapted function, the last used of them.

    It lives as long as the adapted function: with that, its programs, their constants and what was compiled go.
    """

    def __init__(self, most: int = 1024) -> None:
        self._functions: collections.OrderedDict[Hashable, Function] = collections.OrderedDict()
        self._most = most

    def get(self, key: Hashable, build: Callable[[], Function]) -> Function:
        """The function that was built for an equal key, or a new one."""
        if key not in self._functions:
            self._functions[key] = build()
        self._functions.move_to_end(key)
        while len(self._functions) > self._most:
            self._functions.popitem(last=False)
        return self._functions[key]


def cached(rule: Function) -> Function:
    """Makes of a rule one that gives JAX the same function for the same equation each time.

    JAX keeps the jaxprs of inner functions, so that the parameters of the equation are the same from call to call.
    """

    @functools.wraps(rule)
    def run(site: Any, *operands: Any, **params: Any) -> Any:
        def build() -> Function:
            # Inlined: where the call is traced, nothing shows of it.
            return jax.jit(lambda *operands: rule(site, *operands, **params), inline=True)

        # What the rule reads of its site: equations that agree in it are rebuilt as the first of them was.
        key = (rule, user_line(site.eqn), *params.items())
        function = site.settings.rebuilt(key, build)
        return rule(site, *operands, **params) if function is None else function(*operands)

    return run
