"""Applies one adapter to each example of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array, lax

from .._core.paths import Pattern
from .._errors import AdapterError, UnsupportedError, listed
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
    in_axes: int | Sequence[int | None] | None = 0,
    out_axes: int = 0,
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
      in_axes: the axis of the examples in the arrays of each positional argument, or None for an argument that all
        examples share; one for all, or a sequence. In keyword arguments it is the leading axis, as in `jax.vmap`.
      out_axes: the axis of the examples in the arrays of the result of `apply`.
      unknown: as in `select`.
      allow_coupled: accept a model that combines examples, if the results do not depend on it, as for experts without a
        capacity or an early exit when all examples are done.
      materialize: as in `lora`.
      custom_derivatives: as in `lora`.

    Returns:
      `mixed(params, stacked, which, *args, dropout_key=None, token_weights=None, **kwargs)`, with the result of
      `apply`. `which` are names or numbers as for `select`, one per example. Examples have different dropout masks.

    Raises:
      AdapterError: at the call, if there is not one adapter per example; and as `select` and `lora`.
      UnsupportedError: at the call, if the model combines examples; and as `lora`.
    """
    adapted = lora(apply, materialize=materialize, custom_derivatives=custom_derivatives, form="factored")

    def mixed(params: Any, stacked: Stack, which: Any, /, *args: Any, dropout_key: Any = None, **kwargs: Any) -> Any:
        members = select(stacked, which, unknown=unknown)
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

        returned: list[Any] = []  # what `apply` returned, without its arrays

        def one(member: Member, mapped: list[Any], key: Any) -> list[Array]:
            given = [
                leaf if axis == _SHARED else lax.expand_dims(part, [axis])
                for leaf, part, axis in zip(leaves, mapped, axis_of, strict=True)
            ]
            args, kwargs = jax.tree.unflatten(treedef, given)
            out = adapted(params, member, *args, dropout_key=key, **kwargs)
            returned.append(jax.tree.map(lambda y: None if isinstance(y, Array) else y, out))
            return [_without_example(y, out_axes) for y in jax.tree.leaves(out) if isinstance(y, Array)]

        mapped_axes = [None if axis == _SHARED else axis for axis in axis_of]
        arrays = iter(jax.vmap(one, in_axes=(0, mapped_axes, 0), out_axes=out_axes)(members, mapped, keys))
        return jax.tree.map(lambda y: next(arrays) if y is None else y, returned[-1], is_leaf=lambda y: y is None)

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


def _axes_of_arguments(args: Sequence[Any], kwargs: dict[str, Any], in_axes: int | Sequence[int | None] | None) -> Any:
    """Returns a tree like `(args, kwargs)`, with the axis of the examples of each leaf, or `_SHARED`."""
    by_argument = [in_axes] * len(args) if isinstance(in_axes, int | None) else list(in_axes)
    if len(by_argument) != len(args):
        raise AdapterError(
            f"Expected `in_axes` for each of the {len(args)} arguments after the adapters; got {len(by_argument)}."
        )

    def axes(argument: Any, axis: int | None) -> Any:
        return jax.tree.map(lambda leaf: _axis(leaf, axis), argument)

    of_args = tuple(axes(argument, axis) for argument, axis in zip(args, by_argument, strict=True))
    return of_args, {name: axes(argument, 0) for name, argument in kwargs.items()}


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
