"""Builds a mixture of adapters: one adapter whose rank is the sum of their ranks, weighted per token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapter, Adapters, check_adapter
from .._core.axes import RANK, axes_of_a, axes_of_b
from .._core.contract import widest
from .._core.keys import key_for
from .._core.linalg import svd_of_product
from .._core.routing import Router
from .._errors import AdapterError, SpecError, listed
from .._variants import AdaLoRA, LoRA, RSLoRA
from .._variants.mixture import Mixture
from .._variants.routers import PHATGOOSE, Arrow, Constant, Gate, SigmoidGate


def mixture(
    adapters: Mapping[str, Adapters],
    router: Router,
    /,
    *,
    weights: Mapping[str, float] | None = None,
    general: Mapping[str, Adapters] | None = None,
    train_experts: bool = False,
    key: Array | None = None,
) -> dict[str, Adapter]:
    """Returns one adapter that mixes several, the experts, with weights that a router computes for each token.

        y = x·W0 + Σ_e c_e(x)·s_e·(x·A_e)·B_e

    The factors are concatenated along the rank, so a kernel with E experts of rank r has the two products of an
    adapter of rank E·r, and x·gate for the router. The result is an adapter like any other: for `lora`, `explain`,
    `save` and, with `Constant`, `merge`. At a path that only some experts have, the others add nothing. Works under
    `jit`.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> make = lambda seed: lj.init(jax.random.key(seed), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    >>> mixed = lj.many.mixture({"code": make(0), "math": make(1)}, lj.many.Gate(top_k=1, renormalize=False))
    >>> mixed["kernel"].a.shape, mixed["kernel"].gate.shape
    ((4, 4), (4, 2))
    >>> lj.lora(lambda params, x: x @ params["kernel"])(params, mixed, jnp.ones((1, 4)))
    Array([[4., 4., 4.]], dtype=float32)

    Args:
      adapters: the experts by name: trained adapters with leaves of `LoRA`, `RSLoRA` or `AdaLoRA`; for `PHATGOOSE`,
        mixtures of one expert each with a trained `SigmoidGate`. Ranks and scales may differ. Dropout is not applied.
      router: `Constant`, `Given`, `Gate`, `SigmoidGate`, `PHATGOOSE` or `Arrow`.
      weights: for `Constant`, the weight of each expert by name; None for equal weights with the sum 1.
      general: for `Arrow`, adapters whose mean update is subtracted from that of each expert, as in GenKnowSub
        (Bagherifard et al. 2025). Unlike PEFT, which subtracts mean factors, this subtracts the update exactly.
      train_experts: whether the factors are trained. If not, they have a gradient of zero, and with
        `optax.masked(tx, optim.select("gate"))` neither optimizer state nor weight decay.
      key: PRNG key for the initial `gate` of `Gate` and `SigmoidGate`, uniform in ±1/√fan_in; consumed. None for a gate
        of zeros, with which all weights are equal.

    Returns:
      The adapter: leaves of `Mixture` with `a`, (batch…, in…, Σ r_e), `b`, (batch…, Σ r_e, out…), and for the routers
      with a gate `gate`, (batch…, in…, experts), or for `Constant` `weights`, (batch…, experts).

    Raises:
      AdapterError: if there is no expert or no leaf, or leaves cannot be mixed: of another variant, such as DoRA or
        `Full`, of other axes or shapes, or without a gate for `PHATGOOSE`. One error lists all leaves.
      SpecError: if `top_k` is larger than the number of experts; for an argument that the router does not take.
    """
    general = general or {}
    _check_arguments(adapters, router, weights, general, key)
    for adapter in (*adapters.values(), *general.values()):
        check_adapter(adapter, "The arguments come in this order: mixture({name: adapter, …}, router).")
    every = [*adapters.values(), *general.values()]
    paths = list(dict.fromkeys(path for adapter in every for path in adapter))
    if not any(adapters.values()):
        raise AdapterError(f"Expected at least one adapter with a leaf; got {dict(adapters)}.\n  Mix trained adapters.")
    _check_leaves({**adapters, **general}, router, paths)
    numbers = jnp.array([(weights or {}).get(name, 1 / len(adapters)) for name in adapters], jnp.float32)
    mixed = {}
    for path in paths:
        blocks = _blocks([adapter.get(path) for adapter in every], len(adapters))
        variant = Mixture(
            names=tuple(adapters),
            ranks=tuple(block.rank for block in blocks),
            scales=tuple(block.scale for block in blocks),
            router=router,
            train_experts=train_experts,
        )
        axes = next(part.axes for adapter in every if (part := adapter.get(path)) is not None)
        factors = {
            "a": _concatenate([block.a for block in blocks], axes_of_a(axes)),
            "b": _concatenate([block.b for block in blocks], axes_of_b(axes)),
        }
        own = _arrays_of_router(
            router, blocks, axes, len(adapters), numbers, None if key is None else key_for(key, path)
        )
        mixed[path] = Adapter(variant, axes, **factors, **own)
    return mixed


class _Block(NamedTuple):
    """The factors of one expert at one path.

    Attributes:
      a: (batch…, in…, rank).
      b: (batch…, rank, out…).
      scale: s.
      gate: (batch…, in…, 1), with which it was trained, or None.
    """

    a: Any
    b: Any
    scale: float
    gate: Any = None

    @property
    def rank(self) -> int:
        return int(self.a.shape[-1])


def _blocks(parts: list[Adapter | None], experts: int) -> list[_Block]:
    """Returns the factors of each adapter; those after the experts have the weight -1/count."""
    found = [None if part is None else _block(part) for part in parts]
    some, axes = next((block, part.axes) for block, part in zip(found, parts, strict=True) if block and part)
    at = axes_of_b(axes).index(RANK)
    none = _Block(some.a[..., :0], some.b[(slice(None),) * at + (slice(0),)], 1.0)
    blocks = [none if block is None else block for block in found]
    sign = -1 / max(len(parts) - experts, 1)
    return [*blocks[:experts], *(block._replace(scale=sign * block.scale) for block in blocks[experts:])]


def _block(part: Adapter) -> _Block:
    variant = part.variant
    if isinstance(variant, Mixture):
        return _Block(part.a, part.b, variant.scales[0], part.gate)
    assert isinstance(variant, LoRA | RSLoRA | AdaLoRA)
    return _Block(*variant.factors(part.arrays, part.axes), variant.scale)


def _concatenate(arrays: list[Any], axes: tuple[int, ...]) -> Array:
    dtype = widest(*(array.dtype for array in arrays))
    return jnp.concatenate([jnp.asarray(array, dtype) for array in arrays], axes.index(RANK))


def _arrays_of_router(
    router: Router, blocks: list[_Block], axes: str, experts: int, weights: Array, key: Array | None
) -> dict[str, Array]:
    batch, a = axes.count("b"), blocks[0].a
    if isinstance(router, Constant):
        return {"weights": jnp.broadcast_to(weights, (*a.shape[:batch], experts))}
    if isinstance(router, PHATGOOSE):
        return {"gate": jnp.concatenate([block.gate for block in blocks], -1)}
    if isinstance(router, Arrow):
        return {"gate": jnp.concatenate([_prototype(block, blocks[experts:], batch) for block in blocks[:experts]], -1)}
    if "gate" not in router.layout(axes):
        return {}
    shape, dtype = (*a.shape[:-1], experts), widest(*(block.a.dtype for block in blocks))
    if key is None:
        return {"gate": jnp.zeros(shape, dtype)}
    bound = 1 / math.sqrt(math.prod(a.shape[batch:-1]))
    return {"gate": jax.random.uniform(key, shape, dtype, -bound, bound)}


def _prototype(block: _Block, general: list[_Block], batch: int) -> Array:
    """Returns the direction of the inputs that an expert amplifies most, (batch…, in…, 1); zero if it adds nothing."""
    parts = [part for part in (block, *general) if part.rank]
    if not parts:
        return jnp.zeros((*block.a.shape[:-1], 1), block.a.dtype)
    dtype = widest(jnp.float32, *(array.dtype for part in parts for array in (part.a, part.b)))
    flat = [
        (
            part.a.reshape(*part.a.shape[:batch], -1, part.rank).astype(dtype) * part.scale,
            part.b.reshape(*part.b.shape[: batch + 1], -1).astype(dtype),
        )
        for part in parts
    ]
    a, b = (jnp.concatenate(arrays, axis) for arrays, axis in zip(zip(*flat, strict=True), (-1, -2), strict=True))
    svd = svd_of_product(a, b)
    direction = jnp.where(svd.s[..., None, :1] > 0, svd.u[..., :1], 0)
    return direction.reshape(*block.a.shape[:-1], 1).astype(block.a.dtype)


def _check_arguments(adapters: Any, router: Any, weights: Any, general: Any, key: Any) -> None:
    if not isinstance(adapters, Mapping) or not adapters:
        raise AdapterError(f"Expected adapters by name, {{name: adapter, …}}; got {adapters!r}.")
    if not isinstance(router, Router):
        raise SpecError(f"Expected a router, such as many.Gate(top_k=2); got {router!r}.")
    if wrong := [name for name in general if name in adapters]:
        raise SpecError(f"Expected other names for `general` than those of the experts; got {wrong[0]!r} in both.")
    top_k = getattr(router, "top_k", None)
    if top_k is not None and top_k > len(adapters):
        raise SpecError(f"Expected `top_k` of at most the {len(adapters)} experts; got {router}.")
    takes: dict[str, tuple[type[Router], ...]] = {
        "weights": (Constant,),
        "general": (Arrow,),
        "key": (Gate, SigmoidGate),
    }
    given = {"weights": weights is not None, "general": bool(general), "key": key is not None}
    for name, routers in takes.items():
        if given[name] and not isinstance(router, routers):
            raise SpecError(f"Expected no `{name}` for {router}, which does not use it.")
    if weights is not None and set(weights) != set(adapters):
        raise SpecError(f"Expected a weight for each of {sorted(adapters)}; got {sorted(weights)}.")


def _check_leaves(adapters: Mapping[str, Adapters], router: Router, paths: list[str]) -> None:
    problems = []
    for path in paths:
        found = {name: adapter[path] for name, adapter in adapters.items() if path in adapter}
        first = next(iter(found))
        expected = _sizes_by_axis(found[first])
        for name, part in found.items():
            reason = _unmixable(part, router)
            if not reason and part.axes != found[first].axes:
                reason = f"the axes are {part.axes!r}, and {found[first].axes!r} in {first!r}"
            elif not reason and _sizes_by_axis(part) != expected:
                reason = f"it is for a kernel of shape {_sizes_by_axis(part)}, and {first!r} for {expected}"
            problems += [f"{path!r} of {name!r}: {reason}"] if reason else []
        if isinstance(router, PHATGOOSE) and len(found) < len(adapters):
            missing = next(name for name in adapters if name not in found)
            problems.append(f"{path!r} of {missing!r}: there is no leaf, and so no gate")
    if problems:
        raise AdapterError(
            "Expected leaves that can be mixed: of LoRA, RSLoRA or AdaLoRA, and at each path with the same axes and "
            f"shapes; got {len(problems)} that cannot.\n{listed(problems, len(problems))}\n"
            "  Leave such leaves out of the experts, and add one adapter's to the result: mixture(…) | {path: leaf}."
        )


def _unmixable(part: Adapter, router: Router) -> str:
    variant = part.variant
    if isinstance(router, PHATGOOSE):
        gated = isinstance(variant, Mixture) and isinstance(variant.router, SigmoidGate) and len(variant.ranks) == 1
        return (
            "" if gated else f"{variant} has no gate; train one first, with mixture({{name: adapter}}, SigmoidGate())"
        )
    return "" if isinstance(variant, LoRA | RSLoRA | AdaLoRA) else f"{variant} cannot be mixed"


def _sizes_by_axis(part: Adapter) -> tuple[int, ...]:
    """Returns the shape of the kernel of a leaf with factors; () for other leaves."""
    if not {"a", "b"} <= set(part.arrays):
        return ()
    found = dict(zip((*axes_of_a(part.axes), *axes_of_b(part.axes)), (*part.a.shape, *part.b.shape), strict=True))
    return tuple(found[axis] for axis in range(len(part.axes)))
