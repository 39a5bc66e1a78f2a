"""Rebuilt control flow, kept: outside `jit`, a second call would rebuild it, and JAX would compile it, again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from .._compat import user_line
from .._sizes import is_known
from ._interpreter import Rule, Site, Value
from ._settings import Settings


def kept(rule: Rule) -> Rule:
    """Makes of a rule one that gives JAX the same function for the same equation each time.

    JAX keeps the jaxprs of inner functions, so that the parameters of the equation are the same from call to call.
    """

    @functools.wraps(rule)
    def run(site: Site, *operands: Value, **params: Any) -> list[Value]:
        # A watched body has to be traced each time, or the log would miss it.
        # Symbolic lengths of two exports cannot be compared, as they would be in a cache.
        if site.settings.log is not None or not all(map(is_known, params.values())):
            return rule(site, *operands, **params)
        key = _Key(site.settings, user_line(site.eqn), site)
        return _function(rule, key, tuple(params.items()))(*operands)

    return run


@dataclasses.dataclass(frozen=True)
class _Key:
    """What a rule reads of its site; equations that agree in it are rebuilt as the first of them was."""

    settings: Settings
    line: str
    site: Site = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=1024)
def _function(rule: Rule, key: _Key, params: tuple[tuple[str, Any], ...]) -> Callable[..., list[Value]]:
    # Inlined: where the call is traced, nothing shows of it.
    return jax.jit(lambda *operands: rule(key.site, *operands, **dict(params)), inline=True)
