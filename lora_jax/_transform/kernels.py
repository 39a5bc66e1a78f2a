"""`kernels`: finds how a traced model uses each leaf, with the roles of its axes."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from .._core.base import base_of
from .._core.kernel import Label, PlainKernel
from .._core.table import Report
from .._core.uses import Evidence, Kernel, Use
from .._errors import refuse_keywords
from .kinds import kinds
from .origins import origins
from .program import Program, collect_uses, trace
from .settings import Settings


def kernels(
    apply: Callable[..., Any],
    params: Any,
    /,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    **unexpected: Any,
) -> Report[Kernel]:
    """Traces `apply` and returns how it uses each leaf of `params`, without evaluating it.

    An axis that is contracted with the activation, or along which rows are looked up, is an input (`i`). A batch axis
    of the contraction, or an axis that a scan or an index slices, is a batch axis (`b`). The others are outputs (`o`).

    If uses disagree, those with the strongest evidence decide. In this order, the leaf is used with activations, which
    depend on `args` and `kwargs`; with activations that depend on the leaf itself, as in a head tied to an embedding;
    or with constants and parameters, as in a power iteration. Among these, the model's own operations precede those of
    JAX's reverse-mode derivatives. Operations whose results are dropped count, too. If the deciding uses disagree,
    `axes` is None, `unknown` lists them, and `init` requires `axes=` in the spec.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params = {"query": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))}
    >>> apply = lambda p, x: jnp.einsum("td,dhk->thk", x, p["query"]) + p["bias"]
    >>> found = lj.kernels(apply, params, jnp.ones((5, 8)))
    >>> found["query"].axes, found["query"].uses[0].primitive, found["bias"].axes
    ('ioo', 'dot_general', None)

    Args:
      apply: the model, `apply(params, *args, **kwargs)`.
      params: the parameter tree; arrays may be `ShapeDtypeStruct`s.
      *args: the model's positional arguments; arrays may be `ShapeDtypeStruct`s.
      kwargs: the model's keyword arguments; arrays may be `ShapeDtypeStruct`s.
      **unexpected: not allowed; the model's keyword arguments are passed in `kwargs`.

    Returns:
      A `Kernel` for each leaf that is an array, by path. A leaf that the call does not use has no uses. The dict prints
      as a table.

    Raises:
      TypeError: if there are other keyword arguments.
      TracingError: if `apply` is not a function, or Python code of the model needs the value of an array.
    """
    refuse_keywords("kernels", unexpected)
    program = trace(apply, params, args, kwargs or {})
    return Report(find_kernels(program, list(program.param_arrays)))


def find_kernels(program: Program, paths: Collection[str]) -> dict[str, Kernel]:
    """Returns what `kernels` returns, for some paths."""
    arrays = program.param_arrays
    leaves = {path: leaf for path, leaf in arrays.items() if path in paths}
    probes = {path: PlainKernel.from_leaf(path, base_of(leaf)) for path, leaf in leaves.items()}
    settings = Settings(origins=origins(program.jaxpr, list(arrays)))
    uses = group_by_path(collect_uses(program, probes, settings))
    kind = kinds(program.jaxpr, list(arrays))
    return {path: _kernel(path, leaf, uses.get(path, []), kind[path]) for path, leaf in leaves.items()}


def group_by_path(uses: Sequence[Use]) -> dict[str, list[Use]]:
    """Returns the uses of each leaf."""
    grouped: dict[str, list[Use]] = collections.defaultdict(list)
    for use in uses:
        grouped[use.path].append(use)
    return grouped


def _kernel(path: str, leaf: Any, uses: Sequence[Use], kind: str | None) -> Kernel:
    """Returns a leaf with the roles of the uses that have the strongest evidence, or the reason why there are none."""
    live = tuple(use for use in uses if use.live)
    labels = [(path, axis) for axis in range(leaf.ndim)]
    with_roles = [(use, roles) for use in uses if (roles := _leaf_roles(use, labels)) is not None]
    strongest = max((use.evidence for use, _ in with_roles), default=_NONE)
    deciding = [(use, roles) for use, roles in with_roles if use.evidence == strongest]
    axes, unknown = None, ""
    if strongest > _NONE and all(roles_agree(roles, deciding[0][1], leaf.shape) for _, roles in deciding):
        axes = _add_missing_role(deciding[0][1], leaf.shape)
    else:
        unknown = _why_unknown(live, deciding)
    return Kernel(tuple(leaf.shape), leaf.dtype, axes, live, unknown, kind)


_NONE = Evidence(0, forward=False)  # a derivative with a constant, which can be that of any use


def roles_agree(one: str, other: str, shape: Sequence[int]) -> bool:
    """Whether two strings of roles are equal for all axes except those of size 1, which can have any role."""
    return all(a == b or size == 1 for a, b, size in zip(one, other, shape, strict=True))


def _add_missing_role(roles: str, shape: Sequence[int]) -> str:
    """Makes an axis of size 1 the output or the input if there is none otherwise."""
    for missing, place in (("o", -1), ("i", 0)):
        free = [at for at, size in enumerate(shape) if size == 1 and (roles[at] == "b" or roles.count(roles[at]) > 1)]
        if missing not in roles and free:
            at = free[place]
            roles = f"{roles[:at]}{missing}{roles[at + 1 :]}"
    return roles


def _why_unknown(uses: Sequence[Use], deciding: Sequence[tuple[Use, str]]) -> str:
    if deciding and deciding[0][0].evidence == _NONE:
        return f"it is used only in derivatives, at {deciding[0][0].line}"
    if deciding:
        first: dict[str, Use] = {}
        for use, roles in deciding:
            first.setdefault(roles, use)
        lines = [f"    {roles!r} by `{use.primitive}` at {use.line}" for roles, use in first.items()]
        return "its uses disagree\n" + "\n".join(lines)
    if not uses:
        return "the traced call does not use it"
    use = uses[0]
    if use.kind == "opaque":
        return f"`{use.primitive}` reads the whole array first, at {use.line}"
    return f"its use by `{use.primitive}` determines no role for an axis, or two, at {use.line}"


def _leaf_roles(use: Use, labels: Sequence[Label]) -> str | None:
    """Returns the roles of a leaf's axes in one use; None if the use determines none, or two for one axis."""
    if use.axes is None:
        return None
    found = {label: {role for at, role in use.axes if label in at} for label in labels}
    if any(len(roles) > 1 for roles in found.values()):
        return None
    # An axis that is missing was sliced by a scan or by an index.
    return "".join(next(iter(roles), "b") for roles in found.values())
