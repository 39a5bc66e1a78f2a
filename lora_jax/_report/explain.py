"""The table to read before a run: what is trained, how the model consumes it, what it costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from .._core.adapter import Adapter, Adapters
from .._core.attach import attach, check
from .._core.base import base_of
from .._core.kernel import PlainKernel
from .._core.paths import Pattern, flatten
from .._core.sizes import count_text, is_known
from .._core.uses import Use
from .._core.variant import LowRank
from .._errors import AdapterError, listed
from .._transform.contraction.costs import FormName
from .._transform.program import Program, trace, watch
from .._transform.refusal import Refusal, error, to_list
from .._transform.settings import settings_of
from ..sharding import placements
from .flops import operations
from .table import as_html, as_text, size


@dataclasses.dataclass(frozen=True)
class Row:
    """One adapted leaf.

    Attributes:
      path: of the leaf.
      shape: of the leaf.
      axes: the role of each of its axes; empty where they play no part.
      variant: such as `LoRA`.
      rank: None where there is none.
      scale: what `A·B` is multiplied with; None where there is none.
      used: how the model consumes it, such as `"factored dot_general ×2"`, or `"never used"`.
      parameters: how many numbers are trained for it.
      operations: floating-point operations that it adds to one forward call.
      placed: how its arrays are cut, such as `"a 64@fsdp×8, b 8×32@model"`; empty without shardings.
    """

    path: str
    shape: tuple[int, ...]
    axes: str
    variant: str
    rank: int | None
    scale: float | None
    used: str
    parameters: int
    operations: int
    placed: str = ""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a table, and shows as one in a notebook.

    Attributes:
      rows: one for each adapted leaf.
      base_parameters: how many numbers `params` holds.
      base_operations: floating-point operations of one forward call without the adapter; None if the model has some
        that shapes do not tell, such as a Fourier transform.
      adapter_bytes: of all the adapter's arrays.
      optimiser_bytes: of the optimiser's state for them.
      optimiser: whose state that is.
      undivided: what is on every device although its base is cut there, in words.
      refused: which kernels `lora` would refuse, and what would allow them, in words.
    """

    rows: tuple[Row, ...]
    base_parameters: int
    base_operations: int | None
    adapter_bytes: int
    optimiser_bytes: int
    optimiser: str
    undivided: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(row.parameters for row in self.rows)

    @property
    def operations(self) -> int:
        """Floating-point operations that the adapter adds to one forward call."""
        return sum(row.operations for row in self.rows)

    def __str__(self) -> str:
        head, *rows = self._table()
        return "\n".join([as_text(head, rows, numbers=_NUMBERS), "", *self._totals()])

    def _repr_html_(self) -> str:
        head, *rows = self._table()
        return as_html(head, rows, self._totals())

    def _table(self) -> list[list[str]]:
        """The cells by row, the header first; without shardings there is no last column."""
        cells = [_HEADER, *map(self._cells, self.rows)]
        return cells if any(row.placed for row in self.rows) else [row[:-1] for row in cells]

    def _cells(self, row: Row) -> list[str]:
        return [
            row.path,
            "×".join(map(str, row.shape)),
            row.axes or "-",
            row.variant,
            "-" if row.rank is None else str(row.rank),
            "-" if row.scale is None else f"{row.scale:g}",
            row.used,
            f"{row.parameters:,}",
            f"{row.parameters / self.base_parameters:.3%}",
            count_text(row.operations),
            row.placed,
        ]

    def _totals(self) -> list[str]:
        if self.base_operations is None:
            share = "the base's cannot be told from shapes"
        elif not is_known(self.base_operations) or not is_known(self.operations):
            share = f"the base's are {count_text(self.base_operations)}"
        else:
            share = f"{self.operations / max(self.base_operations, 1):.2%} of the base's {self.base_operations:,}"
        return [
            f"trainable: {self.parameters:,} numbers, {self.parameters / self.base_parameters:.3%} of the base's "
            f"{self.base_parameters:,}",
            f"memory:    adapter {size(self.adapter_bytes)}, optimiser {size(self.optimiser_bytes)} ({self.optimiser})",
            f"forward:   {count_text(self.operations)} operations more, {share}",
            *(f"placed:    {line}" for line in self.undivided),
            *(f"refused:   {line}" for line in self.refused),
        ]


_HEADER = ["path", "shape", "axes", "variant", "rank", "scale", "used", "trainable", "of base", "operations", "placed"]
_NUMBERS = {"rank", "scale", "trainable", "of base", "operations"}


def explain(
    apply: Callable[..., Any],
    params: Any,
    adapter: Adapters,
    *args: Any,
    strict: bool = False,
    dense: Sequence[Pattern] = (),
    form: FormName | None = None,
    tx: Any = None,
    shardings: Any = None,
    **kwargs: Any,
) -> Explanation:
    """Says for each adapted leaf how the model consumes it, and what it costs; nothing is evaluated.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.ones((64, 32))}
    >>> apply = lambda params, x: x @ params["kernel"]
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> print(lj.explain(apply, params, adapter, jnp.ones((8, 64))))
    path    shape  axes  variant  rank  scale  used                     trainable  of base  operations
    ──────  ─────  ────  ───────  ────  ─────  ───────────────────────  ─────────  ───────  ──────────
    kernel  64×32  io    LoRA        2      2  factored dot_general ×1        192   9.375%       3,344
    <BLANKLINE>
    trainable: 192 numbers, 9.375% of the base's 2,048
    memory:    adapter 768 B, optimiser 1.5 kB (two moments, as Adam keeps)
    forward:   3,344 operations more, 10.21% of the base's 32,768

    Args:
      apply: the model, `apply(params, *args, **kwargs)`.
      params: the parameter tree, or its shapes and dtypes.
      adapter: from `init`.
      *args: as the model takes them; arrays may be `ShapeDtypeStruct`s.
      strict: raise if a leaf of the adapter is never used, or if `lora` would refuse one.
      dense: as given to `lora`.
      form: as given to `lora`.
      tx: the optax optimiser whose state to count; otherwise two moments of each number, as Adam keeps.
      shardings: of `params`, as `sharding.like_base` takes them: then it also says where each array goes.
      **kwargs: as the model takes them.

    Returns:
      An `Explanation`, to print.

    Raises:
      AdapterError: if the adapter does not fit, or the shardings; with `strict`, if the function never uses some of
        its leaves.
      UnsupportedError: with `strict`, where `lora` would raise it. Otherwise what it would refuse is in the table, as
        `refused`, and below it the list for `dense`.
    """
    check(flatten(params)[0], adapter)  # first: with swapped arguments the trace would fail somewhere in the model
    program = trace(apply, params, args, kwargs)
    leaves = program.arrays_of_params
    kernels = attach(leaves, {path: part for path, part in adapter.items() if part.variant.needs_axes})
    # A leaf that is trained as a whole has no factors; what stands for it tells whether and where it is used.
    whole = {path: PlainKernel.of(path, base_of(leaves[path])) for path in adapter if path not in kernels}
    refusals: list[Refusal] = []
    settings = settings_of(materialize=dense, custom_derivatives="refuse", form=form, refusals=refusals)
    uses = watch(program, kernels | whole, settings)
    if strict and refusals:
        raise error(refusals)
    given = flatten(shardings)[0]
    places = {} if shardings is None else {path: placements(path, part, given) for path, part in adapter.items()}
    rows = tuple(_row(path, part, leaves[path], uses, places.get(path)) for path, part in adapter.items())
    unused = [row.path for row in rows if row.used == _NEVER]
    if strict and unused:
        raise AdapterError(
            f"Expected the function to use every leaf of the adapter; it never uses {len(unused)} of {len(rows)}.\n"
            f"{listed(unused)}\n  Take them out of the spec, or check that this is the function that is trained."
        )
    adapter_bytes = _bytes(adapter)
    return Explanation(
        rows,
        base_parameters=sum(math.prod(leaf.shape) for leaf in leaves.values()),
        base_operations=_operations_of(program),
        adapter_bytes=adapter_bytes,
        optimiser_bytes=2 * adapter_bytes if tx is None else _bytes(jax.eval_shape(tx.init, dict(adapter))),
        optimiser="two moments, as Adam keeps" if tx is None else "the state of `tx`",
        undivided=tuple(line for path, part in places.items() for line in _undivided(path, part, adapter[path])),
        refused=tuple(_refused(refusals)),
    )


_NEVER = "never used"


def _row(path: str, part: Adapter, leaf: Any, uses: Sequence[Use], places: Adapter | None) -> Row:
    variant = part.variant
    its = [use for use in uses if use.path == path]
    return Row(
        path,
        tuple(leaf.shape),
        part.axes,
        type(variant).__name__,
        rank=getattr(variant, "rank", None),
        scale=variant.scale if isinstance(variant, LowRank) else None,
        used=_used(its, whole=not variant.needs_axes),
        parameters=sum(math.prod(array.shape) for array in part.arrays.values()),
        operations=_prepared(path, part, leaf) + sum(use.operations for use in its),
        placed="" if places is None else _placed(part, places),
    )


def _prepared(path: str, part: Adapter, leaf: Any) -> int:
    """The operations before any use: the norms of DoRA, the random numbers of VeRA."""
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), (leaf, part.arrays))
    return operations(jax.make_jaxpr(lambda leaf, arrays: part.variant.apply(leaf, arrays, part.axes, path))(*shapes))


def _placed(part: Adapter, places: Adapter) -> str:
    """Such as `a 64@fsdp×8, b 8×32@model`."""
    return ", ".join(
        f"{name} {'×'.join(map(_cut, array.shape, places.arrays[name].names))}" for name, array in part.arrays.items()
    )


def _cut(size: int, names: Sequence[str]) -> str:
    """As JAX writes it in a type."""
    along = f"({','.join(names)})" if len(names) > 1 else "".join(names)
    return f"{size}@{along}" if along else str(size)


def _undivided(path: str, places: Adapter, part: Adapter) -> Iterator[str]:
    for name, place in places.arrays.items():
        for axis, names in place.undivided.items():
            yield (
                f"{name} of {path!r} is whole along its axis of {part.arrays[name].shape[axis]}, "
                f"which the devices along {', '.join(map(repr, names))} do not divide"
            )


def _refused(refusals: Sequence[Refusal]) -> Iterator[str]:
    """Such as `lora` raises for 2 kernels; to have them formed: dense=['a', 'b']."""
    listed = to_list(refusals)
    strict = [path for refusal in refusals if not refusal.allowable for path in refusal.paths]
    if listed:
        yield f"`lora` raises an error for {len(listed)} leaves; to materialize them there: materialize={listed}"
    if strict:
        yield f"`lora` raises an error for {list(dict.fromkeys(strict))}: leave them out of the spec"


def _used(uses: Sequence[Use], *, whole: bool) -> str:
    """Such as `factored dot_general ×24, dense mul ×1`."""
    times: dict[str, int] = {}
    for use in uses:
        name = f"{'whole' if whole else use.kind} {use.primitive}"
        times[name] = times.get(name, 0) + use.times
    return ", ".join(f"{name} ×{count}" for name, count in times.items()) or _NEVER


def _operations_of(program: Program) -> int | None:
    try:
        return operations(program.jaxpr)
    except NotImplementedError:
        return None


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
