"""Draws random programs of kernels whose every use is listed: has a rule, for the roles that the kernel's axes have.

The drawing knows of a kernel the role and the size of each axis, wherever it is moved. So it knows that `lora` has to
take the program, and a refusal is a failure. Now and then a program has one step without a rule, `Opaque`.
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

# The kinds of steps that the library has rules for; a new rule is one more line here.
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
class Known:
    """What is known of a kernel, or of what became of it.

    Attributes:
      roles: of each axis; `?` of one of size 1 that any role may have got.
      shape: of the kernel.
      is_kernel: whether it is one still; after a lookup of one row it is an array; None if that is not known.
      mapped: whether it is a slice under `vmap`: more axes are there than can be seen.
    """

    roles: tuple[str, ...]
    shape: Shape
    is_kernel: bool | None = True
    mapped: bool = False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def having(self, role: str) -> list[int]:
        return [axis for axis, its in enumerate(self.roles) if its == role]

    def without(self, axis: int, *, squeezed: bool) -> Known:
        roles, shape = (its[:axis] + its[axis + 1 :] for its in (self.roles, self.shape))
        rest = dataclasses.replace(self, roles=roles, shape=shape)
        return rest.after_a_look_up() if squeezed else rest

    def after_a_look_up(self) -> Known:
        """The same, if it is what a lookup leaves: an array, where inputs or outputs are gone."""
        if self.is_kernel is False or {"i", "o"} <= set(self.roles):
            return self
        return dataclasses.replace(self, is_kernel=None if "?" in self.roles or self.mapped else False)

    def with_axis(self, axis: int, size: int, role: str | None = None) -> Known:
        shape, roles = [*self.shape], [*self.roles]
        shape[axis], roles[axis] = size, role or roles[axis]
        return dataclasses.replace(self, shape=tuple(shape), roles=tuple(roles))


Scope = dict[str, Known]


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
            roles = self.one_of(("iiio", "oiii", "biio", "iio"))  # as convolutions have them
        shape = tuple(self.size() for _ in roles)
        ranks = [math.prod(size for size, its in zip(shape, roles, strict=True) if its == role) for role in "io"]
        variant = self.one_of(("LoRA", "LoRA", "LoRA", "LoRA", "RSLoRA", "Full", None))
        return fp.Leaf(shape, roles, self.number(1, min(2, *ranks)), variant)

    def kernel(self, scope: Scope, most: int = 3) -> tuple[K, Known]:
        name = self.one_of(sorted(scope))
        moves, known = self.moves(scope, scope[name], most)
        return K(name, moves), known

    def moves(self, scope: Scope, known: Known, most: int) -> tuple[tuple[Any, ...], Known]:
        moves = []
        for _ in range(self.number(0, most)):
            move, known = self.move(scope, known)
            moves += [] if move is None else [move]
        return tuple(moves), known

    def move(self, scope: Scope, known: Known) -> tuple[Any, Known]:
        return getattr(self, "_" + self.one_of([kind for kind in MOVES if kind in ENABLED]))(scope, known)

    def axis(self, known: Known) -> int:
        return self.number(0, known.ndim - 1)

    def _transpose(self, scope: Scope, known: Known) -> Any:
        order = tuple(self.order(range(known.ndim)))
        roles, shape = ([its[axis] for axis in order] for its in (known.roles, known.shape))
        return fp.Transpose(order), dataclasses.replace(known, roles=tuple(roles), shape=tuple(shape))

    def _reshape(self, scope: Scope, known: Known) -> Any:
        """Each run of axes of one role becomes other axes of the same size together."""
        runs: list[tuple[str, int]] = []
        for role, size in zip(known.roles, known.shape, strict=True):
            if runs and (size == 1 or role == runs[-1][0] or runs[-1][1] == 1):
                runs[-1] = (role if size > 1 else runs[-1][0], runs[-1][1] * size)
            else:
                runs.append((role, size))
        axes = [(role if part > 1 else "?", part) for role, size in runs for part in self._parts(size)]
        if len(axes) > 5:
            return None, known
        roles, shape = tuple(role for role, _ in axes), tuple(size for _, size in axes)
        return fp.Reshape(shape), dataclasses.replace(known, roles=roles, shape=shape).after_a_look_up()

    def _parts(self, size: int) -> list[int]:
        divisors = [part for part in range(2, size) if size % part == 0]
        if size == 1:
            return [1] * self.number(0, 1)
        parts = [size]
        if divisors and self.number(0, 1):
            first = self.one_of(divisors)
            parts = [first, size // first]
        return [*parts, 1] if self.chance(6) else parts

    def _squeeze(self, scope: Scope, known: Known) -> Any:
        ones = [axis for axis, size in enumerate(known.shape) if size == 1]
        if not ones:
            return None, known
        axis = self.one_of(ones)
        return fp.Squeeze(axis), known.without(axis, squeezed=True)

    def _expand(self, scope: Scope, known: Known) -> Any:
        if known.ndim > 4:
            return None, known
        axis = self.number(0, known.ndim)
        return fp.Expand(axis), self._new_axis(known, axis, 1)

    def _new_axis(self, known: Known, axis: int, size: int, role: str = "o") -> Known:
        roles = (*known.roles[:axis], role, *known.roles[axis:])
        return dataclasses.replace(known, roles=roles, shape=(*known.shape[:axis], size, *known.shape[axis:]))

    def _broadcast(self, scope: Scope, known: Known) -> Any:
        times = self.one_of((2, 3))
        if math.prod(known.shape) * times > LARGEST or known.ndim > 4:
            return None, known
        ones = [axis for axis, size in enumerate(known.shape) if size == 1 and known.roles[axis] != "?"]
        if ones and self.number(0, 1):
            repeated = known.with_axis(self.one_of(ones), times)
            return fp.Broadcast(repeated.shape, tuple(range(known.ndim))), repeated
        axis = self.number(0, known.ndim)
        wider = self._new_axis(known, axis, times)
        return fp.Broadcast(wider.shape, tuple(its for its in range(wider.ndim) if its != axis)), wider

    def _slice(self, scope: Scope, known: Known) -> Any:
        if not known.ndim:
            return None, known
        axis = self.axis(known)
        start = self.number(0, known.shape[axis] - 1)
        stop, stride = self.number(start + 1, known.shape[axis]), self.number(1, 2)
        return fp.Slice(axis, start, stop, stride), known.with_axis(axis, len(range(start, stop, stride)))

    def _dynamic_slice(self, scope: Scope, known: Known) -> Any:
        if not known.ndim:
            return None, known
        axis = self.axis(known)
        size = self.number(1, known.shape[axis])
        return fp.DynamicSlice(axis, size, self.number(-3, 2)), self._by_number(known.with_axis(axis, size))

    def _by_number(self, known: Known) -> Known:
        """What a move by the traced number gives: one for each, where each has its own."""
        return dataclasses.replace(known, mapped=known.mapped or self.numbered)

    def _index(self, scope: Scope, known: Known) -> Any:
        if not known.ndim:
            return None, known
        axis = self.axis(known)
        place = self.number(-known.shape[axis], known.shape[axis] - 1)
        return fp.Index(axis, place), known.without(axis, squeezed=True)

    def _dynamic_index(self, scope: Scope, known: Known) -> Any:
        if not known.ndim:
            return None, known
        axis = self.axis(known)
        # Where each has its own number the library sees more axes than these.
        after = self._by_number(known).without(axis, squeezed=True)
        return fp.DynamicIndex(axis, self.number(-3, 2), bool(self.number(0, 1))), after

    def _rev(self, scope: Scope, known: Known) -> Any:
        return fp.Rev(tuple(self.some(range(known.ndim)))), known

    def _ids(self, size: int, shape: Shape, outside: int = 0) -> Any:
        """Of an axis of a size; with `outside` also beyond its ends."""
        if not shape:
            return self.number(-size - outside, size - 1 + outside)
        return tuple(self._ids(size, shape[1:], outside) for _ in range(shape[0]))

    def _picked(self, known: Known, axes: Sequence[int], shape: Shape, at: int) -> Known | None:
        """What is left when places along some axes are picked; the axes of the ids stand at `at`."""
        picked = {known.roles[axis] for axis in axes}
        rest = [axis for axis in range(known.ndim) if axis not in axes]
        roles, sizes = [known.roles[axis] for axis in rest], [known.shape[axis] for axis in rest]
        if "?" in picked | set(roles) or known.mapped or math.prod((*sizes, *shape)) > LARGEST:
            return None
        # Picked from both factors, from the one, or from the other.
        role = "b" if len(picked) > 1 or "b" in picked else picked.pop()
        roles[at:at], sizes[at:at] = [role] * len(shape), shape
        left = {known.roles[axis] for axis in rest}
        is_kernel = known.is_kernel and {"i", "o"} <= left
        return Known(tuple(roles), tuple(sizes), is_kernel)

    def _take(self, scope: Scope, known: Known) -> Any:
        if not known.ndim or known.is_kernel is None:
            return None, known
        return self._take_along(known, self.axis(known))

    def _take_along(self, known: Known, axis: int) -> Any:
        shape = (*self.shape(1), self.size())
        mode, traced = self.one_of((None, "clip", "wrap", "fill")), bool(self.number(0, 1)) and not self.numbered
        after = self._picked(known, [axis], shape, axis)
        if after is None:
            return None, known
        # Without a mode what is outside is no number.
        ids = self._ids(known.shape[axis], shape, outside=0 if mode is None else 2)
        return fp.Take(axis, ids, mode, traced), after

    def _lookup(self, scope: Scope, known: Known) -> Any:
        if not known.ndim or known.is_kernel is None:
            return None, known
        axes = self.some(range(known.ndim)) or [self.axis(known)]
        # Under vmap it cannot be told which axis of size 1 is picked, and what role the ids get.
        mapped = bool(self.number(0, 1)) and all(known.shape[axis] > 1 for axis in axes)
        shape = (*self.shape(1), self.size())
        # Indices with a slice between them go in front, as those of a vmap do; but what is left by the vmap of a
        # lookup with many axes of ids is in an order that is hard to tell, so that there is one.
        apart = axes[-1] - axes[0] >= len(axes)
        shape = shape[:1] if mapped else shape
        after = self._picked(known, axes, shape, 0 if apart or mapped else axes[0])
        if after is None:
            return None, known
        ids = tuple(self._ids(size, shape) if axis in axes else None for axis, size in enumerate(known.shape))
        return fp.Lookup(ids, bool(self.number(0, 1)) and not self.numbered, mapped), after

    def _split(self, scope: Scope, known: Known) -> Any:
        wide = [axis for axis, size in enumerate(known.shape) if size > 1]
        if not wide:
            return None, known
        axis = self.one_of(wide)
        at, part = self.number(1, known.shape[axis] - 1), self.number(0, 1)
        return fp.Split(axis, at, part), known.with_axis(axis, (at, known.shape[axis] - at)[part])

    def _concatenate(self, scope: Scope, known: Known) -> Any:
        """Beside kernels with the same roles, or arrays."""
        stacked = self.chance(4)
        if known.mapped or not known.is_kernel or not known.ndim or "?" in known.roles or (stacked and known.ndim > 4):
            return None, known
        axis = self.number(0, known.ndim) if stacked else self.axis(known)
        alike, size = [], 1 if stacked else known.shape[axis]
        for name in sorted(scope):
            other = scope[name]
            beside = [
                its for place, its in enumerate(zip(other.roles, other.shape, strict=True)) if stacked or place != axis
            ]
            own = [
                its for place, its in enumerate(zip(known.roles, known.shape, strict=True)) if stacked or place != axis
            ]
            same_role = stacked or (other.ndim > axis and other.roles[axis] == known.roles[axis])
            if other.ndim == known.ndim and beside == own and same_role and not other.mapped:
                alike.append(name)
        if not alike or math.prod(known.shape) * 2 > LARGEST:
            return None, known
        other = self.one_of(alike)
        size += 1 if stacked else scope[other].shape[axis]
        after = self._new_axis(known, axis, size, "b") if stacked else known.with_axis(axis, size)
        return fp.Concatenate(axis, (K(other),), stacked), after

    def _pad(self, scope: Scope, known: Known) -> Any:
        if math.prod(known.shape) * 3 > LARGEST:
            return None, known
        config = tuple((self.number(0, 1), self.one_of((0, 1, -1)), self.number(0, 1)) for _ in known.shape)
        shape = tuple(
            size + low + high + (size - 1) * between
            for size, (low, high, between) in zip(known.shape, config, strict=True)
        )
        if not all(shape) or math.prod(shape) > LARGEST or "?" in known.roles:
            return None, known
        return fp.Pad(config, self.one_of((0.0, 0.5))), dataclasses.replace(known, shape=shape)

    def _times(self, scope: Scope, known: Known) -> Any:
        """With an array that varies along inputs or along outputs."""
        roles = {"b", "?", self.one_of("io")}
        if not known.ndim or not known.is_kernel or known.mapped:
            return None, known
        shape = zip(known.roles, known.shape, strict=True)
        return fp.Times(tuple(size if role in roles and self.number(0, 1) else 1 for role, size in shape)), known

    def _scale(self, scope: Scope, known: Known) -> Any:
        how = self.one_of([how for how in fp.SCALES if how != "traced" or not self.numbered])
        return fp.Scale(how, 1.0 if how == "neg" else self.one_of((0.5, -1.5, 2.0))), known

    def _cast(self, scope: Scope, known: Known) -> Any:
        return (fp.Cast(), known) if self.chance(3) else (None, known)

    def _copy(self, scope: Scope, known: Known) -> Any:
        return fp.Copy(self.one_of([*fp.COPIES])), known

    def _within(self, scope: Scope, known: Known) -> Any:
        how = self.one_of(("jit", "remat", "vmap", "map"))
        if how in ("jit", "remat"):
            moves, after = self.moves(scope, known, 2)
            return (fp.Within(how, moves), after) if moves else (None, known)
        if not known.ndim or known.mapped or not known.is_kernel:
            return None, known
        inner = known.without(0, squeezed=how == "map")
        moves, after = self.moves(scope, dataclasses.replace(inner, mapped=how == "vmap"), 2)
        if any(isinstance(move, fp.Concatenate) for move in fp.steps_of(moves)):
            return None, known
        # A scan stacks what its turns return: they are layers.
        role = known.roles[0] if how == "vmap" else "b"
        return fp.Within(how, moves), Known(
            (role, *after.roles), (known.shape[0], *after.shape), after.is_kernel, known.mapped
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
        kernel, known = self.kernel(scope)
        if known.is_kernel and known.ndim and not known.mapped:
            return fp.Opaque(self.one_of([*fp.OPAQUE]), kernel)
        return self._dot(scope, depth)

    def _act(self, scope: Scope, depth: int) -> Any:
        return fp.Act(self.one_of([*fp.ACTIVATIONS]))

    def _dot(self, scope: Scope, depth: int) -> Any:
        kernel, known = self.kernel(scope)
        uses = [self.one_of(("summed", "summed", "free", "batch")) for _ in known.shape]
        own = [self.size() for _ in range(self.number(0, 2))]
        met = [axis for axis, use in enumerate(uses) if use != "free"]
        axes = self.order([*met, *(-1 - number for number in range(len(own)))])
        x = tuple(own[-1 - axis] if axis < 0 else known.shape[axis] for axis in axes)
        pairs = []
        for kind in ("summed", "batch"):
            ours = self.order([axis for axis in met if uses[axis] == kind])
            pairs.append((tuple(ours), tuple(axes.index(axis) for axis in ours)))
        return fp.Dot(kernel, x, tuple(pairs), bool(self.number(0, 1)))

    def _both(self, scope: Scope, depth: int) -> Any:
        (one, its), (other, theirs) = self.kernel(scope, 2), self.kernel(scope, 2)
        left = [*range(theirs.ndim)]
        pairs: dict[str, list[tuple[int, int]]] = {"summed": [], "batch": []}
        for axis, size in enumerate(its.shape):
            fitting = [place for place in left if theirs.shape[place] == size]
            use = self.one_of(("summed", "free", "batch"))
            if fitting and use != "free":
                place = self.one_of(fitting)
                left.remove(place)
                pairs[use].append((axis, place))
        numbers = tuple(tuple(tuple(side) for side in zip(*its, strict=True)) or ((), ()) for its in pairs.values())
        return fp.Both(one, other, numbers)

    def _conv(self, scope: Scope, depth: int) -> Any:
        kernel, known = self.kernel(scope)
        kernel, known = self._indexed(kernel, known, known.having("b"))
        ins, outs = known.having("i"), known.having("o")
        if known.having("?") or not ins or not outs or not known.is_kernel or known.mapped or known.ndim > 5:
            return self._dot(scope, depth)
        channels = [self.one_of(ins), self.one_of(outs)]
        windows = self.order([axis for axis in range(known.ndim) if axis not in channels])
        w_in, w_out = channels if self.number(0, 3) else channels[::-1]
        size_in, size_out = known.shape[w_in], known.shape[w_out]
        groups = size_out if self.chance(3) and "conv in groups" in ENABLED and not self.in_gradient else 1
        strides, lhs_dilation, rhs_dilation = (tuple(self.one_of((1, 2)) for _ in windows) for _ in range(3))
        padding = tuple((self.number(0, 1), self.number(0, 1)) for _ in windows)
        extents = [(known.shape[axis] - 1) * by + 1 for axis, by in zip(windows, rhs_dilation, strict=True)]
        spatial = [extent + self.number(0, 2 if len(windows) < 2 else 1) for extent in extents]
        x_spec, out_spec = (tuple(self.order(range(known.ndim))) for _ in range(2))
        sizes = dict(zip(x_spec, (self.number(1, 2), size_in * groups, *spatial), strict=True))
        x = tuple(sizes[axis] for axis in range(known.ndim))
        spec = (x_spec, (w_out, w_in, *windows), out_spec)
        return fp.Conv(kernel, x, spec, strides, padding, lhs_dilation, rhs_dilation, groups)

    def _indexed(self, kernel: K, known: Known, axes: Sequence[int]) -> tuple[K, Known]:
        """The kernel at one place of some axes."""
        moves = [*kernel.moves]
        for axis in sorted(axes, reverse=True):
            moves.append(fp.Index(axis, self.number(0, known.shape[axis] - 1)))
            known = known.without(axis, squeezed=True)
        return K(kernel.name, tuple(moves)), known

    def _ragged(self, scope: Scope, depth: int) -> Any:
        """Any three axes."""
        kernel, known = self.kernel(scope)
        order = self.order(range(known.ndim))
        if known.ndim < 3 or not known.is_kernel or known.mapped or self.in_vmap:
            return self._dot(scope, depth)
        kernel, known = self._indexed(kernel, known, order[3:])
        groups, size = known.shape[:2]
        sizes = tuple(self.number(0, 2) for _ in range(groups))
        return fp.Ragged(kernel, (max(1, sum(sizes)), size), sizes)

    def _add(self, scope: Scope, depth: int) -> Any:
        """What a lookup leaves, if it is no kernel."""
        kernel, known = self.kernel(scope)
        for role in self.order("io"):
            if known.is_kernel and not known.mapped and "?" not in known.roles and known.having(role):
                lookup, after = self._row(known, known.having(role))
                kernel, known = K(kernel.name, (*kernel.moves, *lookup)), after
        return fp.Add(kernel) if known.is_kernel is False else self._dot(scope, depth)

    def _row(self, known: Known, axes: Sequence[int]) -> tuple[tuple[Any, ...], Known]:
        """One place along some axes, or several."""
        if len(axes) == 1 and "take" in ENABLED and self.number(0, 1):
            move, after = self._take_along(known, axes[0])
            if move is not None:
                return (move,), after
        kernel, after = self._indexed(K(""), known, axes)
        return kernel.moves, after

    # Control flow

    def _jit(self, scope: Scope, depth: int) -> Any:
        times = self.one_of((1, 1, 2))
        alike = [(one, other) for one in scope for other in scope if one < other and scope[one] == scope[other]]
        swap = self.one_of(alike) if alike and times == 2 else None
        return fp.Jit(self.body(scope, depth - 1), self.shape(2), times, swap)

    def _remat(self, scope: Scope, depth: int) -> Any:
        policy = self.one_of((None, "everything_saveable", "dots_saveable", "nothing_saveable"))
        return fp.Remat(self.body(scope, depth - 1), policy, not self.number(0, 1))

    def _bound(self, scope: Scope, *, mapped: bool, size: int | None = None) -> tuple[tuple[fp.Bound, ...], Scope, int]:
        """Kernels to take apart along axes of one size, and the scope with their slices."""
        bound: list[fp.Bound] = []
        inner = dict(scope)
        for _ in range(self.number(0, 2)):
            kernel, known = self.kernel(scope, 1)
            fitting = [axis for axis, its in enumerate(known.shape) if size in (None, its)]
            if not fitting:
                continue
            axis = self.one_of(fitting)
            name, size = self.name(), known.shape[axis]
            inner[name] = known.without(axis, squeezed=not mapped)
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
        # The vmap of a branch that depends on the value selects among the operands, too.
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
        scope = {name: self._known(leaf) for name, leaf in leaves}
        x, body = self.shape(2), self.body(scope, self.one_of((1, 2, 1, 0)), 3)
        steps = fp.steps_of(body)
        loops = any(isinstance(step, fp.Loop) and step.traced for step in steps)
        under = FORWARD if loops else REVERSE
        if any(isinstance(step, fp.Ragged) for step in steps):
            under = [its for its in under if its in RAGGED]
        return fp.Program(tuple(leaves), x, body, self.one_of(under))

    def _known(self, leaf: fp.Leaf) -> Known:
        return Known(tuple(leaf.axes), leaf.shape, leaf.variant in ("LoRA", "RSLoRA"))


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
# What is compared with the oracle, as often as it stands here.
REVERSE = ("gradient",) * 60 + ("jvp", "over_x", "over_adapter", "second", "second_in_reverse") * 6 + ("jit", "eager")
FORWARD = ("forward", "jvp", "over_x", "over_adapter")  # JAX has no gradient through a loop whose end is traced
RAGGED = ("gradient", "gradient", "gradient", "jvp")  # nor most other derivatives of `ragged_dot`
CONSUMERS = ("dot", "dot", "dot", "both", "conv", "ragged", "add", "add", "act")
CONTROL = ("jit", "remat", "scan", "scan", "loop", "switch", "vmap", "gradient")

# One source for all choices, which hypothesis shrinks. With a strategy for each choice it would spend its time on
# mutations of a program, which differ from it by a number.
programs = st.randoms(use_true_random=False).map(lambda random: Drawing(random).program())
