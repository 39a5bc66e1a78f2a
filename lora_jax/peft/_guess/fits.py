"""Which torch parameters a leaf can be by shape: the roles of its axes, and what the shapes leave open."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from .._row import Part, Row
from .groups import Group, Index, Shape
from .names import Words, in_order, is_table

_OUTPUT = frozenset("o")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Leaves of one group.

    Attributes:
      group: their names and shape.
      axes: the roles of the axes in the traced model; None if they are not known.
      last: the words of the layer's name.
      table: whether it is an embedding, as far as is known.
    """

    group: Group
    axes: str | None
    last: Words
    table: bool | None


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Torch parameters of one group.

    Attributes:
      group: their names and shape.
      module: the name of the module.
      parameter: the name of the parameter.
      bias: the size of the bias beside them, if there is one.
      last: the words of the last part of `owner`.
    """

    group: Group
    module: str
    parameter: str
    bias: int | None
    last: Words

    @property
    def owner(self) -> str:
        """The name to compare: that of the module of a weight or a bias, and that of any other parameter."""
        return self.module if self.parameter in ("weight", "bias") else self.group.name


@dataclasses.dataclass(frozen=True)
class Fit:
    """A way in which a leaf can be one tensor or several.

    Attributes:
      leaf: the leaf.
      tensors: the tensors, in the order of the leaf's outputs.
      row: the row.
      others: rows with other roles of the axes, which fit as well.
      open: what shapes and traced axes do not decide.
      doubtful: what nothing decides.
    """

    leaf: Leaf
    tensors: tuple[Tensor, ...]
    row: Row
    others: tuple[Row, ...] = ()
    open: tuple[str, ...] = ()
    doubtful: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Conventions:
    """What is usual in the models: whether kernels are `(out, in)`, if that is known, and modules `Conv1D`."""

    out_first: bool | None
    conv1d: bool


def fits(leaf: Leaf, tensor: Tensor, usual: Conventions) -> Iterator[Fit]:
    """Yields the ways in which a leaf can be one tensor."""
    if (batch := stack_axes(leaf, tensor)) is None:
        return
    shape = leaf.group.shape
    core = tuple(size for axis, size in enumerate(shape) if axis not in batch)
    rank = len(tensor.group.shape)
    if rank == 2 and len(core) >= 2:
        yield from _matrices(leaf, tensor, batch, usual)
    elif rank >= 3 and len(core) == rank:
        out, d_in, *spatial = tensor.group.shape
        axes = "b" * len(batch) + "i" * (rank - 1) + "o"
        if core == (*spatial, d_in, out) and agree(axes, leaf.axes, shape):
            square = () if d_in != out or leaf.axes else ("square: `(spatial…, in, out)` is the convention",)
            yield Fit(leaf, (tensor,), Row(kind="conv", parts=(Part(tensor.module),)), (), square)


def _matrices(leaf: Leaf, tensor: Tensor, batch: Sequence[int], usual: Conventions) -> Iterator[Fit]:
    shape = leaf.group.shape
    core = [axis for axis in range(len(shape)) if axis not in batch]
    rows, columns = tensor.group.shape
    if is_table(tensor.module) if leaf.table is None else leaf.table:
        if tuple(shape[axis] for axis in core) == (rows, columns) and tensor.bias is None and not batch:
            yield Fit(leaf, (tensor,), Row(kind="embedding", parts=(Part(tensor.module),)))
        return
    conv1d = is_conv1d(tensor, usual)
    d_in, d_out = (rows, columns) if conv1d else (columns, rows)
    yield from _with_roles(leaf, (tensor,), (Part(tensor.module),), batch, d_in, d_out, conv1d, usual)


def is_conv1d(tensor: Tensor, usual: Conventions) -> bool:
    """Whether a module's weight is `(in, out)`: the size of its bias says so, or, if square, other modules."""
    rows, columns = tensor.group.shape
    if tensor.bias is None:
        return False
    return usual.conv1d if rows == columns else columns == tensor.bias


def _with_roles(
    leaf: Leaf,
    tensors: tuple[Tensor, ...],
    parts: tuple[Part, ...],
    batch: Sequence[int],
    d_in: int,
    d_out: int,
    conv1d: bool,
    usual: Conventions,
    reasons: tuple[str, ...] = (),
    doubts: tuple[str, ...] = (),
) -> Iterator[Fit]:
    """Yields a fit for the most usual roles of the axes that fit, and notes other roles that fit as well."""
    found = [axes for axes in _roles(leaf.group.shape, batch, d_in, d_out) if agree(axes, leaf.axes, leaf.group.shape)]
    if not found:
        return
    axes, *others = sorted(found, key=lambda axes: _unusual(axes, leaf, tensors, usual))
    if others and axes != leaf.axes:
        what = "its name" if len(leaf.group.shape) - len(batch) > 2 else "the convention"
        reasons += (f"square: axes {axes!r} by {what}, {others[0]!r} fits as well",)
    if conv1d and d_in == d_out:
        reasons += ("square: `Conv1D`, as other modules",)
    default = "b" * len(batch) + "io"
    row, *other_rows = (
        Row(kind="linear", parts=parts, axes=None if one == default else one, conv1d=conv1d) for one in (axes, *others)
    )
    yield Fit(leaf, tensors, row, tuple(other_rows), reasons, doubts)


def _roles(shape: Shape, batch: Sequence[int], d_in: int, d_out: int) -> Iterator[str]:
    """Yields the roles with which a leaf has these numbers of inputs and outputs."""
    for roles in itertools.product(*("b" if axis in batch else "io" for axis in range(len(shape)))):
        sizes = {role: math.prod(size for size, own in zip(shape, roles, strict=True) if own == role) for role in "io"}
        if sizes == {"i": d_in, "o": d_out} and {"i", "o"} <= set(roles):
            yield "".join(roles)


def _unusual(axes: str, leaf: Leaf, tensors: tuple[Tensor, ...], usual: Conventions) -> tuple[bool, ...]:
    """Returns a key that is smaller for more usual roles."""
    core = axes.replace("b", "")
    output = bool(_OUTPUT & (leaf.last | tensors[0].last))
    if axes == leaf.axes:
        return (False,)
    if len(core) == 2:
        return True, core != ("oi" if usual.out_first else "io")
    return True, (core.count("i") > 1) != output, "oi" in core.strip("o") or "io" in core.strip("i"), core[0] != "i"


def is_turned(fit: Fit, usual: Conventions) -> bool:
    """Whether a kernel of two axes is `(out, in)` where others are `(in, out)`, or the other way, and is not traced."""
    axes = (fit.row.axes or "io").replace("b", "")
    known = fit.leaf.axes is not None or usual.out_first is None or fit.row.kind != "linear"
    return not known and axes == ("io" if usual.out_first else "oi")


def fused_fits(leaf: Leaf, tensors: Sequence[Tensor], usual: Conventions) -> Iterator[Fit]:
    """Yields the fit of a leaf that fuses some modules along its outputs, in the order that its name states."""
    if (order := _fused_order(leaf.last)) is not None:
        named = [tensor for tensor in tensors if tensor.last & leaf.last]
        places = in_order([tensor.last for tensor in named], order)
        if places is not None and len(places) == len(named):
            text = f"fused: in the order {', '.join(order.split())}"
            yield from _fused(leaf, tuple(named[at] for at in places), usual, (text,), ())


def unordered_fits(leaf: Leaf, tensors: Sequence[Tensor], usual: Conventions) -> Iterator[Fit]:
    """Yields the fits of a leaf that fuses two or three modules of one parent, in all orders."""
    for number in (2, 3) if len(tensors) <= _MOST_SIBLINGS else ():
        for ordered in itertools.permutations(tensors, number):
            yield from _fused(leaf, ordered, usual, (), ("fused: nothing states the order",))


_MOST_SIBLINGS = 8


def _fused(
    leaf: Leaf, ordered: tuple[Tensor, ...], usual: Conventions, reasons: tuple[str, ...], doubts: tuple[str, ...]
) -> Iterator[Fit]:
    conv1d = is_conv1d(ordered[0], usual)
    shapes = [tensor.group.shape[::-1] if conv1d else tensor.group.shape for tensor in ordered]
    batch = stack_axes(leaf, ordered[0])
    if batch is None or any(stack_axes(leaf, tensor) != batch for tensor in ordered) or len({d for _, d in shapes}) > 1:
        return
    equal = len({d_out for d_out, _ in shapes}) == 1
    parts = tuple(
        Part(tensor.module, size=None if equal else d_out) for tensor, (d_out, _) in zip(ordered, shapes, strict=True)
    )
    widths = [d_out for d_out, _ in shapes]
    for fit in _with_roles(leaf, ordered, parts, batch, shapes[0][1], sum(widths), conv1d, usual, reasons, doubts):
        roles = fit.row.axes or "b" * len(batch) + "io"
        first, *inner = (size for size, role in zip(leaf.group.shape, roles, strict=True) if role == "o")
        cut = any(width % math.prod(inner) for width in widths) or (first != len(ordered) and len(ordered) in inner)
        doubt = ("fused: its first axis of outputs is not that of the modules; state `outputs`",) if cut else ()
        yield dataclasses.replace(fit, doubtful=(*fit.doubtful, *doubt))


def part_fits(leaves: Sequence[Leaf], tensor: Tensor, usual: Conventions) -> Iterator[Fit]:
    """Yields the fits of leaves that one module fuses along its outputs, in the order that its name states."""
    if (order := _fused_order(tensor.last)) is None:
        return
    places = in_order([leaf.last for leaf in leaves], order)
    if places is None or len(places) != len(leaves) or any(stack_axes(leaf, tensor) is None for leaf in leaves):
        return
    rows, columns = tensor.group.shape
    conv1d = is_conv1d(tensor, usual)
    d_in, total = (rows, columns) if conv1d else (columns, rows)
    ordered = [leaves[at] for at in places]
    batches = [stack_axes(leaf, tensor) or () for leaf in ordered]
    cores = [
        math.prod(size for axis, size in enumerate(leaf.group.shape) if axis not in batch)
        for leaf, batch in zip(ordered, batches, strict=True)
    ]
    widths = [core // d_in for core in cores]
    if sum(cores) != d_in * total or any(core % d_in for core in cores):
        return
    doubt = (f"one of {', '.join(order.split())} in a module that fuses them, by the convention of their order",)
    for leaf, batch, first, width in zip(ordered, batches, itertools.accumulate([0, *widths]), widths, strict=False):
        part = Part(tensor.module, of=(first, total))
        yield from _with_roles(leaf, (tensor,), (part,), batch, d_in, width, conv1d, usual, (), doubt)


def _fused_order(last: Words) -> str | None:
    """Returns the order in which a name says that modules are fused."""
    return next((order for order in ("q k v", "k v", "gate up") if set(order.split()) <= last), None)


def stack_axes(leaf: Leaf, tensor: Tensor) -> tuple[int, ...] | None:
    """Returns the axes along which a leaf stacks torch modules; None if their numbers do not fit."""
    own, other = leaf.group.members.keys(), tensor.group.members.keys()
    extra = len(next(iter(other))) - len(next(iter(own)))
    if extra < 0 or extra > len(leaf.group.shape):
        return None
    axes = tuple(range(extra))
    if leaf.axes is not None:
        axes = tuple(axis for axis, role in enumerate(leaf.axes) if role == "b")
        if len(axes) != extra:
            return None
    sizes = [leaf.group.shape[axis] for axis in axes]
    if len(own) * math.prod(sizes) != len(other):
        return None
    stacked: set[Index] = {(*index, *more) for index in own for more in itertools.product(*map(range, sizes))}
    return axes if stacked == other else None


def agree(axes: str, traced: str | None, shape: Shape) -> bool:
    """Whether roles are those of the traced model; an axis of size 1 may have any."""
    return traced is None or all(own == role or size == 1 for own, role, size in zip(axes, traced, shape, strict=True))
