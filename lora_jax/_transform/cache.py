"""Caches rebuilt control flow, which a second call outside `jit` would otherwise rebuild and compile again."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax

from .._compat import user_line

Function = Callable[..., Any]


class ProgramCache:
    """A least-recently-used cache of the functions that were rebuilt for one adapted function.

    It is deleted with the adapted function, and with it the programs, their constants and their executables.
    """

    def __init__(self, max_size: int = 1024) -> None:
        self._functions: collections.OrderedDict[Hashable, Function] = collections.OrderedDict()
        self._max_size = max_size

    def get(self, key: Hashable, build: Callable[[], Function]) -> Function:
        """Returns the function that was built for an equal key, or builds it."""
        if key not in self._functions:
            self._functions[key] = build()
        self._functions.move_to_end(key)
        while len(self._functions) > self._max_size:
            self._functions.popitem(last=False)
        return self._functions[key]


def cached(rule: Function) -> Function:
    """Decorates a rule so that JAX receives the same function for the same equation in every call.

    JAX caches the jaxprs of inner functions, so the parameters of the equation are the same from call to call.
    """

    @functools.wraps(rule)
    def run(site: Any, *operands: Any, **params: Any) -> Any:
        def build() -> Function:
            # Inlined, so that the jaxpr of a surrounding trace does not contain the call.
            return jax.jit(lambda *operands: rule(site, *operands, **params), inline=True)

        # The key has everything that the rule reads from its site.
        key = (rule, user_line(site.eqn), *params.items())
        function = site.settings.cached_function(key, build)
        return rule(site, *operands, **params) if function is None else function(*operands)

    return run
