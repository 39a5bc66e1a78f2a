"""A tree of adapters, each a change of its parent."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from .._core import display
from .._core.adapter import Adapter, Adapters, check_adapter
from .._core.table import Table, Tabular
from .._errors import AdapterError
from ._combine.combine import combine
from ._select import BASE, index_of

_INDENT = 2 * "\N{NO-BREAK SPACE}"  # HTML drops other spaces


class Walk(NamedTuple):
    """The way from one node of a tree to another, through their lowest common ancestor.

    Attributes:
      up: the nodes whose adapters are removed, in this order.
      down: the nodes whose adapters are merged, in this order.
    """

    up: tuple[str, ...]
    down: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Tree(Tabular):
    """Adapters by name, each a change of its parent's weights. `tree` makes it. The root is the base, `BASE`.

    Attributes:
      parents: the name of the parent of each node.
      adapters: the adapter of each node.
    """

    parents: Mapping[str, str]
    adapters: Mapping[str, Adapters]

    def __repr__(self) -> str:
        return f"Tree({', '.join(f'{name!r} of {parent!r}' for name, parent in self.parents.items())})"

    def _table(self) -> Table:
        children: dict[str, list[str]] = {}
        for name, parent in self.parents.items():
            children.setdefault(parent, []).append(name)

        def below(parent: str, prefix: str) -> Iterator[list[str]]:
            for name in (names := children.get(parent, [])):
                is_last = name == names[-1]
                yield [prefix + ("└ " if is_last else "├ ") + name, *display.cells(self.adapters[name]).values()]
                yield from below(name, prefix + (_INDENT if is_last else "│ "))

        rows = [[BASE, "", "", ""], *below(BASE, "")]
        return Table(["adapter", *display.cells({})], rows, {"leaves", "memory"})

    def path(self, name: str) -> tuple[str, ...]:
        """Returns the nodes from below the base to a node; none for the base.

        Raises:
          AdapterError: for an unknown name.
        """
        names: list[str] = []
        while name != BASE:
            index_of(list(self.parents), name)
            names.append(name)
            name = self.parents[name]
        return tuple(reversed(names))

    def walk(self, start: str, end: str) -> Walk:
        """Returns the way from one node to another.

        Raises:
          AdapterError: for an unknown name.
        """
        up, down = self.path(start), self.path(end)
        common = len(set(up) & set(down))  # ancestors of both, which both paths begin with
        return Walk(tuple(reversed(up[common:])), down[common:])

    def adapter(self, name: str) -> dict[str, Adapter]:
        """Returns the adapter of the base that all adapters down to a node amount to, by concatenation.

        It serves a node without merging, as in `stack`. The rank at a path is the sum of their ranks.

        Raises:
          AdapterError: for an unknown name, or if the adapters cannot be combined: those of DoRA and `Full` depend on
            the weights of the parent.
        """
        names = self.path(name)
        return combine({node: (self.adapters[node], 1.0) for node in names}, "concat") if names else {}


def tree(nodes: Mapping[str, tuple[str, Adapters]]) -> Tree:
    """Makes a tree of adapters, each of which was trained on the merged weights of its parent.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> make = lambda seed: lj.init(jax.random.key(seed), params, {"kernel": lj.LoRA(rank=1, alpha=1)})
    >>> nodes = {"chat": ("base", make(0)), "polite": ("chat", make(1)), "code": ("base", make(2))}
    >>> lj.many.tree(nodes).walk("polite", "code")
    Walk(up=('polite', 'chat'), down=('code',))

    Args:
      nodes: from names to the name of the parent, `BASE` for the base, and the adapter.

    Returns:
      The tree.

    Raises:
      AdapterError: for a name that is not a string or is `BASE`, a parent that does not exist, a cycle, or a node that
        is not a pair of a parent and an adapter.
    """
    for name, given in nodes.items():
        if not isinstance(name, str) or name == BASE:
            raise AdapterError(f"Expected strings other than {BASE!r}, which is the base, as names; got {name!r}.")
        if not isinstance(given, tuple) or len(given) != 2:
            raise AdapterError(f"Expected (parent, adapter) at {name!r}; got {type(given).__name__}.")
        check_adapter(given[1], f"Pass {{{name!r}: (parent, adapter), …}}.")
        if given[0] != BASE:
            index_of(list(nodes), given[0])
    parents = {name: parent for name, (parent, _) in nodes.items()}
    for name in parents:
        seen, node = [name], parents[name]
        while node != BASE:
            if node in seen:
                raise AdapterError(
                    f"Expected a tree with the root {BASE!r}; got a cycle: {' of '.join(map(repr, [*seen, node]))}."
                )
            seen.append(node)
            node = parents[node]
    return Tree(parents, {name: adapter for name, (_, adapter) in nodes.items()})
