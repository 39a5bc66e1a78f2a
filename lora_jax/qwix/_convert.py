"""Converts between adapters and trees with the arrays of Qwix."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapter, Adapters
from .._core.attach import check
from .._core.axes import RANK, axes_of_a, axes_of_b
from .._core.numbers import number
from .._core.paths import Pattern, flatten, matching_paths, nearest, unflatten
from .._core.uses import Kernel
from .._errors import AdapterError, CheckpointError, counted, listed
from .._variants import LoRA, RSLoRA
from ._layout import Layout, MisfitError, find, read, write

Alpha = float | Mapping[Pattern, float]

_ADAPTED = {"dot_general", "conv_general_dilated"}
_VALUE = "/value"  # what Orbax adds to the path of an NNX variable that is read without its module


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
        kernel or fits it in two ways; if the model also uses a kernel where Qwix applies no LoRA, such as a lookup, or
        in a convolution in groups, which Qwix's update mixes; if no pattern of `alpha` matches. One error lists all.
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
            adapter[path] = _adapter(pair, _kernel(path, kernels), alphas.get(path))
        except MisfitError as misfit:
            problems.append(f"{path!r}: {misfit}")
    if problems:
        raise CheckpointError(
            f"Expected LoRA of Qwix that fits `kernels`; {len(problems)} of {len(pairs)} kernels do not.\n"
            f"{listed(problems)}\n"
            "  Trace the model that was trained, with the same tree: `kernels(apply, params, *args)`."
        )
    return adapter


def to_qwix(
    adapter: Adapters, tree: Any, kernels: Mapping[str, Kernel], *, alpha: Alpha, fold_scale: bool = False
) -> Any:
    """Puts an adapter into the parameters of a model with Qwix's LoRA.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"w": jnp.ones((8, 2, 4))}
    >>> apply = lambda p, x: jnp.einsum("td,dnh->tnh", x, p["w"])
    >>> spec = {"w": lj.LoRA(rank=3, alpha=6)}
    >>> adapted, adapter = lj.adapt(apply, params, spec, jnp.ones((5, 8)), key=jax.random.key(0))
    >>> tree = params | {"w_lora_a": jnp.ones((8, 3)), "w_lora_b": jnp.ones((3, 2, 4))}  # of Qwix's model
    >>> jax.tree.map(jnp.shape, to_qwix(adapter, tree, adapted.kernels, alpha=6))
    {'w': (8, 2, 4), 'w_lora_a': (8, 3), 'w_lora_b': (3, 2, 4)}

    Args:
      adapter: from `init`, `restore` or training, with `LoRA` and `RSLoRA`.
      tree: has the arrays of Qwix, whose shapes say how the model uses each kernel: the parameters of the model that
        `qwix.apply_lora_to_model` returned, `nnx.state(model, nnx.LoRAParam)`, or the shapes of either.
      kernels: from `kernels(apply, params, *args)`, with the model and the parameters without Qwix.
      alpha: α of Qwix's rule, or `{pattern: α}` for several rules; the first pattern that matches a path decides.
      fold_scale: multiply `b` where the scale of the adapter is not α/r of the rule; otherwise that is an error.

    Returns:
      A tree like `tree`, with the adapter in place of Qwix's arrays, in their dtypes and shardings.

    Raises:
      AdapterError: if `tree` and the adapter have LoRA for different kernels; if Qwix has no counterpart for a variant;
        if a rank, scale or shape differs; if layers or experts differ where Qwix shares `b`; if the model also uses a
        kernel where Qwix applies no LoRA, or in a convolution in groups; if no pattern of `alpha` matches. One error
        lists all.
      SpecError: if α is not a number, or a pattern of `alpha` matches nothing.
    """
    check(kernels, adapter, tree="kernels")
    leaves, treedef = flatten(tree)
    pairs = _pairs(leaves)
    alphas = _alphas(alpha, pairs)
    problems = [f"{path!r} has LoRA in `tree`, and none in the adapter" for path in pairs if path not in adapter]
    for path, part in adapter.items():
        try:
            arrays = _arrays(part, pairs.get(path, {}), kernels[path], alphas.get(path), fold_scale)
        except MisfitError as misfit:
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


def _kernel(path: str, kernels: Mapping[str, Kernel]) -> Kernel:
    if path not in kernels:
        raise MisfitError(f"it is not in `kernels`; the nearest are {', '.join(map(repr, nearest(path, [*kernels])))}")
    return kernels[path]


class Resolved(NamedTuple):
    """What is known of a kernel: Qwix's arrays, their layout, α, the axes, and the sizes of these and of `RANK`."""

    a: Any
    b: Any
    layout: Layout
    alpha: float
    axes: str
    sizes: Mapping[int, int]


def _resolved(pair: Pair, kernel: Kernel, axes: str | None, alpha: float | None) -> Resolved:
    if len(pair) == 1:
        has, lacks = ("a", "b") if "a" in pair else ("b", "a")
        raise MisfitError(f"it has `_lora_{has}`, and no `_lora_{lacks}`")
    if axes is None:
        raise MisfitError(f"its axes are not known: {kernel.unknown}")
    if others := sorted({use.primitive for use in kernel.uses} - _ADAPTED):
        raise MisfitError(f"the model also uses it in `{others[0]}`, where Qwix applies no LoRA")
    if any(use.groups > 1 for use in kernel.uses):
        raise MisfitError("it is the kernel of a convolution in groups, which Qwix's update mixes")
    if alpha is None:
        raise MisfitError("no pattern of `alpha` matches it")
    a, b = pair["a"][1], pair["b"][1]
    rows = math.prod(size for size, role in zip(kernel.shape, axes, strict=True) if role != "o")
    rank = max(1, math.prod(a.shape) // max(1, rows))  # if the shapes fit, which `find` checks
    sizes = dict(enumerate(kernel.shape)) | {RANK: rank}
    return Resolved(a, b, find(axes, sizes, a, b), alpha, axes, sizes)


def _adapter(pair: Pair, kernel: Kernel, alpha: float | None) -> Adapter:
    a, b, layout, alpha, axes, sizes = _resolved(pair, kernel, kernel.axes, alpha)
    a, b = read(a, layout.a, axes_of_a(axes), sizes), read(b, layout.b, axes_of_b(axes), sizes)
    return Adapter(LoRA(rank=sizes[RANK], alpha=alpha), axes, a=a, b=b)


def _arrays(part: Adapter, pair: Pair, kernel: Kernel, alpha: float | None, fold_scale: bool) -> dict[str, Array]:
    if not pair:
        raise MisfitError("it has no LoRA in `tree`")
    if not isinstance(part.variant, LoRA | RSLoRA):
        raise MisfitError(f"Qwix has no counterpart for {part.variant}")
    *_, layout, alpha, axes, sizes = _resolved(pair, kernel, part.axes, alpha)
    rank, scale, b = sizes[RANK], part.variant.scale, part.b
    if part.variant.rank != rank:
        raise MisfitError(f"its rank is {part.variant.rank}; that in `tree` is {rank}")
    if not math.isclose(scale, alpha / rank, rel_tol=1e-9):
        if not fold_scale or not alpha:
            raise MisfitError(f"its scale is {scale:g}; that of the rule is {alpha:g}/{rank}")
        b = b * (scale * rank / alpha)
    return {"a": write(part.a, layout.a, axes_of_a(axes)), "b": write(b, layout.b, axes_of_b(axes))}


def _like(leaf: Any, array: Array) -> Array:
    """Returns an array with the shape, dtype and sharding of a leaf."""
    array = jnp.reshape(array, leaf.shape).astype(leaf.dtype)
    sharding = getattr(leaf, "sharding", None)
    return array if sharding is None else jax.device_put(array, sharding)
