"""Evaluates a traced function on NumPy arrays, because compiling takes most of the time of a small program.

Loops run in Python. JAX evaluates each primitive that is not in the table by itself, so that the compiled code is
cached for the next program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.lax import GatherScatterMode

from lora_jax._compat import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, normal_parameters

Arrays = list[Any]


def evaluate(closed: ClosedJaxpr, args: Sequence[Any]) -> Arrays:
    """Evaluates a jaxpr on NumPy arrays."""
    return _run(closed.jaxpr, [np.asarray(const) for const in closed.consts], args)


def without_compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    """Evaluates the function on NumPy arrays if NumPy supports all of it, and compiles it otherwise."""

    def run(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        if not _numpy_evaluates(closed.jaxpr):
            return jax.jit(function)(*args)
        results = evaluate(closed, [np.asarray(leaf) for leaf in jax.tree.leaves(args)])
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return run


def _numpy_evaluates(jaxpr: Jaxpr) -> bool:
    """Whether NumPy computes as JAX does in the dtypes of all arrays, and every inner jaxpr belongs to a known call."""
    for eqn in jaxpr.eqns:
        inner = [x for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr) if _is_jaxpr(x)]
        if eqn.primitive.name in _NUMPY:
            inner = []  # the jaxpr of a scatter is its addition
        elif inner and eqn.primitive.name not in _CALLS:
            return False
        atoms = (*eqn.invars, *eqn.outvars)
        if not all(getattr(atom.aval, "dtype", None) in _DTYPES for atom in atoms):
            return False
        if not all(_numpy_evaluates(getattr(x, "jaxpr", x)) for x in inner):
            return False
    return True


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, ClosedJaxpr | Jaxpr)


_DTYPES = {np.dtype(name) for name in ("float32", "float64", "int32", "int64", "uint32", "uint8", "int8", "bool")}


def _run(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> Arrays:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        values.update(zip(eqn.outvars, _equation(eqn, [read(atom) for atom in eqn.invars]), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(eqn: JaxprEqn, args: Arrays) -> Arrays:
    name = eqn.primitive.name
    if name in _CALLS:
        return _CALLS[name](args, **normal_parameters(eqn))
    if name in _NUMPY:
        out = _NUMPY[name](*args, **eqn.params)
        return [np.asarray(out, eqn.outvars[0].aval.dtype)]
    out = eqn.primitive.bind(*args, **eqn.params)
    return [np.asarray(x) for x in (out if eqn.primitive.multiple_results else [out])]


# Calls and loops


def _call(args: Arrays, *, jaxpr: Any, **_: Any) -> Arrays:
    return evaluate(jaxpr, args) if isinstance(jaxpr, ClosedJaxpr) else _run(jaxpr, (), args)


def _custom(args: Arrays, *, call_jaxpr: ClosedJaxpr, **_: Any) -> Arrays:
    return evaluate(call_jaxpr, args)


def _cond(args: Arrays, *, branches: Sequence[ClosedJaxpr], **_: Any) -> Arrays:
    index, *operands = args
    return evaluate(branches[int(np.clip(index, 0, len(branches) - 1))], operands)


def _while(
    args: Arrays,
    *,
    cond_nconsts: int,
    cond_jaxpr: ClosedJaxpr,
    body_nconsts: int,
    body_jaxpr: ClosedJaxpr,
) -> Arrays:
    ends, consts = args[:cond_nconsts], args[cond_nconsts : cond_nconsts + body_nconsts]
    carry = args[cond_nconsts + body_nconsts :]
    while np.any(going := evaluate(cond_jaxpr, [*ends, *carry])[0]):
        out = evaluate(body_jaxpr, [*consts, *carry])
        # Under vmap each example ends after its own number of iterations.
        spread = (going.reshape(going.shape + (1,) * (x.ndim - going.ndim)) for x in out)
        carry = [np.where(active, new, old) for active, new, old in zip(spread, out, carry, strict=True)]
    return carry


def _scan(
    args: Arrays, *, jaxpr: ClosedJaxpr, length: int, reverse: bool, num_consts: int, num_carry: int, **_: Any
) -> Arrays:
    consts, carry, xs = args[:num_consts], args[num_consts : num_consts + num_carry], args[num_consts + num_carry :]
    iterations = []
    for iteration in range(length)[:: -1 if reverse else 1]:
        out = evaluate(jaxpr, [*consts, *carry, *(x[iteration] for x in xs)])
        carry = out[:num_carry]
        iterations.append(out[num_carry:])
    shapes = jaxpr.jaxpr.outvars[num_carry:]
    if not iterations:
        return [*carry, *(np.zeros((0, *var.aval.shape), var.aval.dtype) for var in shapes)]
    return [*carry, *(np.stack(ys) for ys in zip(*iterations[:: -1 if reverse else 1], strict=True))]


_CALLS: dict[str, Callable[..., Arrays]] = {
    "jit": _call,
    "checkpoint": _call,
    "remat2": _call,
    "closed_call": _custom,
    "eval_jaxpr": _custom,  # the name in JAX 0.12
    "custom_jvp_call": _custom,
    "custom_vjp_call": _custom,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}

# Single primitives


def _dot_general(x: Any, y: Any, *, dimension_numbers: Any, **_: Any) -> Any:
    (x_summed, y_summed), (x_batch, y_batch) = dimension_numbers
    x_labels = [*range(x.ndim)]
    y_labels = [x.ndim + axis for axis in range(y.ndim)]
    for x_axis, y_axis in zip((*x_summed, *x_batch), (*y_summed, *y_batch), strict=True):
        y_labels[y_axis] = x_labels[x_axis]
    rest = [
        label for label in (*x_labels, *y_labels) if label not in {x_labels[axis] for axis in (*x_summed, *x_batch)}
    ]
    return np.einsum(x, x_labels, y, y_labels, [*(x_labels[axis] for axis in x_batch), *rest])


def _broadcast_in_dim(x: Any, *, shape: Any, broadcast_dimensions: Any, **_: Any) -> Any:
    between = [1] * len(shape)
    for size, axis in zip(x.shape, broadcast_dimensions, strict=True):
        between[axis] = size
    return np.broadcast_to(x.reshape(between), shape)


def _slice(x: Any, *, start_indices: Any, limit_indices: Any, strides: Any) -> Any:
    steps = strides or (1,) * x.ndim
    return x[tuple(map(slice, start_indices, limit_indices, steps))]


def _starts(shape: Any, sizes: Any, starts: Any) -> Any:
    return [int(np.clip(start, 0, size - window)) for start, size, window in zip(starts, shape, sizes, strict=True)]


def _dynamic_slice(x: Any, *starts: Any, slice_sizes: Any) -> Any:
    first = _starts(x.shape, slice_sizes, starts)
    return x[tuple(slice(start, start + size) for start, size in zip(first, slice_sizes, strict=True))]


def _dynamic_update_slice(x: Any, update: Any, *starts: Any) -> Any:
    first = _starts(x.shape, update.shape, starts)
    x = x.copy()
    x[tuple(slice(start, start + size) for start, size in zip(first, update.shape, strict=True))] = update
    return x


def _pad(x: Any, value: Any, *, padding_config: Any) -> Any:
    if not padding_config:
        return x
    inside = [
        max(0, size + (size - 1) * between) for size, (_, _, between) in zip(x.shape, padding_config, strict=True)
    ]
    wide = np.full(inside, value, x.dtype)
    wide[tuple(slice(None, None, between + 1) for _, _, between in padding_config)] = x
    wide = np.pad(wide, [(max(0, low), max(0, high)) for low, high, _ in padding_config], constant_values=value)
    limits = [
        (max(0, -low), size - max(0, -high)) for size, (low, high, _) in zip(wide.shape, padding_config, strict=True)
    ]
    return wide[tuple(slice(*slices) for slices in limits)]


def _conv_general_dilated(
    x: Any,
    w: Any,
    *,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any,
    rhs_dilation: Any,
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
    **_: Any,
) -> Any:
    x_spec, w_spec, out_spec = dimension_numbers
    x, w = x.transpose(x_spec), w.transpose(w_spec)
    zero = np.zeros((), x.dtype)
    inside = [(low, high, by - 1) for (low, high), by in zip(padding, lhs_dilation, strict=True)]
    x = _pad(x, zero, padding_config=[(0, 0, 0), (0, 0, 0), *inside])
    w = _pad(w, zero, padding_config=[(0, 0, 0), (0, 0, 0), *((0, 0, by - 1) for by in rhs_dilation)])
    window = w.shape[2:]
    # (batch, channel, place…, window…)
    places = np.lib.stride_tricks.sliding_window_view(x, window, tuple(range(2, x.ndim))) if window else x
    places = places[(slice(None), slice(None), *(slice(None, None, by) for by in window_strides))]
    groups = max(feature_group_count, batch_group_count)
    axis = 1 if feature_group_count > 1 else 0
    parts = zip(np.split(places, groups, axis), np.split(w, groups, 0), strict=True)
    summed = [1, *range(2 + len(window), places.ndim)]
    outs = [np.tensordot(part, kernel, (summed, range(1, w.ndim))) for part, kernel in parts]
    # (batch, place…, out)
    return np.moveaxis(np.concatenate(outs, -1), -1, 1).transpose(np.argsort(out_spec))


def _windows(indices: Any, shape: Any, sizes: Any, mode: Any, start_axes: Any, batching: Any) -> Any:
    """Yields for each index its position in the batch, the slices of its window, and whether it is in bounds."""
    for place in np.ndindex(indices.shape[:-1]):
        start = np.zeros(len(shape), int)
        start[[*start_axes]] = indices[place]
        for axis, batch in zip(*batching, strict=True):
            start[axis] = place[batch]
        last = np.subtract(shape, sizes)
        inside = bool(np.all((start >= 0) & (start <= last)))
        if mode == GatherScatterMode.CLIP:
            start, inside = np.clip(start, 0, last), True
        yield place, tuple(slice(at, at + size) for at, size in zip(start, sizes, strict=True)), inside


def _gather(
    x: Any, indices: Any, *, dimension_numbers: Any, slice_sizes: Any, mode: Any, fill_value: Any, **_: Any
) -> Any:
    numbers = dimension_numbers
    batching = (numbers.operand_batching_dims, numbers.start_indices_batching_dims)
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    window = tuple(size for axis, size in enumerate(slice_sizes) if axis not in dropped)
    fill = np.nan if np.issubdtype(x.dtype, np.floating) else 0
    out = np.full((*indices.shape[:-1], *window), fill if fill_value is None else fill_value, x.dtype)
    for place, slices, inside in _windows(indices, x.shape, slice_sizes, mode, numbers.start_index_map, batching):
        if inside:
            out[place] = x[slices].reshape(window)
    return np.moveaxis(out, range(indices.ndim - 1, out.ndim), numbers.offset_dims)


def _scatter_add(x: Any, indices: Any, updates: Any, *, dimension_numbers: Any, mode: Any, **_: Any) -> Any:
    numbers = dimension_numbers
    batching = (numbers.operand_batching_dims, numbers.scatter_indices_batching_dims)
    updates = np.moveaxis(updates, numbers.update_window_dims, range(indices.ndim - 1, updates.ndim))
    window = iter(updates.shape[indices.ndim - 1 :])
    dropped = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    sizes = [1 if axis in dropped else next(window) for axis in range(x.ndim)]
    x = x.copy()
    axes = numbers.scatter_dims_to_operand_dims
    for place, slices, inside in _windows(indices, x.shape, sizes, mode, axes, batching):
        if inside:
            x[slices] += updates[place].reshape(sizes)
    return x


def _logistic(x: Any, **_: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **_: function(*args)


_NUMPY: dict[str, Callable[..., Any]] = {
    "dot_general": _dot_general,
    "broadcast_in_dim": _broadcast_in_dim,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "pad": _pad,
    "logistic": _logistic,
    "conv_general_dilated": _conv_general_dilated,
    "gather": _gather,
    "scatter-add": _scatter_add,
    "transpose": lambda x, *, permutation: x.transpose(permutation),
    "reshape": lambda x, *, new_sizes, dimensions, **_: x.transpose(dimensions or range(x.ndim)).reshape(new_sizes),
    "squeeze": lambda x, *, dimensions: x.squeeze(dimensions),
    "rev": lambda x, *, dimensions: np.flip(x, dimensions),
    "concatenate": lambda *xs, dimension: np.concatenate(xs, dimension),
    "reduce_sum": lambda x, *, axes, **_: x.sum(axes),
    "reduce_max": lambda x, *, axes, **_: x.max(axes),
    "integer_pow": lambda x, *, y: x**y,
    "select_n": lambda which, *cases: np.choose(which, cases) if which.dtype != bool else np.where(which, *cases[::-1]),
    "convert_element_type": lambda x, **_: x,  # `_equation` casts the result
    "iota": lambda *, dimension, shape, dtype, **_: np.broadcast_to(
        np.arange(shape[dimension]).reshape([-1 if axis == dimension else 1 for axis in range(len(shape))]), shape
    ),
    **{
        name: _elementwise(getattr(np, other))
        for name, other in {
            "add": "add",
            "add_any": "add",
            "sub": "subtract",
            "neg": "negative",
            "sin": "sin",
            "cos": "cos",
            "tanh": "tanh",
            "exp": "exp",
            "log1p": "log1p",
            "abs": "abs",
            "sign": "sign",
            "max": "maximum",
            "min": "minimum",
            "square": "square",
            "lt": "less",
            "le": "less_equal",
            "gt": "greater",
            "ge": "greater_equal",
            "eq": "equal",
            "ne": "not_equal",
            "rem": "fmod",
            "and": "bitwise_and",
            "or": "bitwise_or",
            "mul": "multiply",
            "copy": "asarray",
            "copy_p": "asarray",
            "name": "asarray",
            "stop_gradient": "asarray",
        }.items()
    },
    "clamp": lambda low, x, high: np.clip(x, low, high),
    "div": lambda x, y: x / y if np.issubdtype(x.dtype, np.floating) else np.trunc(x / y),
}
