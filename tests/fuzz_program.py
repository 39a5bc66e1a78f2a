"""The programs of the fuzzer, as data. Each step is callable and prints as the expression that constructs it.

A program transforms an activation `y` step by step. Each step reshapes `y` by itself (`fit`), so that steps can be in
any order and a program stays valid without one of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Scope:
    """The inputs of a step: kernels by name, and a traced number (1, or the iteration of a loop)."""

    kernels: Mapping[str, Array]
    number: Array

    def plus(self, **kernels: Array) -> Scope:
        return dataclasses.replace(self, kernels={**self.kernels, **kernels})


class Printed:
    """Prints as the expression that constructs it, without default values."""

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        given = [(field.name, getattr(self, field.name), field.default) for field in fields]
        shown = [
            repr(value) if default is dataclasses.MISSING else f"{name}={value!r}"
            for name, value, default in given
            if value != default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


step = dataclasses.dataclass(frozen=True, repr=False)


def fit(y: Array, shape: Shape) -> Array:
    """Reshapes an activation so that every element of the result depends on every element of `y`."""
    if y.shape == shape:
        return y
    size = math.prod(shape)
    return lax.reshape(lax.dot(lax.reshape(y, (y.size,)), _mixing(y.size, size)), shape)


@functools.cache
def _mixing(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(rows).choice([-1.0, 1.0], (rows, columns)) / np.sqrt(rows)


def run(body: tuple[Any, ...], scope: Scope, y: Array) -> Array:
    for step in body:
        y = step(scope, y)
    return y


# Kernels and moves


@step
class K(Printed):
    """A kernel of the scope after some moves."""

    name: str
    moves: tuple[Any, ...] = ()

    def __call__(self, scope: Scope) -> Array:
        return apply_moves(self.moves, scope, scope.kernels[self.name])


def apply_moves(moves: tuple[Any, ...], scope: Scope, w: Array) -> Array:
    for move in moves:
        w = move(scope, w)
    return w


@step
class Transpose(Printed):
    order: Shape

    def __call__(self, scope: Scope, w: Array) -> Array:
        return lax.transpose(w, self.order)


@step
class Reshape(Printed):
    shape: Shape

    def __call__(self, scope: Scope, w: Array) -> Array:
        return lax.reshape(w, self.shape)


@step
class Squeeze(Printed):
    axis: int

    def __call__(self, scope: Scope, w: Array) -> Array:
        return lax.squeeze(w, [self.axis])


@step
class Expand(Printed):
    axis: int

    def __call__(self, scope: Scope, w: Array) -> Array:
        return lax.expand_dims(w, [self.axis])


@step
class Broadcast(Printed):
    """Adds an axis, or repeats along an axis of size 1."""

    shape: Shape
    axes: Shape

    def __call__(self, scope: Scope, w: Array) -> Array:
        return lax.broadcast_in_dim(w, self.shape, self.axes)


@step
class Slice(Printed):
    axis: int
    start: int
    stop: int
    stride: int = 1

    def __call__(self, scope: Scope, w: Array) -> Array:
        return lax.slice_in_dim(w, self.start, self.stop, self.stride, self.axis)


@step
class DynamicSlice(Printed):
    """A slice that starts at the traced number plus `plus`."""

    axis: int
    size: int
    plus: int = 0

    def __call__(self, scope: Scope, w: Array) -> Array:
        return lax.dynamic_slice_in_dim(w, scope.number + self.plus, self.size, self.axis)


@step
class Index(Printed):
    """Indexes an axis, as in `w[:, 2]`."""

    axis: int
    place: int

    def __call__(self, scope: Scope, w: Array) -> Array:
        return w[(slice(None),) * self.axis + (self.place,)]


@step
class DynamicIndex(Printed):
    """Indexes an axis with the traced number: `w[:, i + plus]`, or `lax.dynamic_index_in_dim`."""

    axis: int
    plus: int = 0
    by_lax: bool = False

    def __call__(self, scope: Scope, w: Array) -> Array:
        place = scope.number + self.plus
        if self.by_lax:
            return lax.dynamic_index_in_dim(w, place, self.axis, keepdims=False)
        return w[(slice(None),) * self.axis + (place,)]


@step
class Rev(Printed):
    axes: Shape

    def __call__(self, scope: Scope, w: Array) -> Array:
        return lax.rev(w, self.axes)


@step
class Split(Printed):
    """One of the two parts of a kernel that is split."""

    axis: int
    at: int
    part: int

    def __call__(self, scope: Scope, w: Array) -> Array:
        return lax.split(w, (self.at, w.shape[self.axis] - self.at), self.axis)[self.part]


@step
class Concatenate(Printed):
    """Concatenates or stacks a kernel with others."""

    axis: int
    others: tuple[K, ...]
    stacked: bool = False

    def __call__(self, scope: Scope, w: Array) -> Array:
        parts = [w, *(other(scope) for other in self.others)]
        return jnp.stack(parts, self.axis) if self.stacked else lax.concatenate(parts, self.axis)


@step
class Scale(Printed):
    """Multiplies or divides by a scalar, or negates."""

    how: str
    by: float = 1.0

    def __call__(self, scope: Scope, w: Array) -> Array:
        return SCALES[self.how](w, self.by, scope)


SCALES: dict[str, Callable[[Array, float, Scope], Array]] = {
    "mul": lambda w, by, scope: w * by,
    "rmul": lambda w, by, scope: by * w,
    "div": lambda w, by, scope: w / by,
    "neg": lambda w, by, scope: -w,
    "traced": lambda w, by, scope: w * (by * (scope.number + 1).astype(w.dtype)),
}


@step
class Take(Printed):
    """`jnp.take` along an axis."""

    axis: int
    ids: Any
    mode: str | None = None
    traced: bool = False

    def __call__(self, scope: Scope, w: Array) -> Array:
        ids, fill = indices(scope, self.ids, traced=self.traced), 0.5 if self.mode == "fill" else None
        return jnp.take(w, ids, axis=self.axis, mode=self.mode, fill_value=fill)


@step
class Lookup(Printed):
    """`w[i, :, j]`: the ids of each axis, or None for a full slice. `mapped` maps it over the ids by `vmap`."""

    ids: tuple[Any, ...]
    traced: bool = False
    mapped: bool = False

    def __call__(self, scope: Scope, w: Array) -> Array:
        given = [indices(scope, ids, traced=self.traced) for ids in self.ids if ids is not None]

        def lookup(*given: Array) -> Array:
            rest = iter(given)
            return w[tuple(slice(None) if ids is None else next(rest) for ids in self.ids)]

        return (jax.vmap(lookup) if self.mapped else lookup)(*given)


def indices(scope: Scope, ids: Any, *, traced: bool) -> Any:
    array = np.asarray(ids, np.int32)
    return array + 0 * scope.number if traced else array


@step
class Pad(Printed):
    config: tuple[tuple[int, int, int], ...]
    value: float = 0.0

    def __call__(self, scope: Scope, w: Array) -> Array:
        return lax.pad(w, np.asarray(self.value, w.dtype), self.config)


@step
class Times(Printed):
    """Multiplies with an array that is broadcast to the kernel."""

    shape: Shape

    def __call__(self, scope: Scope, w: Array) -> Array:
        return w * (1 + np.arange(math.prod(self.shape)).reshape(self.shape) / 4)


@step
class Cast(Printed):
    """Casts to float32 and back."""

    def __call__(self, scope: Scope, w: Array) -> Array:
        return w.astype(jnp.float32).astype(jnp.float64)


@step
class Copy(Printed):
    how: str = "copy"

    def __call__(self, scope: Scope, w: Array) -> Array:
        return COPIES[self.how](w)


COPIES: dict[str, Callable[[Array], Array]] = {
    "copy": jnp.copy,
    "name": lambda w: jax.ad_checkpoint.checkpoint_name(w, "kernel"),
    "stop_gradient": lax.stop_gradient,
    "barrier": lax.optimization_barrier,
}


@step
class Within(Printed):
    """Applies moves inside a call that returns the kernel."""

    how: str
    moves: tuple[Any, ...]

    def __call__(self, scope: Scope, w: Array) -> Array:
        return CALLS[self.how](lambda w: apply_moves(self.moves, scope, w))(w)


# Without the copy, JAX removes a scan that returns its slices unchanged, and the kernel is not a stack of layers.
CALLS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "vmap": jax.vmap,
    "map": lambda function: lambda w: lax.scan(lambda carry, layer: (carry, function(jnp.copy(layer))), (), w)[1],
}

# Consumers of kernels


@step
class Dot(Printed):
    """Any `dot_general`; `numbers` as for `dot_general(kernel, x)`."""

    kernel: K
    x: Shape
    numbers: tuple[tuple[Shape, Shape], tuple[Shape, Shape]]
    kernel_first: bool = True

    def __call__(self, scope: Scope, y: Array) -> Array:
        w, x = self.kernel(scope), fit(y, self.x)
        if self.kernel_first:
            return lax.dot_general(w, x, self.numbers)
        return lax.dot_general(x, w, tuple(pair[::-1] for pair in self.numbers))


@step
class Both(Printed):
    """A `dot_general` of two kernels."""

    one: K
    other: K
    numbers: tuple[tuple[Shape, Shape], tuple[Shape, Shape]]

    def __call__(self, scope: Scope, y: Array) -> Array:
        product = lax.dot_general(self.one(scope), self.other(scope), self.numbers)
        return product + fit(y, ())


@step
class Conv(Printed):
    """A convolution; `spec` has the layouts of x, of the kernel and of the result."""

    kernel: K
    x: Shape
    spec: tuple[Shape, Shape, Shape]
    strides: Shape
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: Shape
    rhs_dilation: Shape
    groups: int = 1

    def __call__(self, scope: Scope, y: Array) -> Array:
        return lax.conv_general_dilated(
            fit(y, self.x),
            self.kernel(scope),
            self.strides,
            self.padding,
            self.lhs_dilation,
            self.rhs_dilation,
            lax.ConvDimensionNumbers(*self.spec),
            self.groups,
        )


@step
class Ragged(Printed):
    """`ragged_dot`: groups of rows of x, with a kernel for each group."""

    kernel: K
    x: Shape
    sizes: Shape

    def __call__(self, scope: Scope, y: Array) -> Array:
        return lax.ragged_dot(fit(y, self.x), self.kernel(scope), jnp.asarray(self.sizes, jnp.int32))


@step
class Add(Printed):
    """Uses a row of a kernel, which is an array."""

    kernel: K

    def __call__(self, scope: Scope, y: Array) -> Array:
        row = self.kernel(scope)
        return jnp.tanh(row) + fit(y, row.shape)


@step
class Opaque(Printed):
    """A use of a kernel that has no rule."""

    how: str
    kernel: K

    def __call__(self, scope: Scope, y: Array) -> Array:
        return OPAQUE[self.how](self.kernel(scope)) + fit(y, ())


# By primitive; none has a rule.
OPAQUE: dict[str, Callable[[Array], Array]] = {
    "exp": jnp.exp,
    "tanh": jnp.tanh,
    "add": lambda w: w + 1,
    "sub": lambda w: w - 1,
    "abs": jnp.abs,
    "square": jnp.square,
    "max": lambda w: lax.max(w, 0.0),
    "sort": lambda w: lax.sort(w, dimension=0),
    "cumsum": lambda w: lax.cumsum(w, 0),
    "reduce_max": lambda w: jnp.max(w, axis=0),
    "argmax": lambda w: lax.argmax(w, 0, np.int32).astype(w.dtype),
    "select_n": lambda w: lax.select(np.ones(w.shape, bool), w, np.zeros(w.shape)),
    "dynamic_update_slice": lambda w: lax.dynamic_update_slice(w, np.ones((1,) * w.ndim), [0] * w.ndim),
    "integer_pow": lambda w: w**3,
    "gt": lambda w: (w > 0).astype(w.dtype),
    "custom_jvp_call": jax.nn.relu,
}

# Steps without a kernel


@step
class Act(Printed):
    how: str

    def __call__(self, scope: Scope, y: Array) -> Array:
        return ACTIVATIONS[self.how](y)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
}

# Control flow

Bound = tuple[str, K, int]  # the name of the slices in the body, the kernel, and the axis


def _in_front(scope: Scope, bound: tuple[Bound, ...]) -> dict[str, Array]:
    return {name: jnp.moveaxis(kernel(scope), axis, 0) for name, kernel, axis in bound}


@step
class Jit(Printed):
    """A jitted function, called `times` times; `swap` exchanges two kernels after each call."""

    body: tuple[Any, ...]
    y: Shape
    times: int = 1
    swap: tuple[str, str] | None = None

    def __call__(self, scope: Scope, y: Array) -> Array:
        @jax.jit
        def call(kernels: Mapping[str, Array], number: Array, y: Array) -> Array:
            return run(self.body, Scope(kernels, number), y)

        kernels = dict(scope.kernels)
        for _ in range(self.times):
            y = call(kernels, scope.number, fit(y, self.y))
            if self.swap is not None:
                one, other = self.swap
                kernels[one], kernels[other] = kernels[other], kernels[one]
        return y


@step
class Remat(Printed):
    body: tuple[Any, ...]
    policy: str | None = None
    prevent_cse: bool = True

    def __call__(self, scope: Scope, y: Array) -> Array:
        policy = None if self.policy is None else getattr(jax.checkpoint_policies, self.policy)
        return jax.checkpoint(lambda y: run(self.body, scope, y), policy=policy, prevent_cse=self.prevent_cse)(y)


@step
class Scan(Printed):
    """A scan with kernels as constants, as slices (`stacked`), or unchanged in the carry (`carried`)."""

    body: tuple[Any, ...]
    carry: Shape
    length: int
    stacked: tuple[Bound, ...] = ()
    carried: tuple[str, ...] = ()
    reverse: bool = False
    unroll: int = 1
    emit: bool = False

    def __call__(self, scope: Scope, y: Array) -> Array:
        def iteration(carry: Any, layers: Any) -> Any:
            held, y = carry
            out = run(self.body, scope.plus(**layers, **held), y)
            return (held, y + fit(jnp.tanh(out), self.carry)), out if self.emit else None

        start = ({name: scope.kernels[name] for name in self.carried}, fit(y, self.carry))
        layers = _in_front(scope, self.stacked)
        (_, y), outs = lax.scan(iteration, start, layers, self.length, self.reverse, self.unroll)
        return outs if self.emit else y


@step
class Loop(Printed):
    """A `fori_loop` whose iteration is the traced number. With a traced end it is a `while`."""

    body: tuple[Any, ...]
    carry: Shape
    iterations: int
    traced: bool = False

    def __call__(self, scope: Scope, y: Array) -> Array:
        def iteration(number: Array, y: Array) -> Array:
            inner = dataclasses.replace(scope, number=jnp.asarray(number, jnp.int32))
            return y + fit(jnp.tanh(run(self.body, inner, y)), self.carry)

        end = scope.number + self.iterations - 1 if self.traced else self.iterations
        return lax.fori_loop(0, end, iteration, fit(y, self.carry))


@step
class Switch(Printed):
    """A `cond` or `switch`, on the traced number or, if `by_value`, on the sum of `y`."""

    branches: tuple[tuple[Any, ...], ...]
    out: Shape
    by_value: bool = False

    def __call__(self, scope: Scope, y: Array) -> Array:
        branches = [lambda y, body=body: fit(run(body, scope, y), self.out) for body in self.branches]
        if self.by_value and len(branches) == 2:
            return lax.cond(fit(y, ()) > 0, *branches, y)
        if self.by_value:
            return lax.switch(jnp.sum(fit(y, ()) < jnp.arange(1 - len(branches), 0)), branches, y)
        return lax.switch(scope.number, branches, y)


@step
class Vmap(Printed):
    """Maps the body over `y`, over slices of kernels and, if `numbered`, over numbers."""

    body: tuple[Any, ...]
    size: int
    y: Shape
    mapped: tuple[Bound, ...] = ()
    numbered: bool = False

    def __call__(self, scope: Scope, y: Array) -> Array:
        kernels = {name: kernel(scope) for name, kernel, _ in self.mapped}
        axes = {name: axis for name, _, axis in self.mapped}
        numbers = jnp.arange(self.size, dtype=jnp.int32) if self.numbered else scope.number

        def apply(layers: Any, number: Array, y: Array) -> Array:
            return run(self.body, Scope({**scope.kernels, **layers}, number), y)

        in_axes = (axes, 0 if self.numbered else None, 0)
        return jax.vmap(apply, in_axes)(kernels, numbers, fit(y, (self.size, *self.y)))


@step
class Gradient(Printed):
    """A gradient inside the model."""

    body: tuple[Any, ...]

    def __call__(self, scope: Scope, y: Array) -> Array:
        return jax.grad(lambda y: jnp.sum(jnp.sin(run(self.body, scope, y))))(y)


# Programs


@step
class Leaf(Printed):
    """A parameter: its shape, the roles of its axes, and its variant, or None if it is frozen."""

    shape: Shape
    axes: str
    rank: int = 1
    variant: str | None = "LoRA"


@step
class Program(Printed):
    """The parameters, the shape of x, the steps, and what is compared with the dense oracle."""

    leaves: tuple[tuple[str, Leaf], ...]
    x: Shape
    body: tuple[Any, ...]
    under: str = "gradient"

    def apply(self, params: Mapping[str, Array], x: Array, number: Array) -> Array:
        return run(self.body, Scope(params, number), x)


def steps_of(part: Any) -> list[Any]:
    """All steps and moves of a program, including nested ones."""
    if isinstance(part, tuple):
        return [step for inner in part for step in steps_of(inner)]
    if not isinstance(part, Printed):
        return []
    return [part, *steps_of(tuple(getattr(part, field.name) for field in dataclasses.fields(part)))]  # type: ignore[arg-type]
