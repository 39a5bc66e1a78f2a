"""`Stack` and `Member`: several adapters as one pytree, and one of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from .._core import display
from .._core.adapter import Adapter
from .._core.table import Table, Tabular
from .._core.values import on_host
from ._variant import ABSENT, Padded, join, split, with_rank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Settings:
    """The hyperparameters of one leaf as arrays, so that others compile nothing. All are 0 for a leaf of the base.

    Attributes:
      scale: s, a scalar in JAX's default floating-point dtype.
      kind: int32, which of the variants that can share a stack.
      rank: int32, r before padding.
      alpha: uint32 of shape (2,): the bits of α in float64, so that `unstack` returns it exactly.
    """

    scale: Any
    kind: Any
    rank: Any
    alpha: Any

    @classmethod
    def of(cls, part: Adapter | None) -> Self:
        """Returns the hyperparameters of a leaf, or those of a leaf of the base if it is None."""
        kind, rank, alpha, scale = (ABSENT, 0, 0.0, 0.0) if part is None else split(part.variant)[1:]
        dtype = jnp.result_type(float)
        bits = np.array([alpha], np.float64).view(np.uint32)
        return cls(np.asarray(scale, dtype), np.int32(kind), np.int32(rank), bits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Member(Mapping[str, Adapter]):
    """One adapter of a stack, with padded ranks; or several along a leading axis, for `vmap`.

    As a mapping from paths to `Adapter`s, it is the adapter that `lora(apply)`, `merge` and `explain` accept. Only
    `trainable` is to be differentiated and optimized: the rest is integers and scales. Under `jax.vmap` over a stack:

        def step(member, state, batch):
            loss = lambda trainable: loss_fn(params, member.replace(trainable), batch)
            grads = jax.grad(loss)(member.trainable)
            updates, state = tx.update(grads, state, member.trainable)
            return member.replace(optax.apply_updates(member.trainable, updates)), state

    Attributes:
      trainable: `{path: Adapter}`, the trainable arrays: `a`, (batch…, in…, padded rank), and so on. Padding is zero,
        has a gradient of zero, and stays zero.
      settings: `{path: Settings}`, the scales and ranks.
    """

    trainable: dict[str, Adapter]
    settings: dict[str, Settings]

    def replace(self, trainable: dict[str, Adapter]) -> Self:
        """Returns a member with other trainable arrays."""
        return dataclasses.replace(self, trainable=trainable)

    def __getitem__(self, path: str) -> Adapter:
        part, settings = self.trainable[path], self.settings[path]
        assert isinstance(part.variant, Padded)
        scalars = {name: getattr(settings, name) for name in part.variant.scalars}
        return Adapter(part.variant, part.axes, **part.arrays, **scalars)

    def __iter__(self) -> Iterator[str]:
        return iter(self.trainable)

    def __len__(self) -> int:
        return len(self.trainable)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Stack(Tabular):
    """Several adapters of one base, as one pytree. `stack` makes it.

    Attributes:
      members: all adapters; each array has a leading axis, one element per name.
      names: of the adapters, in this order. Static: a stack with other names is another program.
    """

    members: Member
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        return f"Stack({', '.join(map(repr, self.names))}; {len(self.members)} leaves)"

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        summary = f"{len(self.names)} adapters, {len(self.members)} leaves"
        return display.tree_node(self, summary, vars(self), path, subtree_renderer)

    def _table(self) -> Table:
        parts, settings = self.members.trainable, self.members.settings
        if not all(map(display.is_readable, jax.tree.leaves(settings))):
            return Table(
                ["adapter"], [[name] for name in self.names], notes=["Without values, the ranks are not known."]
            )
        settings = {path: jax.tree.map(on_host, found) for path, found in settings.items()}
        rows = []
        for index, name in enumerate(self.names):
            adapter = {
                path: jax.eval_shape(functools.partial(part_of, settings=found, index=index), parts[path])
                for path, found in settings.items()
                if found.kind[index] != ABSENT
            }
            rows.append([name, *display.cells(adapter).values()])
        note = f"{len(self.members)} leaves, padded to the largest ranks: {display.cells(parts)['memory']}"
        return Table(["adapter", *display.cells({})], rows, {"leaves", "memory"}, [note])

    def replace(self, members: Member) -> Self:
        """Returns a stack with other members, such as after a training step."""
        return dataclasses.replace(self, members=members)


def part_of(part: Adapter, settings: Settings, index: int) -> Adapter:
    """Returns one adapter's leaf of the leaf of a stack: without padding, with its own variant."""
    assert isinstance(part.variant, Padded)
    alpha = float(np.ascontiguousarray(settings.alpha[index], np.uint32).view(np.float64)[0])
    rank = int(settings.rank[index])
    variant = join(part.variant.variant, int(settings.kind[index]), rank, alpha)
    names = variant.layout(part.axes)
    arrays = {}
    for name, array in part.arrays.items():
        if names and name not in names:  # the magnitude of DoRA, in a leaf of LoRA
            continue
        shape = with_rank(part.variant, part.axes, name, array.shape[1:], rank)
        arrays[name] = array[index][tuple(slice(size) for size in shape)]
    return Adapter(variant, part.axes, **arrays)
