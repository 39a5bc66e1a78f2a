"""Applies one adapter to each example of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array, lax

from .._core.paths import Pattern
from .._errors import AdapterError, SpecError, UnsupportedError, listed
from .._transform.lora import lora
from .._transform.program import is_array
from .._transform.settings import CustomDerivatives
from ._coupling import couplings
from ._member import Member, Stack
from ._select import Unknown, select

_SHARED = -1  # in place of the axis of the examples, for an argument that all examples share


def per_example(
    apply: Callable[..., Any],
    *,
    in_axes: int | Sequence[Any] | None = 0,
    out_axes: Any = 0,
    unknown: Unknown = "nan",
    allow_coupled: bool = False,
    materialize: Sequence[Pattern] = (),
    custom_derivatives: CustomDerivatives = "refuse",
) -> Callable[..., Any]:
    """Transforms `apply(params, *args)` into a function that applies another adapter of a stack to each example.

        y_n = x_n·W0 + ((x_n·A_k)·s_k)·B_k        for example n with adapter k

    It is `jax.vmap` over the examples and their adapters, with a batch of one example in `apply`. `W0` is not mapped,
    so `x·W0` is one product for the whole batch. The low-rank FLOPs are those of each example's own adapter, padded to
    the rank of the stack, and do not depend on the number of adapters in it. The factors are gathered for each example.
    A `Full` leaf, too, is gathered, and multiplied for each example.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params, apply = {"kernel": jnp.ones((4, 3))}, lambda params, x: x @ params["kernel"]
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=1, alpha=1)})
    >>> mixed = lj.many.per_example(apply)
    >>> mixed(params, lj.many.stack({"fr": adapter}), ["fr", "base"], jnp.ones((2, 4))).shape
    (2, 3)

    Args:
      apply: as for `lora`, of a batch of examples. It is evaluated for one example at a time, so an operation that
        combines examples, as BatchNorm does in training, has another result. Such a model is refused if tracing it
        finds the operation; a model that cannot be traced with two and three examples is not checked.
      in_axes: the axis of the examples in the arrays of the positional arguments, as in `jax.vmap`: one for all, or a
        sequence with one, or a tree of them, for each argument. None is for what all examples share. In keyword
        arguments it is the leading axis.
      out_axes: the axis of the examples in the arrays of the result of `apply`: one for all, or a tree of them.
      unknown: as in `select`.
      allow_coupled: accept a model that combines examples, if the results do not depend on it, as for experts without a
        capacity or an early exit when all examples are done.
      materialize: as in `lora`.
      custom_derivatives: as in `lora`.

    Returns:
      `mixed(params, stacked, which, *args, dropout_key=None, token_weights=None, **kwargs)`, with the result of
      `apply`. `which` are names or numbers as for `select`, one per example. If it is None, `stacked` is what `select`
      has returned for them, so that several calls, such as the steps of decoding, gather the factors once. Examples
      have different dropout masks.

    Raises:
      AdapterError: at the call, if there is not one adapter per example, or `in_axes` or `out_axes` do not fit the
        arguments or the result; and as `select` and `lora`.
      SpecError: if `out_axes` contains None.
      UnsupportedError: at the call, if the model combines examples; and as `lora`.
    """
    adapted = lora(apply, materialize=materialize, custom_derivatives=custom_derivatives, form="factored")
    axes_of_out = jax.tree.leaves(out_axes, is_leaf=_is_none)
    if None in axes_of_out:
        raise SpecError(f"Expected the axis of the examples in each result; got out_axes={out_axes!r}.")

    def mixed(
        params: Any, stacked: Stack | Member, which: Any, /, *args: Any, dropout_key: Any = None, **kwargs: Any
    ) -> Any:
        members = _selected(stacked, which, unknown)
        axes = _axes_of_arguments(args, kwargs, in_axes)
        leaves, treedef = jax.tree.flatten((args, kwargs))
        axis_of, _ = jax.tree.flatten(axes)
        counts = {leaf.shape[axis] for leaf, axis in zip(leaves, axis_of, strict=True) if axis != _SHARED}
        shape = next(iter(members.settings.values())).scale.shape
        if len(shape) != 1 or counts != set(shape):
            raise AdapterError(
                f"Expected one adapter per example; got {list(shape)} adapters and {sorted(counts)} examples.\n"
                "  Pass one name or number for each example; `in_axes` says where the examples are."
            )
        if not allow_coupled:
            _check_coupling(apply, params, args, kwargs, axes)
        keys = None if dropout_key is None else jax.random.split(dropout_key, shape[0])
        mapped = [None if axis == _SHARED else leaf for leaf, axis in zip(leaves, axis_of, strict=True)]

        returned: list[tuple[Any, list[Any], list[int]]] = []  # what `apply` returned, and the axes of the examples

        def one(member: Member, mapped: list[Any], key: Any) -> dict[int, list[Array]]:
            given = [
                leaf if axis == _SHARED else lax.expand_dims(part, [axis])
                for leaf, part, axis in zip(leaves, mapped, axis_of, strict=True)
            ]
            args, kwargs = jax.tree.unflatten(treedef, given)
            out = adapted(params, member, *args, dropout_key=key, **kwargs)
            found, structure = jax.tree.flatten(out)
            out_axis_of = _broadcast("out_axes", out_axes, out)
            returned.append((structure, [None if is_array(y) else y for y in found], out_axis_of))
            by_axis: dict[int, list[Array]] = {axis: [] for axis in axes_of_out}
            for y, axis in zip(found, out_axis_of, strict=True):
                if is_array(y):
                    by_axis[axis].append(_without_example(y, axis))
            return by_axis

        mapped_axes = [None if axis == _SHARED else axis for axis in axis_of]
        each = jax.vmap(one, in_axes=(0, mapped_axes, 0), out_axes={axis: axis for axis in axes_of_out})
        arrays = {axis: iter(found) for axis, found in each(members, mapped, keys).items()}
        structure, others, out_axis_of = returned[-1]
        found = [next(arrays[axis]) if y is None else y for y, axis in zip(others, out_axis_of, strict=True)]
        return jax.tree.unflatten(structure, found)

    mixed.__name__ = f"per_example({getattr(apply, '__name__', type(apply).__name__)})"
    return mixed


def _without_example(y: Array, axis: int) -> Array:
    if not -y.ndim <= axis < y.ndim or y.shape[axis] != 1:
        raise UnsupportedError(
            f"Expected results with one element per example along axis {axis}; of one example, got shape {y.shape}.",
            None,
            "Return arrays with an axis of examples, and pass it as out_axes.",
        )
    return lax.squeeze(y, [axis])


def _selected(stacked: Stack | Member, which: Any, unknown: Unknown) -> Member:
    """Returns the adapters of the examples."""
    if isinstance(stacked, Member) and which is None:
        return stacked
    if isinstance(stacked, Stack) and which is not None:
        return select(stacked, which, unknown=unknown)
    raise AdapterError(
        "Expected a `Stack` and a name or number per example, or what `select` returns for them and None; "
        f"got {type(stacked).__name__} and {which!r}."
    )


def _axes_of_arguments(args: Sequence[Any], kwargs: dict[str, Any], in_axes: int | Sequence[Any] | None) -> Any:
    """Returns a tree like `(args, kwargs)`, with the axis of the examples of each leaf, or `_SHARED`."""
    by_argument = [in_axes] * len(args) if isinstance(in_axes, int | None) else list(in_axes)
    if len(by_argument) != len(args):
        raise AdapterError(
            f"Expected `in_axes` for each of the {len(args)} arguments after the adapters; got {len(by_argument)}."
        )

    def axes(argument: Any, given: Any) -> Any:
        leaves, structure = jax.tree.flatten(argument)
        found = _broadcast("in_axes", given, argument)
        return jax.tree.unflatten(structure, [_axis(leaf, axis) for leaf, axis in zip(leaves, found, strict=True)])

    of_args = tuple(axes(argument, given) for argument, given in zip(args, by_argument, strict=True))
    return of_args, {name: axes(argument, 0) for name, argument in kwargs.items()}


def _broadcast(name: str, axes: Any, tree: Any) -> list[Any]:
    """Returns an axis for each leaf of a tree.

    Raises:
      AdapterError: if `axes` is neither an axis nor a prefix of the tree.
    """
    found: list[Any] = []
    try:
        jax.tree.map(lambda axis, part: found.extend([axis] * len(jax.tree.leaves(part))), axes, tree, is_leaf=_is_none)
    except ValueError as error:
        raise AdapterError(
            f"Expected an axis, or a tree of axes, for {jax.tree.structure(tree)}; got {axes!r} in `{name}`."
        ) from error
    return found


def _is_none(axis: Any) -> bool:
    return axis is None


def _axis(leaf: Any, axis: int | None) -> int:
    if axis is None or not is_array(leaf):
        return _SHARED
    if not -leaf.ndim <= axis < leaf.ndim:
        raise AdapterError(
            f"Expected an array with an axis {axis} for the examples; got the shape {leaf.shape}.\n"
            "  Pass None in `in_axes` for an argument that all examples share; close over such a keyword argument."
        )
    return axis % leaf.ndim


def _check_coupling(apply: Any, params: Any, args: Any, kwargs: dict[str, Any], axes: Any) -> None:
    of_args, of_kwargs = axes
    own = {name: value for name, value in kwargs.items() if name != "token_weights"}  # the others are the model's
    found = couplings(apply, params, args, own, (of_args, {name: of_kwargs[name] for name in own}))
    if found:
        raise UnsupportedError(
            "Expected a model that treats the examples of a batch separately; "
            f"{len(found)} of its operations combine them.\n{listed(found)}",
            None,
            "Use running statistics (evaluation mode), and return a result for each example; or pass "
            "allow_coupled=True if the results do not depend on it.",
        )
