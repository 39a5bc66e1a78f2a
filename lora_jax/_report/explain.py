"""`explain`: what is trained, how the model uses it, and what it costs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from .._core.adapter import Adapter, Adapters
from .._core.attach import attach, check
from .._core.base import abstract, base_of
from .._core.kernel import PlainKernel
from .._core.paths import Pattern, flatten
from .._core.uses import NEVER_USED, Use, counted_uses
from .._errors import AdapterError, listed, refuse_keywords
from .._transform.contraction.costs import FormName
from .._transform.kernels import find_kernels, group_by_path, roles_agree
from .._transform.kinds import kinds
from .._transform.program import Program, collect_uses, trace
from .._transform.refusal import Refusal, materializable_paths, refusal_error
from .._transform.settings import CustomDerivatives, make_settings
from ..sharding import placements
from .explanation import Explanation, Row
from .flops import flops


def explain(
    apply: Callable[..., Any],
    params: Any,
    adapter: Adapters,
    /,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    strict: bool = False,
    materialize: Sequence[Pattern] = (),
    custom_derivatives: CustomDerivatives = "refuse",
    form: FormName | None = None,
    tx: Any = None,
    shardings: Any = None,
    **unexpected: Any,
) -> Explanation:
    """Reports for each adapted leaf how the model uses it and what it costs, without evaluating anything.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.ones((64, 32))}
    >>> apply = lambda params, x: x @ params["kernel"]
    >>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> print(lj.explain(apply, params, adapter, jnp.ones((8, 64))))
    path    shape  axes  kind  variant  rank  scale  used                     trainable  of base  FLOPs
    ──────  ─────  ────  ────  ───────  ────  ─────  ───────────────────────  ─────────  ───────  ─────
    kernel  64×32  io    head  LoRA        2      2  factored dot_general ×1        192   9.375%  3,344
    <BLANKLINE>
    trainable: 192 parameters, 9.375% of the base's 2,048
    memory:    adapter 768 B, optimizer 1.5 kB (two moments, as for Adam)
    forward:   3,344 FLOPs added, 10.21% of the base's 32,768

    Args:
      apply: the model, `apply(params, *args, **kwargs)`.
      params: the parameter tree, or its shapes and dtypes.
      adapter: from `init`.
      *args: the model's positional arguments; arrays may be `ShapeDtypeStruct`s.
      kwargs: the model's keyword arguments, likewise.
      strict: raise if the model never uses a leaf of the adapter, if the roles of its axes differ from the traced
        model, or if `lora` would refuse it.
      materialize: as for `lora`.
      custom_derivatives: as for `lora`.
      form: as for `lora`.
      tx: the optax optimizer whose state to count; otherwise two moments per parameter, as for Adam.
      shardings: of `params`, as for `sharding.like_base`; adds a column with the sharding of each array.
      **unexpected: none; the model's keyword arguments are in `kwargs`.

    Returns:
      An `Explanation`, which prints as a table.

    Raises:
      TypeError: for a keyword argument that is not in `kwargs`.
      AdapterError: if the adapter or the shardings do not fit `params`; with `strict`, if the model never uses some
        leaves, or if the roles of axes differ.
      UnsupportedError: with `strict`, where `lora` would raise it. Otherwise such kernels are `refused` in the table,
        which ends with the argument `materialize=` that would allow them.
    """
    refuse_keywords("explain", unexpected)
    check(flatten(params)[0], adapter)  # before tracing, which fails inside the model if arguments are swapped
    program = trace(apply, params, args, kwargs or {})
    leaves = program.param_arrays
    with_axes = {path: part for path, part in adapter.items() if part.variant.needs_axes}
    kernels = jax.eval_shape(functools.partial(attach, only_shapes=True), leaves, with_axes)
    # `Full` leaves have no factors; plain kernels in their place record how they are used.
    full = {path: PlainKernel.from_leaf(path, base_of(leaves[path])) for path in adapter if path not in kernels}
    refusals: list[Refusal] = []
    settings = make_settings(
        materialize=materialize, custom_derivatives=custom_derivatives, form=form, refusals=refusals
    )
    uses = group_by_path(collect_uses(program, kernels | full, settings))
    if strict and refusals:
        raise refusal_error(refusals)
    base_shardings = flatten(shardings)[0]
    placed = {path: placements(path, part, base_shardings) for path, part in adapter.items() if shardings is not None}
    traced_axes = _traced_axes(program, adapter, uses)
    findings = _Findings(uses, _variant_flops(adapter, leaves), kinds(program.jaxpr, list(leaves)), traced_axes)
    rows = tuple(_row(path, part, leaves[path], findings, placed.get(path)) for path, part in adapter.items())
    unused = [row.path for row in rows if row.used == NEVER_USED]
    if strict and unused:
        raise AdapterError(
            f"Expected the function to use every leaf of the adapter; it never uses {len(unused)} of {len(rows)}.\n"
            f"{listed(unused)}\n  Remove them from the spec, or check that this is the function that is trained."
        )
    if strict and traced_axes:
        differ = [
            f"{path!r} has {adapter[path].axes!r}, the model uses it as {axes!r}" for path, axes in traced_axes.items()
        ]
        raise AdapterError(
            f"Expected the roles of the adapter's axes to be those of the traced model; {len(differ)} of {len(rows)} "
            f"leaves differ.\n{listed(differ)}\n"
            "  Make the adapter with init(..., kernels=lora_jax.kernels(apply, params, *args)), without `axes=`."
        )
    adapter_bytes = _bytes(adapter)
    return Explanation(
        rows,
        base_parameters=sum(math.prod(leaf.shape) for leaf in leaves.values()),
        base_flops=_flops_of(program),
        adapter_bytes=adapter_bytes,
        optimizer_bytes=2 * adapter_bytes if tx is None else _bytes(jax.eval_shape(tx.init, dict(adapter))),
        optimizer="two moments, as for Adam" if tx is None else "the state of `tx`",
        undivided=tuple(line for path, part in placed.items() for line in _undivided(path, part, adapter[path])),
        refused=tuple(_refused(refusals)),
    )


class _Findings(NamedTuple):
    """What tracing found for each leaf, by path."""

    uses: Mapping[str, Sequence[Use]]
    variant_flops: Mapping[str, int]
    kinds: Mapping[str, str | None]
    traced_axes: Mapping[str, str]


def _row(path: str, part: Adapter, leaf: Any, findings: _Findings, placed: Adapter | None) -> Row:
    variant, uses = part.variant, findings.uses.get(path, ())
    return Row(
        path,
        tuple(leaf.shape),
        part.axes,
        variant.title,
        rank=getattr(variant, "rank", None),
        scale=getattr(variant, "scale", None) if variant.needs_axes else None,
        used=counted_uses(uses, lambda use: f"{use.kind if variant.needs_axes else 'whole'} {use.primitive}"),
        parameters=sum(math.prod(x.shape) for name, x in part.arrays.items() if name not in variant.constants),
        flops=findings.variant_flops[path] + sum(use.flops for use in uses),
        placed="" if placed is None else _shardings_text(part, placed),
        kind=findings.kinds[path],
        traced=findings.traced_axes.get(path, ""),
    )


def _variant_flops(adapter: Adapters, leaves: Mapping[str, Any]) -> dict[str, int]:
    """Counts the FLOPs of each variant before any use, such as the norms of DoRA; traces equal leaves once."""
    counts: dict[Any, int] = {}
    found = {}
    for path, part in adapter.items():
        # A quantized leaf counts as the array that it represents.
        shapes = abstract(leaves[path]), jax.tree.map(abstract, part.arrays)
        key = part.variant, part.axes, *jax.tree.leaves(shapes)
        if key not in counts:
            apply = functools.partial(part.variant.apply, axes=part.axes, path=path)
            counts[key] = flops(jax.make_jaxpr(apply)(*shapes))
        found[path] = counts[key]
    return found


def _traced_axes(program: Program, adapter: Adapters, uses: Mapping[str, Sequence[Use]]) -> dict[str, str]:
    """Returns the roles of axes in the traced model, for the leaves where they differ from the adapter's."""
    unclear = [path for path, part in adapter.items() if any(_may_differ(use, part) for use in uses.get(path, ()))]
    found = find_kernels(program, unclear) if unclear else {}
    return {
        path: kernel.axes
        for path, kernel in found.items()
        if kernel.axes is not None and not roles_agree(adapter[path].axes, kernel.axes, kernel.shape)
    }


def _may_differ(use: Use, part: Adapter) -> bool:
    """Returns whether a use gives an axis a different role or none, or lacks an axis, as inside a loop."""
    if not part.variant.needs_axes:
        return False
    axes = use.axes or ()
    labels = [label for label, _ in axes if label != "b"]
    return any(label != role for label, role in axes) or sorted(labels) != sorted(part.axes.replace("b", ""))


def _shardings_text(part: Adapter, placed: Adapter) -> str:
    """Formats shardings like `a 64@fsdp×8, b 8×32@model`."""
    axes = {name: map(_axis_text, array.shape, placed.arrays[name].names) for name, array in part.arrays.items()}
    return ", ".join(f"{name} {'×'.join(sizes)}" for name, sizes in axes.items())


def _axis_text(size: int, names: Sequence[str]) -> str:
    """Formats a sharded axis as JAX does in types."""
    along = f"({','.join(names)})" if len(names) > 1 else "".join(names)
    return f"{size}@{along}" if along else str(size)


def _undivided(path: str, placed: Adapter, part: Adapter) -> Iterator[str]:
    for name, place in placed.arrays.items():
        for axis, names in place.undivided.items():
            yield (
                f"{name} of {path!r} is replicated along its axis of size {part.arrays[name].shape[axis]}, "
                f"which the devices along {', '.join(map(repr, names))} do not divide"
            )


def _refused(refusals: Sequence[Refusal]) -> Iterator[str]:
    """Formats refusals like `lora` raises an error for 2 leaves; to materialize them: materialize=['a', 'b']."""
    allowable = materializable_paths(refusals)
    others = [path for refusal in refusals if not refusal.allowable for path in refusal.paths]
    if allowable:
        yield f"`lora` raises an error for {len(allowable)} leaves; to materialize them there: materialize={allowable}"
    if others:
        yield f"`lora` raises an error for {list(dict.fromkeys(others))}: remove them from the spec"


def _flops_of(program: Program) -> int | None:
    try:
        return flops(program.jaxpr)
    except NotImplementedError:
        return None


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
