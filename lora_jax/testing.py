"""What a function costs and what it makes, in figures that do not depend on the machine: for tests of performance.

>>> import jax, jax.numpy as jnp
>>> import lora_jax as lj
>>> from lora_jax import testing
>>> params = {"kernel": jnp.ones((64, 48))}
>>> adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
>>> adapted = lj.lora(lambda params, x: x @ params["kernel"])
>>> (64, 48) in testing.shapes_made(adapted, params, adapter, jnp.ones((3, 64)))
False
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ._compat import ClosedJaxpr, Jaxpr, JaxprEqn
from ._report.collectives import Collective as Collective
from ._report.collectives import collectives as collectives_of_text
from ._report.flops import bodies
from ._report.flops import flops as flops_of_jaxpr

__all__ = ["collectives", "compiled_flops", "flops", "shapes_made", "temporary_bytes", "wire_bytes"]


def flops(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> int:
    """Counts the floating-point operations of a call on its jaxpr, the bodies of loops times their length.

    A contraction counts 2·M·N·K, a convolution 2·out·window·in/groups, a reduction one for each input element, other
    arithmetic one for each output element, a move none. Nothing is evaluated.

    >>> import jax, jax.numpy as jnp
    >>> w = jnp.ones((8, 8))
    >>> flops(lambda x: jax.lax.scan(lambda x, _: (x @ w, None), x, length=10), jnp.ones((2, 8)))
    2560

    Args:
      fn: any JAX function.
      *args: its arguments: trees of arrays or `ShapeDtypeStruct`s.
      **kwargs: likewise.

    Returns:
      The number of operations.

    Raises:
      NotImplementedError: for a primitive whose operations its shapes do not tell, such as `svd`.
    """
    return flops_of_jaxpr(jax.make_jaxpr(fn)(*args, **kwargs))


def shapes_made(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> set[tuple[int, ...]]:
    """Collects the shape of every array that an equation of a call makes, those inside loops and other calls too.

    An argument is not made, nor is a slice of one that a `scan` hands to its body. So a kernel that the function only
    reads is not among them, unless something else has its shape by accident.

    >>> import jax, jax.numpy as jnp
    >>> sorted(shapes_made(jax.grad(lambda x, w: jnp.sum(x @ w)), jnp.ones((2, 8)), jnp.ones((8, 4))))
    [(), (2, 4), (2, 8)]

    Args:
      fn: any JAX function.
      *args: its arguments: trees of arrays or `ShapeDtypeStruct`s.
      **kwargs: likewise.

    Returns:
      The shapes, each once.
    """
    jaxpr = jax.make_jaxpr(fn)(*args, **kwargs)
    return {tuple(var.aval.shape) for eqn in _equations(jaxpr) for var in eqn.outvars if hasattr(var.aval, "shape")}


def _equations(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[JaxprEqn]:
    for eqn in jaxpr.eqns:
        yield eqn
        for body in bodies(eqn):
            yield from _equations(body)


def temporary_bytes(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> int:
    """Compiles a call and says how much memory it needs beside its arguments and results, by the compiler's account.

    >>> import jax.numpy as jnp
    >>> temporary_bytes(lambda x: jnp.sin(x) @ x, jnp.ones((8, 8)))
    256

    Args:
      fn: any JAX function; jitted already, if its donations are to count.
      *args: its arguments: trees of arrays or `ShapeDtypeStruct`s.
      **kwargs: likewise.

    Returns:
      The number of bytes.
    """
    return int(_compiled(fn, args, kwargs).memory_analysis().temp_size_in_bytes)


def compiled_flops(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> int:
    """Compiles a call and returns the compiler's own count of its operations.

    What nothing needs is gone by then. But the body of a loop counts once, whatever its length, and functions such as
    `exp` do not count: compare it between programs of the same loops only, and see `operations`.

    >>> import jax.numpy as jnp
    >>> compiled_flops(lambda x, w: x @ w, jnp.ones((2, 8)), jnp.ones((8, 4)))
    128

    Args:
      fn: any JAX function.
      *args: its arguments: trees of arrays or `ShapeDtypeStruct`s.
      **kwargs: likewise.

    Returns:
      The number of operations.
    """
    return int(_compiled(fn, args, kwargs).cost_analysis()["flops"])


def collectives(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Collective]:
    """Compiles a call and lists what its devices send each other: one `Collective` for each operation that does.

    The body of a loop counts its turns, of a conditional the branch that sends the most. It is the program as the
    compiler made it for the devices at hand: that for CPUs sends bfloat16 as float32, and those for other devices
    may join or replace operations.

    >>> import jax, jax.numpy as jnp
    >>> from jax.sharding import NamedSharding, PartitionSpec
    >>> n = jax.device_count()
    >>> x = jax.device_put(jnp.ones((8, 4)), NamedSharding(jax.make_mesh((n,), ("data",)), PartitionSpec("data")))
    >>> found = collectives(lambda x: x.sum(0), x)
    >>> {(each.kind, each.bytes, each.group) for each in found} == ({("all-reduce", 16, n)} if n > 1 else set())
    True

    Args:
      fn: any JAX function; jitted already, if it asks for shardings; or a compiled one, without arguments.
      *args: its arguments: trees of arrays, or of `ShapeDtypeStruct`s with their shardings.
      **kwargs: likewise.

    Returns:
      The collectives, in the program's order. Each has its `kind`; the `bytes` that one device puts in, and those it
      has of the `result`; the `group`, how many devices take part together; and `times`, how often it runs.

    Raises:
      NotImplementedError: for a loop with collectives whose turns the compiler does not know, and for a collective
        whose bytes its shapes do not tell.
    """
    return collectives_of_text(_compiled(fn, args, kwargs).as_text())


def wire_bytes(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> collections.Counter[str]:
    """Compiles a call and counts the bytes that each device sends to others, by kind of collective.

    Of n devices in a ring, each sends for an array of S bytes, all shards together:

        all-reduce                    2·(n-1)/n·S
        all-gather, reduce-scatter      (n-1)/n·S
        all-to-all                      (n-1)/n·S
        collective-permute              its own shard

    the factors by which NCCL's tests turn a time into a bandwidth that does not depend on n
    (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md). What counts is as in `collectives`.

    >>> import jax, jax.numpy as jnp
    >>> from jax.sharding import NamedSharding, PartitionSpec
    >>> n = jax.device_count()
    >>> x = jax.device_put(jnp.ones((8, 4)), NamedSharding(jax.make_mesh((n,), ("data",)), PartitionSpec("data")))
    >>> wire_bytes(lambda x: x.sum(0), x)["all-reduce"] == 2 * (n - 1) * 16 // n
    True

    Args:
      fn: any JAX function; jitted already, if it asks for shardings; or a compiled one, without arguments.
      *args: its arguments: trees of arrays, or of `ShapeDtypeStruct`s with their shardings.
      **kwargs: likewise.

    Returns:
      The bytes by kind; `.total()` is their sum.

    Raises:
      NotImplementedError: as `collectives`.
    """
    sent: collections.Counter[str] = collections.Counter()
    for each in collectives(fn, *args, **kwargs):
        sent[each.kind] += each.wire
    return sent


def _compiled(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(fn, jax.stages.Compiled):
        return fn
    lower = fn.lower if hasattr(fn, "lower") else jax.jit(fn).lower
    return lower(*args, **kwargs).compile()
