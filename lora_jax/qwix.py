"""Adapters from and to the arrays that Qwix (https://github.com/google/qwix) trains, without importing it.

Qwix puts `{name}_lora_a` and `{name}_lora_b` beside a kernel, in a tree of Linen or in an NNX module. Tunix and MaxText
train and checkpoint these. Their axes depend on the operation in which the model uses the kernel:

| operation | `a` | `b` |
|---|---|---|
| `dot_general` | (batch…, product of inputs, rank) | (batch…, rank, product of outputs) |
| `einsum` | (batch and inputs, in the kernel's order, rank) | (rank, outputs…) |
| `conv_general_dilated` | (spatial axes and inputs, rank) | (rank, outputs) |

A stack of layers (`nn.scan`, `nnx.vmap`) adds its axis to `a` and `b` where the kernel has it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ._core.adapter import Adapter, Adapters, check_adapter
from ._core.axes import RANK, axes_of_a, axes_of_b, axes_with
from ._core.numbers import number
from ._core.paths import Pattern, flatten, matching_paths, nearest, unflatten
from ._core.uses import Kernel
from ._errors import AdapterError, CheckpointError, counted, listed
from ._variants import LoRA, RSLoRA

__all__ = ["from_qwix", "to_qwix"]

Alpha = float | Mapping[Pattern, float]
Group = tuple[int, ...]  # the axes of a kernel, or `RANK`, that one axis of Qwix's array is the product of

_VALUE = "/value"  # what Orbax adds to the path of an NNX variable that is read without its module


class Layout(NamedTuple):
    """The axes of Qwix's arrays. Layers or experts along a batch axis that `b` lacks share it."""

    a: tuple[Group, ...]
    b: tuple[Group, ...]


class _MisfitError(Exception):
    """Why one kernel cannot be read or written; the public functions list all."""


def from_qwix(tree: Any, kernels: Mapping[str, Kernel], *, alpha: Alpha) -> dict[str, Adapter]:
    """Makes an adapter from the arrays that Qwix has trained.

    `lora(apply)` with the model without Qwix then computes what Qwix's model computes. Qwix stores neither α nor the
    roles of axes. The roles come from the traced model, and every shape is compared with them.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"query": {"kernel": jnp.ones((8, 2, 4))}}
    >>> kernels = lj.kernels(lambda p, x: jnp.einsum("td,dnh->tnh", x, p["query"]["kernel"]), params, jnp.ones((5, 8)))
    >>> trained = {"kernel_lora_a": jnp.ones((8, 3)), "kernel_lora_b": jnp.ones((3, 2 * 4))}
    >>> from_qwix({"query": trained}, kernels, alpha=6)
    {'query/kernel': Adapter(LoRA(rank=3, alpha=6), 'ioo', a=float32[8, 3], b=float32[3, 2, 4])}

    Args:
      tree: has the arrays of Qwix: parameters of a Linen model, `nnx.state(model, nnx.LoRAParam)`, or a checkpoint of
        one that Orbax has read without a template. Other leaves are ignored.
      kernels: from `kernels(apply, params, *args)`, with the model and the parameters without Qwix.
      alpha: α of Qwix's rule, or `{pattern: α}` for several rules; the first pattern that matches a path decides.

    Returns:
      `{path: Adapter}` with `LoRA`, in the dtypes of the arrays. Arrays that Qwix shares between the batch axes of an
      `einsum` are repeated.

    Raises:
      CheckpointError: if there are no such arrays; if one has no partner or no kernel, or a shape that does not fit its
        kernel or fits it in two ways; if no pattern of `alpha` matches. One error lists all.
      SpecError: if α is not a number, or a pattern of `alpha` matches nothing.
    """
    pairs = _pairs(flatten(tree)[0])
    if not pairs:
        raise CheckpointError(
            "Expected a tree with LoRA of Qwix; no leaf has a name that ends in `_lora_a` or `_lora_b`.\n"
            "  Pass the parameters of the model that `qwix.apply_lora_to_model` returned, or of Tunix or MaxText."
        )
    alphas = _alphas(alpha, pairs)
    adapter, problems = dict[str, Adapter](), list[str]()
    for path, pair in pairs.items():
        try:
            adapter[path] = _adapter(path, pair, kernels, alphas.get(path))
        except _MisfitError as misfit:
            problems.append(f"{path!r}: {misfit}")
    if problems:
        raise CheckpointError(
            f"Expected LoRA of Qwix that fits `kernels`; {len(problems)} of {len(pairs)} kernels do not.\n"
            f"{listed(problems)}\n"
            "  Trace the model that was trained, with the same tree: `kernels(apply, params, *args)`."
        )
    return adapter


def to_qwix(adapter: Adapters, tree: Any, *, alpha: Alpha, fold_scale: bool = False) -> Any:
    """Puts an adapter into the parameters of a model with Qwix's LoRA.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> adapter = lj.init(jax.random.key(0), {"w": jnp.ones((8, 2, 4))}, {"w": lj.LoRA(rank=3, alpha=6, axes="ioo")})
    >>> tree = {"w": jnp.ones((8, 2, 4)), "w_lora_a": jnp.ones((8, 3)), "w_lora_b": jnp.ones((3, 2, 4))}
    >>> jax.tree.map(jnp.shape, to_qwix(adapter, tree, alpha=6))
    {'w': (8, 2, 4), 'w_lora_a': (8, 3), 'w_lora_b': (3, 2, 4)}

    Args:
      adapter: from `init`, `restore` or training, with `LoRA` and `RSLoRA`.
      tree: has the arrays of Qwix, whose shapes say how the model uses each kernel: the parameters of the model that
        `qwix.apply_lora_to_model` returned, `nnx.state(model, nnx.LoRAParam)`, or the shapes of either.
      alpha: α of Qwix's rule, or `{pattern: α}` for several rules; the first pattern that matches a path decides.
      fold_scale: multiply `b` where the scale of the adapter is not α/r of the rule; otherwise that is an error.

    Returns:
      A tree like `tree`, with the adapter in place of Qwix's arrays, in their dtypes and shardings.

    Raises:
      AdapterError: if `tree` and the adapter have LoRA for different kernels; if Qwix has no counterpart for a variant;
        if a rank, scale or shape differs; if layers or experts differ where Qwix shares `b`; if no pattern of `alpha`
        matches. One error lists all.
      SpecError: if α is not a number, or a pattern of `alpha` matches nothing.
    """
    check_adapter(adapter, "The arguments come in this order: first the adapter, then the tree.")
    leaves, treedef = flatten(tree)
    pairs = _pairs(leaves)
    alphas = _alphas(alpha, pairs)
    problems = [f"{path!r} has LoRA in `tree`, and none in the adapter" for path in pairs if path not in adapter]
    for path, part in adapter.items():
        try:
            arrays = _arrays(part, pairs.get(path, {}), alphas.get(path), fold_scale)
        except _MisfitError as misfit:
            problems.append(f"{path!r}: {misfit}")
            continue
        for name, array in arrays.items():
            at, leaf = pairs[path][name]
            leaves[at] = _like(leaf, array)
    if problems:
        raise AdapterError(
            f"Expected an adapter that Qwix can apply in `tree`; got {counted(len(problems), 'difference')}.\n"
            f"{listed(problems)}\n"
            "  Write a LoraRule(module_path=..., rank=..., alpha=...) for each rank and scale of the adapter; "
            "fold_scale=True\n  multiplies scales into `b`. `merge` works with every variant."
        )
    return unflatten(treedef, leaves)


Pair = dict[str, tuple[str, Any]]  # {"a": (path, leaf), "b": (path, leaf)}


def _pairs(leaves: Mapping[str, Any]) -> dict[str, Pair]:
    """Returns Qwix's arrays by the path of the kernel that they are beside."""
    found = dict[str, Pair]()
    for at, leaf in leaves.items():
        path, _, name = at.removesuffix(_VALUE).rpartition("_lora_")
        if path and name in ("a", "b"):
            found.setdefault(path, {})[name] = at, leaf
    return found


def _alphas(alpha: Alpha, paths: Collection[str]) -> dict[str, float]:
    """Returns α by path, without the paths that no pattern matches."""
    if not isinstance(alpha, Mapping):
        return dict.fromkeys(paths, number("alpha", alpha))
    found = dict[str, float]()
    for pattern, value in alpha.items():
        for path in matching_paths(pattern, paths, "every pattern of `alpha` to match a kernel with LoRA"):
            found.setdefault(path, number("alpha", value))
    return found


def _adapter(path: str, pair: Pair, kernels: Mapping[str, Kernel], alpha: float | None) -> Adapter:
    if path not in kernels:
        raise _MisfitError(f"it is not in `kernels`; the nearest are {', '.join(map(repr, nearest(path, [*kernels])))}")
    kernel = kernels[path]
    if kernel.axes is None:
        raise _MisfitError(f"its axes are not known: {kernel.unknown}")
    a, b = _factors(pair)
    sizes = dict(enumerate(kernel.shape)) | {RANK: _rank(a, kernel.shape, kernel.axes)}
    layout = _layout(kernel.axes, sizes, a, b)
    if alpha is None:
        raise _MisfitError("no pattern of `alpha` matches it")
    return Adapter(
        LoRA(rank=sizes[RANK], alpha=alpha),
        kernel.axes,
        a=_read(a, layout.a, axes_of_a(kernel.axes), sizes),
        b=_read(b, layout.b, axes_of_b(kernel.axes), sizes),
    )


def _arrays(part: Adapter, pair: Pair, alpha: float | None, fold_scale: bool) -> dict[str, Array]:
    if not pair:
        raise _MisfitError("it has no LoRA in `tree`")
    if type(part.variant) not in (LoRA, RSLoRA):
        raise _MisfitError(f"Qwix has no counterpart for {part.variant}")
    a, b = _factors(pair)
    own_a, own_b = axes_of_a(part.axes), axes_of_b(part.axes)
    own = dict(zip(own_a, part.a.shape, strict=True)) | dict(zip(own_b, part.b.shape, strict=True))
    rank = _rank(a, [own[axis] for axis in range(len(part.axes))], part.axes)
    layout = _layout(part.axes, own | {RANK: rank}, a, b)
    if own[RANK] != rank:
        raise _MisfitError(f"its rank is {own[RANK]}; that in `tree` is {rank}")
    if alpha is None:
        raise _MisfitError("no pattern of `alpha` matches it")
    values, scale = part.b, part.variant.scale
    if not math.isclose(scale, alpha / rank, rel_tol=1e-9):
        if not fold_scale or not alpha:
            raise _MisfitError(f"its scale is {scale:g}; that of the rule is {alpha:g}/{rank}")
        values = values * (scale * rank / alpha)
    return {"a": _write(part.a, layout.a, own_a), "b": _write(values, layout.b, own_b)}


def _factors(pair: Pair) -> tuple[Any, Any]:
    if len(pair) == 1:
        has, lacks = ("a", "b") if "a" in pair else ("b", "a")
        raise _MisfitError(f"it has `_lora_{has}`, and no `_lora_{lacks}`")
    return pair["a"][1], pair["b"][1]


def _rank(a: Any, shape: Sequence[int], axes: str) -> int:
    """Returns the rank of Qwix's `a`, if its shape fits; `_layout` checks that."""
    rows = math.prod(size for size, role in zip(shape, axes, strict=True) if role != "o")
    return max(1, math.prod(a.shape) // max(1, rows))


def _layout(axes: str, sizes: Mapping[int, int], a: Any, b: Any) -> Layout:
    """Returns the layout of arrays of these shapes. Axes of size 1 have no order, and may have any role."""
    fitting, expected = {}, dict[str, None]()
    for layout in _layouts(axes):
        shapes = [tuple(math.prod(sizes[axis] for axis in group) for group in groups) for groups in layout]
        expected[f"a {shapes[0]} and b {shapes[1]}"] = None
        if [_without_ones(shape) for shape in shapes] == [_without_ones(a.shape), _without_ones(b.shape)]:
            order = tuple(tuple(axis for axis in sum(groups, ()) if sizes[axis] > 1) for groups in layout)
            fitting[order] = layout
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    shape = tuple(sizes[axis] for axis in range(len(axes)))
    got = f"a {tuple(a.shape)} and b {tuple(b.shape)}"
    if fitting:
        raise _MisfitError(f"{got} fit a kernel of shape {shape} with axes {axes!r} in {len(fitting)} ways")
    raise _MisfitError(f"a kernel of shape {shape} with axes {axes!r} has {' or '.join(expected)}; got {got}")


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _layouts(axes: str) -> Iterator[Layout]:
    """Yields the layouts that a kernel can have: by operation, and by which of its batch axes are stacks of layers."""
    inputs, outputs = axes_with(axes, "i"), axes_with(axes, "o")
    batch = axes_with(axes, "b")
    for stacked in itertools.chain.from_iterable(itertools.combinations(batch, n) for n in range(len(batch) + 1)):
        own = [(axis,) for axis in batch if axis not in stacked]
        kept = [(axis,) for axis in range(len(axes)) if axes[axis] != "o" and axis not in stacked]
        operations = [
            ([*own, inputs, (RANK,)], [*own, (RANK,), outputs]),  # dot_general
            ([*kept, (RANK,)], [(RANK,), *((axis,) for axis in outputs)]),  # einsum, conv_general_dilated
        ]
        for a, b in operations:
            for axis in stacked:  # in the order of the kernel's axes, so that each gets the place that it has there
                a.insert(axis, (axis,))
                b.insert(axis, (axis,))
            yield Layout(tuple(a), tuple(b))


def _read(array: Any, groups: Sequence[Group], own: Sequence[int], sizes: Mapping[int, int]) -> Array:
    """Returns an array of Qwix with the axes `own`. Those that it lacks are repeated."""
    order = sum(groups, ())
    split = jnp.reshape(array, [sizes[axis] for axis in order])
    moved = jnp.transpose(split, [order.index(axis) for axis in own if axis in order])
    missing = [index for index, axis in enumerate(own) if axis not in order]
    return jnp.broadcast_to(jnp.expand_dims(moved, missing), [sizes[axis] for axis in own])


def _write(array: Any, groups: Sequence[Group], own: Sequence[int]) -> Array:
    """Returns an array with Qwix's axes, not yet joined."""
    order = sum(groups, ())
    missing = [index for index, axis in enumerate(own) if axis not in order]
    first = jnp.expand_dims(array[tuple(0 if at in missing else slice(None) for at in range(len(own)))], missing)
    if missing and not bool(jnp.all(array == first)):
        raise _MisfitError("Qwix has one `b` for all batch axes of an `einsum`, and those of the adapter differ")
    return jnp.transpose(jnp.squeeze(first, missing), [[axis for axis in own if axis in order].index(a) for a in order])


def _like(leaf: Any, array: Array) -> Array:
    """Returns an array with the shape, dtype and sharding of a leaf."""
    array = jnp.reshape(array, leaf.shape).astype(leaf.dtype)
    sharding = getattr(leaf, "sharding", None)
    return array if sharding is None else jax.device_put(array, sharding)
