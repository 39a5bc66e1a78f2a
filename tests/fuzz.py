"""Draws random programs that use kernels only in ways that have a rule for the roles of the axes.

`Drawing` tracks the role and size of each axis through every move, so that `lora` must accept the program and an
UnsupportedError is a failure. Some programs have one step without a rule, `Opaque`, which must raise.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any

import fuzz_program as fp
from fuzz_program import K, Shape
from hypothesis import strategies as st

# The kinds of steps that have rules; add a line for a new rule.
ENABLED = frozenset(
    {
        "transpose",
        "reshape",
        "squeeze",
        "expand",
        "broadcast",
        "slice",
        "dynamic_slice",
        "index",
        "dynamic_index",
        "take",
        "lookup",
        "split",
        "concatenate",
        "rev",
        "pad",
        "scale",
        "times",
        "cast",
        "copy",
        "within",
        "dot",
        "both",
        "conv",
        "conv in groups",
        "ragged",
        "add",
        "act",
        "jit",
        "remat",
        "scan",
        "loop",
        "switch",
        # "switch in a gradient",
        # "switch by value in a vmap",
        "vmap",
        "gradient",
    }
)

LARGEST = 48  # elements of a kernel


@dataclasses.dataclass(frozen=True)
class KernelInfo:
    """A kernel after some moves.

    Attributes:
      roles: the role of each axis; `?` for an axis of size 1 whose role is ambiguous.
      shape: the shape.
      is_kernel: False if it is an array, as after a lookup of one row; None if that is ambiguous.
      mapped: whether it is a slice under `vmap`, which hides an axis.
    """

    roles: tuple[str, ...]
    shape: Shape
    is_kernel: bool | None = True
    mapped: bool = False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def having(self, role: str) -> list[int]:
        return [axis for axis, axis_role in enumerate(self.roles) if axis_role == role]

    def without(self, axis: int, *, squeezed: bool) -> KernelInfo:
        roles, shape = (values[:axis] + values[axis + 1 :] for values in (self.roles, self.shape))
        rest = dataclasses.replace(self, roles=roles, shape=shape)
        return rest.after_lookup() if squeezed else rest

    def after_lookup(self) -> KernelInfo:
        """The same, marked as an array if it has no input or no output axes left."""
        if self.is_kernel is False or {"i", "o"} <= set(self.roles):
            return self
        return dataclasses.replace(self, is_kernel=None if "?" in self.roles or self.mapped else False)

    def with_axis(self, axis: int, size: int, role: str | None = None) -> KernelInfo:
        shape, roles = [*self.shape], [*self.roles]
        shape[axis], roles[axis] = size, role or roles[axis]
        return dataclasses.replace(self, shape=tuple(shape), roles=tuple(roles))


Scope = dict[str, KernelInfo]


class Drawing:
    """Draws one program."""

    def __init__(self, random: random.Random) -> None:
        self.random = random
        self.names = 0
        self.opaque = self.chance(20)
        self.in_gradient = self.in_vmap = self.numbered = False

    # Small choices; the first is the one that hypothesis shrinks to.

    def number(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def one_of(self, choices: Sequence[Any]) -> Any:
        return choices[self.number(0, len(choices) - 1)]

    def chance(self, one_in: int) -> bool:
        return self.number(0, one_in - 1) == one_in - 1

    def order(self, items: Sequence[Any]) -> list[Any]:
        rest, ordered = [*items], []
        while rest:
            ordered.append(rest.pop(self.number(0, len(rest) - 1)))
        return ordered

    def some(self, items: Sequence[Any]) -> list[Any]:
        return [item for item in items if self.number(0, 1)]

    def size(self) -> int:
        return self.one_of((2, 3, 1))

    def shape(self, most: int) -> Shape:
        return tuple(self.size() for _ in range(self.number(0, most)))

    def name(self) -> str:
        self.names += 1
        return f"v{self.names}"

    # Kernels

    def leaf(self) -> fp.Leaf:
        roles = "".join(self.order(["i", "o", *(self.one_of("oib") for _ in range(self.number(0, 2)))]))
        if self.chance(5):
            roles = self.one_of(("iiio", "oiii", "biio", "iio"))  # layouts of convolutions
        shape = tuple(self.size() for _ in roles)
        ranks = [
            math.prod(size for size, axis_role in zip(shape, roles, strict=True) if axis_role == role) for role in "io"
        ]
        variant = self.one_of(("LoRA", "LoRA", "LoRA", "LoRA", "RSLoRA", "Full", None))
        return fp.Leaf(shape, roles, self.number(1, min(2, *ranks)), variant)

    def kernel(self, scope: Scope, most: int = 3) -> tuple[K, KernelInfo]:
        name = self.one_of(sorted(scope))
        moves, info = self.moves(scope, scope[name], most)
        return K(name, moves), info

    def moves(self, scope: Scope, info: KernelInfo, most: int) -> tuple[tuple[Any, ...], KernelInfo]:
        moves = []
        for _ in range(self.number(0, most)):
            move, info = self.move(scope, info)
            moves += [] if move is None else [move]
        return tuple(moves), info

    def move(self, scope: Scope, info: KernelInfo) -> tuple[Any, KernelInfo]:
        return getattr(self, "_" + self.one_of([kind for kind in MOVES if kind in ENABLED]))(scope, info)

    def axis(self, info: KernelInfo) -> int:
        return self.number(0, info.ndim - 1)

    def _transpose(self, scope: Scope, info: KernelInfo) -> Any:
        order = tuple(self.order(range(info.ndim)))
        roles, shape = ([values[axis] for axis in order] for values in (info.roles, info.shape))
        return fp.Transpose(order), dataclasses.replace(info, roles=tuple(roles), shape=tuple(shape))

    def _reshape(self, scope: Scope, info: KernelInfo) -> Any:
        """Splits and merges adjacent axes of the same role."""
        runs: list[tuple[str, int]] = []
        for role, size in zip(info.roles, info.shape, strict=True):
            if runs and (size == 1 or role == runs[-1][0] or runs[-1][1] == 1):
                runs[-1] = (role if size > 1 else runs[-1][0], runs[-1][1] * size)
            else:
                runs.append((role, size))
        axes = [(role if part > 1 else "?", part) for role, size in runs for part in self._parts(size)]
        if len(axes) > 5:
            return None, info
        roles, shape = tuple(role for role, _ in axes), tuple(size for _, size in axes)
        return fp.Reshape(shape), dataclasses.replace(info, roles=roles, shape=shape).after_lookup()

    def _parts(self, size: int) -> list[int]:
        divisors = [part for part in range(2, size) if size % part == 0]
        if size == 1:
            return [1] * self.number(0, 1)
        parts = [size]
        if divisors and self.number(0, 1):
            first = self.one_of(divisors)
            parts = [first, size // first]
        return [*parts, 1] if self.chance(6) else parts

    def _squeeze(self, scope: Scope, info: KernelInfo) -> Any:
        ones = [axis for axis, size in enumerate(info.shape) if size == 1]
        if not ones:
            return None, info
        axis = self.one_of(ones)
        return fp.Squeeze(axis), info.without(axis, squeezed=True)

    def _expand(self, scope: Scope, info: KernelInfo) -> Any:
        if info.ndim > 4:
            return None, info
        axis = self.number(0, info.ndim)
        return fp.Expand(axis), self._new_axis(info, axis, 1)

    def _new_axis(self, info: KernelInfo, axis: int, size: int, role: str = "o") -> KernelInfo:
        roles = (*info.roles[:axis], role, *info.roles[axis:])
        return dataclasses.replace(info, roles=roles, shape=(*info.shape[:axis], size, *info.shape[axis:]))

    def _broadcast(self, scope: Scope, info: KernelInfo) -> Any:
        times = self.one_of((2, 3))
        if math.prod(info.shape) * times > LARGEST or info.ndim > 4:
            return None, info
        ones = [axis for axis, size in enumerate(info.shape) if size == 1 and info.roles[axis] != "?"]
        if ones and self.number(0, 1):
            repeated = info.with_axis(self.one_of(ones), times)
            return fp.Broadcast(repeated.shape, tuple(range(info.ndim))), repeated
        axis = self.number(0, info.ndim)
        wider = self._new_axis(info, axis, times)
        return fp.Broadcast(wider.shape, tuple(kept for kept in range(wider.ndim) if kept != axis)), wider

    def _slice(self, scope: Scope, info: KernelInfo) -> Any:
        if not info.ndim:
            return None, info
        axis = self.axis(info)
        start = self.number(0, info.shape[axis] - 1)
        stop, stride = self.number(start + 1, info.shape[axis]), self.number(1, 2)
        return fp.Slice(axis, start, stop, stride), info.with_axis(axis, len(range(start, stop, stride)))

    def _dynamic_slice(self, scope: Scope, info: KernelInfo) -> Any:
        if not info.ndim:
            return None, info
        axis = self.axis(info)
        size = self.number(1, info.shape[axis])
        return fp.DynamicSlice(axis, size, self.number(-3, 2)), self._at_traced_number(info.with_axis(axis, size))

    def _at_traced_number(self, info: KernelInfo) -> KernelInfo:
        """The same after a move that depends on the traced number, which `vmap` may map."""
        return dataclasses.replace(info, mapped=info.mapped or self.numbered)

    def _index(self, scope: Scope, info: KernelInfo) -> Any:
        if not info.ndim:
            return None, info
        axis = self.axis(info)
        place = self.number(-info.shape[axis], info.shape[axis] - 1)
        return fp.Index(axis, place), info.without(axis, squeezed=True)

    def _dynamic_index(self, scope: Scope, info: KernelInfo) -> Any:
        if not info.ndim:
            return None, info
        axis = self.axis(info)
        # If `vmap` maps the number, the library sees one more axis.
        after = self._at_traced_number(info).without(axis, squeezed=True)
        return fp.DynamicIndex(axis, self.number(-3, 2), bool(self.number(0, 1))), after

    def _rev(self, scope: Scope, info: KernelInfo) -> Any:
        return fp.Rev(tuple(self.some(range(info.ndim)))), info

    def _ids(self, size: int, shape: Shape, outside: int = 0) -> Any:
        """Indices into an axis of a size; `outside` allows that many positions out of bounds."""
        if not shape:
            return self.number(-size - outside, size - 1 + outside)
        return tuple(self._ids(size, shape[1:], outside) for _ in range(shape[0]))

    def _select(self, info: KernelInfo, axes: Sequence[int], shape: Shape, at: int) -> KernelInfo | None:
        """The result of indexing some axes; the axes of the ids are inserted at `at`."""
        selected = {info.roles[axis] for axis in axes}
        rest = [axis for axis in range(info.ndim) if axis not in axes]
        roles, sizes = [info.roles[axis] for axis in rest], [info.shape[axis] for axis in rest]
        if "?" in selected | set(roles) or info.mapped or math.prod((*sizes, *shape)) > LARGEST:
            return None
        # Both factors are indexed, or only one of them.
        role = "b" if len(selected) > 1 or "b" in selected else selected.pop()
        roles[at:at], sizes[at:at] = [role] * len(shape), shape
        remaining = {info.roles[axis] for axis in rest}
        is_kernel = info.is_kernel and {"i", "o"} <= remaining
        return KernelInfo(tuple(roles), tuple(sizes), is_kernel)

    def _take(self, scope: Scope, info: KernelInfo) -> Any:
        if not info.ndim or info.is_kernel is None:
            return None, info
        return self._take_along(info, self.axis(info))

    def _take_along(self, info: KernelInfo, axis: int) -> Any:
        shape = (*self.shape(1), self.size())
        mode, traced = self.one_of((None, "clip", "wrap", "fill")), bool(self.number(0, 1)) and not self.numbered
        after = self._select(info, [axis], shape, axis)
        if after is None:
            return None, info
        # Without a mode, an index out of bounds gives NaN.
        ids = self._ids(info.shape[axis], shape, outside=0 if mode is None else 2)
        return fp.Take(axis, ids, mode, traced), after

    def _lookup(self, scope: Scope, info: KernelInfo) -> Any:
        if not info.ndim or info.is_kernel is None:
            return None, info
        axes = self.some(range(info.ndim)) or [self.axis(info)]
        # Under vmap, the indexed axis is ambiguous among axes of size 1, and so is the role of the ids.
        mapped = bool(self.number(0, 1)) and all(info.shape[axis] > 1 for axis in axes)
        shape = (*self.shape(1), self.size())
        # Indices with a slice between them come first, as under vmap. With vmap there is only one axis of ids, because
        # the order of several is hard to predict.
        separated = axes[-1] - axes[0] >= len(axes)
        shape = shape[:1] if mapped else shape
        after = self._select(info, axes, shape, 0 if separated or mapped else axes[0])
        if after is None:
            return None, info
        ids = tuple(self._ids(size, shape) if axis in axes else None for axis, size in enumerate(info.shape))
        return fp.Lookup(ids, bool(self.number(0, 1)) and not self.numbered, mapped), after

    def _split(self, scope: Scope, info: KernelInfo) -> Any:
        wide = [axis for axis, size in enumerate(info.shape) if size > 1]
        if not wide:
            return None, info
        axis = self.one_of(wide)
        at, part = self.number(1, info.shape[axis] - 1), self.number(0, 1)
        return fp.Split(axis, at, part), info.with_axis(axis, (at, info.shape[axis] - at)[part])

    def _concatenate(self, scope: Scope, info: KernelInfo) -> Any:
        """Concatenates with a kernel with the same roles, or an array."""
        stacked = self.chance(4)
        if info.mapped or not info.is_kernel or not info.ndim or "?" in info.roles or (stacked and info.ndim > 4):
            return None, info
        axis = self.number(0, info.ndim) if stacked else self.axis(info)
        candidates, size = [], 1 if stacked else info.shape[axis]
        for name in sorted(scope):
            other = scope[name]
            other_rest = [
                pair
                for place, pair in enumerate(zip(other.roles, other.shape, strict=True))
                if stacked or place != axis
            ]
            rest = [
                pair for place, pair in enumerate(zip(info.roles, info.shape, strict=True)) if stacked or place != axis
            ]
            same_role = stacked or (other.ndim > axis and other.roles[axis] == info.roles[axis])
            if other.ndim == info.ndim and other_rest == rest and same_role and not other.mapped:
                candidates.append(name)
        if not candidates or math.prod(info.shape) * 2 > LARGEST:
            return None, info
        other = self.one_of(candidates)
        size += 1 if stacked else scope[other].shape[axis]
        after = self._new_axis(info, axis, size, "b") if stacked else info.with_axis(axis, size)
        return fp.Concatenate(axis, (K(other),), stacked), after

    def _pad(self, scope: Scope, info: KernelInfo) -> Any:
        if math.prod(info.shape) * 3 > LARGEST:
            return None, info
        config = tuple((self.number(0, 1), self.one_of((0, 1, -1)), self.number(0, 1)) for _ in info.shape)
        shape = tuple(
            size + low + high + (size - 1) * between
            for size, (low, high, between) in zip(info.shape, config, strict=True)
        )
        if not all(shape) or math.prod(shape) > LARGEST or "?" in info.roles:
            return None, info
        return fp.Pad(config, self.one_of((0.0, 0.5))), dataclasses.replace(info, shape=shape)

    def _times(self, scope: Scope, info: KernelInfo) -> Any:
        """Multiplies with an array that varies along inputs or along outputs."""
        roles = {"b", "?", self.one_of("io")}
        if not info.ndim or not info.is_kernel or info.mapped:
            return None, info
        shape = zip(info.roles, info.shape, strict=True)
        return fp.Times(tuple(size if role in roles and self.number(0, 1) else 1 for role, size in shape)), info

    def _scale(self, scope: Scope, info: KernelInfo) -> Any:
        how = self.one_of([how for how in fp.SCALES if how != "traced" or not self.numbered])
        return fp.Scale(how, 1.0 if how == "neg" else self.one_of((0.5, -1.5, 2.0))), info

    def _cast(self, scope: Scope, info: KernelInfo) -> Any:
        return (fp.Cast(), info) if self.chance(3) else (None, info)

    def _copy(self, scope: Scope, info: KernelInfo) -> Any:
        return fp.Copy(self.one_of([*fp.COPIES])), info

    def _within(self, scope: Scope, info: KernelInfo) -> Any:
        how = self.one_of(("jit", "remat", "vmap", "map"))
        if how in ("jit", "remat"):
            moves, after = self.moves(scope, info, 2)
            return (fp.Within(how, moves), after) if moves else (None, info)
        if not info.ndim or info.mapped or not info.is_kernel:
            return None, info
        inner = info.without(0, squeezed=how == "map")
        moves, after = self.moves(scope, dataclasses.replace(inner, mapped=how == "vmap"), 2)
        if any(isinstance(move, fp.Concatenate) for move in fp.steps_of(moves)):
            return None, info
        # A scan stacks the results of its iterations, so that the axis is a batch axis.
        role = info.roles[0] if how == "vmap" else "b"
        return fp.Within(how, moves), KernelInfo(
            (role, *after.roles), (info.shape[0], *after.shape), after.is_kernel, info.mapped
        )

    # Steps

    def body(self, scope: Scope, depth: int, most: int = 2) -> tuple[Any, ...]:
        return tuple(self.step(scope, depth) for _ in range(self.number(1, most)))

    def step(self, scope: Scope, depth: int) -> Any:
        kinds = [kind for kind in (CONSUMERS + CONTROL if depth else CONSUMERS) if kind in ENABLED]
        if self.numbered or (self.in_gradient and "switch in a gradient" not in ENABLED):
            kinds = [kind for kind in kinds if kind != "switch"]
        if self.opaque and self.number(0, 1):
            self.opaque = False
            return self._opaque(scope, depth)
        return getattr(self, "_" + self.one_of(kinds))(scope, depth)

    def _opaque(self, scope: Scope, depth: int) -> Any:
        kernel, info = self.kernel(scope)
        if info.is_kernel and info.ndim and not info.mapped:
            return fp.Opaque(self.one_of([*fp.OPAQUE]), kernel)
        return self._dot(scope, depth)

    def _act(self, scope: Scope, depth: int) -> Any:
        return fp.Act(self.one_of([*fp.ACTIVATIONS]))

    def _dot(self, scope: Scope, depth: int) -> Any:
        kernel, info = self.kernel(scope)
        uses = [self.one_of(("summed", "summed", "free", "batch")) for _ in info.shape]
        x_only = [self.size() for _ in range(self.number(0, 2))]
        shared = [axis for axis, use in enumerate(uses) if use != "free"]
        axes = self.order([*shared, *(-1 - number for number in range(len(x_only)))])
        x = tuple(x_only[-1 - axis] if axis < 0 else info.shape[axis] for axis in axes)
        pairs = []
        for kind in ("summed", "batch"):
            chosen = self.order([axis for axis in shared if uses[axis] == kind])
            pairs.append((tuple(chosen), tuple(axes.index(axis) for axis in chosen)))
        return fp.Dot(kernel, x, tuple(pairs), bool(self.number(0, 1)))

    def _both(self, scope: Scope, depth: int) -> Any:
        (one, first), (other, second) = self.kernel(scope, 2), self.kernel(scope, 2)
        remaining = [*range(second.ndim)]
        pairs: dict[str, list[tuple[int, int]]] = {"summed": [], "batch": []}
        for axis, size in enumerate(first.shape):
            fitting = [place for place in remaining if second.shape[place] == size]
            use = self.one_of(("summed", "free", "batch"))
            if fitting and use != "free":
                place = self.one_of(fitting)
                remaining.remove(place)
                pairs[use].append((axis, place))
        numbers = tuple(tuple(tuple(side) for side in zip(*pair, strict=True)) or ((), ()) for pair in pairs.values())
        return fp.Both(one, other, numbers)

    def _conv(self, scope: Scope, depth: int) -> Any:
        kernel, info = self.kernel(scope)
        kernel, info = self._indexed(kernel, info, info.having("b"))
        ins, outs = info.having("i"), info.having("o")
        if info.having("?") or not ins or not outs or not info.is_kernel or info.mapped or info.ndim > 5:
            return self._dot(scope, depth)
        channels = [self.one_of(ins), self.one_of(outs)]
        windows = self.order([axis for axis in range(info.ndim) if axis not in channels])
        w_in, w_out = channels if self.number(0, 3) else channels[::-1]
        size_in, size_out = info.shape[w_in], info.shape[w_out]
        groups = size_out if self.chance(3) and "conv in groups" in ENABLED and not self.in_gradient else 1
        strides, lhs_dilation, rhs_dilation = (tuple(self.one_of((1, 2)) for _ in windows) for _ in range(3))
        padding = tuple((self.number(0, 1), self.number(0, 1)) for _ in windows)
        extents = [(info.shape[axis] - 1) * by + 1 for axis, by in zip(windows, rhs_dilation, strict=True)]
        spatial = [extent + self.number(0, 2 if len(windows) < 2 else 1) for extent in extents]
        x_spec, out_spec = (tuple(self.order(range(info.ndim))) for _ in range(2))
        sizes = dict(zip(x_spec, (self.number(1, 2), size_in * groups, *spatial), strict=True))
        x = tuple(sizes[axis] for axis in range(info.ndim))
        spec = (x_spec, (w_out, w_in, *windows), out_spec)
        return fp.Conv(kernel, x, spec, strides, padding, lhs_dilation, rhs_dilation, groups)

    def _indexed(self, kernel: K, info: KernelInfo, axes: Sequence[int]) -> tuple[K, KernelInfo]:
        """The kernel, indexed along some axes."""
        moves = [*kernel.moves]
        for axis in sorted(axes, reverse=True):
            moves.append(fp.Index(axis, self.number(0, info.shape[axis] - 1)))
            info = info.without(axis, squeezed=True)
        return K(kernel.name, tuple(moves)), info

    def _ragged(self, scope: Scope, depth: int) -> Any:
        """Indexes all but three axes."""
        kernel, info = self.kernel(scope)
        order = self.order(range(info.ndim))
        if info.ndim < 3 or not info.is_kernel or info.mapped or self.in_vmap:
            return self._dot(scope, depth)
        kernel, info = self._indexed(kernel, info, order[3:])
        groups, size = info.shape[:2]
        sizes = tuple(self.number(0, 2) for _ in range(groups))
        return fp.Ragged(kernel, (max(1, sum(sizes)), size), sizes)

    def _add(self, scope: Scope, depth: int) -> Any:
        """Uses the result of a lookup if it is an array."""
        kernel, info = self.kernel(scope)
        for role in self.order("io"):
            if info.is_kernel and not info.mapped and "?" not in info.roles and info.having(role):
                lookup, after = self._row(info, info.having(role))
                kernel, info = K(kernel.name, (*kernel.moves, *lookup)), after
        return fp.Add(kernel) if info.is_kernel is False else self._dot(scope, depth)

    def _row(self, info: KernelInfo, axes: Sequence[int]) -> tuple[tuple[Any, ...], KernelInfo]:
        """Moves that index some axes at one or several positions."""
        if len(axes) == 1 and "take" in ENABLED and self.number(0, 1):
            move, after = self._take_along(info, axes[0])
            if move is not None:
                return (move,), after
        kernel, after = self._indexed(K(""), info, axes)
        return kernel.moves, after

    # Control flow

    def _jit(self, scope: Scope, depth: int) -> Any:
        times = self.one_of((1, 1, 2))
        candidates = [(one, other) for one in scope for other in scope if one < other and scope[one] == scope[other]]
        swap = self.one_of(candidates) if candidates and times == 2 else None
        return fp.Jit(self.body(scope, depth - 1), self.shape(2), times, swap)

    def _remat(self, scope: Scope, depth: int) -> Any:
        policy = self.one_of((None, "everything_saveable", "dots_saveable", "nothing_saveable"))
        return fp.Remat(self.body(scope, depth - 1), policy, not self.number(0, 1))

    def _bound(self, scope: Scope, *, mapped: bool, size: int | None = None) -> tuple[tuple[fp.Bound, ...], Scope, int]:
        """Kernels to slice along axes of one size, the scope with their slices, and the size."""
        bound: list[fp.Bound] = []
        inner = dict(scope)
        for _ in range(self.number(0, 2)):
            kernel, info = self.kernel(scope, 1)
            fitting = [axis for axis, length in enumerate(info.shape) if size in (None, length)]
            if not fitting:
                continue
            axis = self.one_of(fitting)
            name, size = self.name(), info.shape[axis]
            inner[name] = info.without(axis, squeezed=not mapped)
            if mapped:
                inner[name] = dataclasses.replace(inner[name], mapped=True)
            bound.append((name, kernel, axis))
        return tuple(bound), inner, size if size is not None else self.size()

    def _scan(self, scope: Scope, depth: int) -> Any:
        stacked, inner, length = self._bound(scope, mapped=False)
        carried = tuple(self.some(sorted(scope))) if self.chance(3) else ()
        body, carry = self.body(inner, depth - 1), self.shape(2)
        return fp.Scan(
            body,
            carry,
            length,
            stacked,
            carried,
            reverse=bool(self.number(0, 1)),
            unroll=self.one_of((1, 1, 2)),
            emit=bool(self.number(0, 1)),
        )

    def _loop(self, scope: Scope, depth: int) -> Any:
        traced = self.chance(4) and not self.in_gradient
        before, self.numbered = self.numbered, self.numbered and traced
        body = self.body(scope, depth - 1)
        self.numbered = before
        return fp.Loop(body, self.shape(2), self.number(0, 3), traced)

    def _switch(self, scope: Scope, depth: int) -> Any:
        branches = tuple(self.body(scope, depth - 1, 1) for _ in range(self.number(1, 3)))
        # The vmap of a branch that depends on a value also selects among the operands.
        by_value = bool(self.number(0, 1)) and (not self.in_vmap or "switch by value in a vmap" in ENABLED)
        return fp.Switch(branches, self.shape(2), by_value)

    def _vmap(self, scope: Scope, depth: int) -> Any:
        mapped, inner, size = self._bound(scope, mapped=True)
        before = self.in_vmap, self.numbered
        self.in_vmap, self.numbered = True, self.chance(3)
        body, numbered = self.body(inner, depth - 1), self.numbered
        self.in_vmap, self.numbered = before
        return fp.Vmap(body, size, self.shape(2), mapped, numbered)

    def _gradient(self, scope: Scope, depth: int) -> Any:
        before, self.in_gradient = self.in_gradient, True
        body = self.body(scope, depth - 1)
        self.in_gradient = before
        return fp.Gradient(body)

    # Programs

    def program(self) -> fp.Program:
        leaves = [(f"w{number}", self.leaf()) for number in range(self.number(1, 3))]
        if all(leaf.variant is None for _, leaf in leaves):
            leaves[0] = (leaves[0][0], dataclasses.replace(leaves[0][1], variant="LoRA"))
        scope = {name: self._info(leaf) for name, leaf in leaves}
        x, body = self.shape(2), self.body(scope, self.one_of((1, 2, 1, 0)), 3)
        steps = fp.steps_of(body)
        loops = any(isinstance(step, fp.Loop) and step.traced for step in steps)
        under = FORWARD if loops else REVERSE
        if any(isinstance(step, fp.Ragged) for step in steps):
            under = [name for name in under if name in RAGGED]
        return fp.Program(tuple(leaves), x, body, self.one_of(under))

    def _info(self, leaf: fp.Leaf) -> KernelInfo:
        return KernelInfo(tuple(leaf.axes), leaf.shape, leaf.variant in ("LoRA", "RSLoRA"))


MOVES = (
    "transpose",
    "reshape",
    "slice",
    "index",
    "squeeze",
    "expand",
    "broadcast",
    "dynamic_slice",
    "dynamic_index",
    "take",
    "lookup",
    "scale",
    "times",
    "rev",
    "split",
    "concatenate",
    "pad",
    "cast",
    "copy",
    "within",
)
# What is compared with the oracle, weighted by repetition.
REVERSE = ("gradient",) * 60 + ("jvp", "over_x", "over_adapter", "second", "second_in_reverse") * 6 + ("jit", "eager")
FORWARD = ("forward", "jvp", "over_x", "over_adapter")  # JAX has no gradient of a loop with a traced end
RAGGED = ("gradient", "gradient", "gradient", "jvp")  # JAX has no other derivatives of `ragged_dot`
CONSUMERS = ("dot", "dot", "dot", "both", "conv", "ragged", "add", "add", "act")
CONTROL = ("jit", "remat", "scan", "scan", "loop", "switch", "vmap", "gradient")

# One source of randomness for all choices. With a strategy for each choice, hypothesis would spend its time on
# mutations that differ by one number.
programs = st.randoms(use_true_random=False).map(lambda random: Drawing(random).program())
