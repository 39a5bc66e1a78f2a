"""Costs of a function that do not depend on the speed of the machine, for tests of performance.

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
    """Counts the FLOPs of a call on its jaxpr; the body of a `scan` counts once per iteration.

    A contraction counts 2·M·N·K, a convolution 2·out·window·in/groups, a reduction one per input element, other
    arithmetic one per output element. Moving data counts nothing. Nothing is evaluated.

    >>> import jax, jax.numpy as jnp
    >>> w = jnp.ones((8, 8))
    >>> flops(lambda x: jax.lax.scan(lambda x, _: (x @ w, None), x, length=10), jnp.ones((2, 8)))
    2560

    Args:
      fn: any JAX function.
      *args: its arguments: trees of arrays or `ShapeDtypeStruct`s.
      **kwargs: likewise.

    Returns:
      The number of FLOPs.

    Raises:
      NotImplementedError: for a primitive whose FLOPs do not follow from its shapes, such as `svd`.
    """
    return flops_of_jaxpr(jax.make_jaxpr(fn)(*args, **kwargs))


def shapes_made(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> set[tuple[int, ...]]:
    """Collects the shapes of all arrays that the equations of a call compute, including those in loops and inner calls.

    Arguments are not included, nor are the slices of them that a `scan` passes to its body. The shape of a kernel that
    the function only reads is therefore not included, unless another array happens to have the same shape.

    >>> import jax, jax.numpy as jnp
    >>> sorted(shapes_made(jax.grad(lambda x, w: jnp.sum(x @ w)), jnp.ones((2, 8)), jnp.ones((8, 4))))
    [(), (2, 4), (2, 8)]

    Args:
      fn: any JAX function.
      *args: its arguments: trees of arrays or `ShapeDtypeStruct`s.
      **kwargs: likewise.

    Returns:
      The set of shapes.
    """
    jaxpr = jax.make_jaxpr(fn)(*args, **kwargs)
    return {tuple(var.aval.shape) for eqn in _equations(jaxpr) for var in eqn.outvars if hasattr(var.aval, "shape")}


def _equations(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[JaxprEqn]:
    for eqn in jaxpr.eqns:
        yield eqn
        for body in bodies(eqn):
            yield from _equations(body)


def temporary_bytes(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> int:
    """Compiles a call and returns how much memory it needs in addition to its arguments and results.

    >>> import jax.numpy as jnp
    >>> temporary_bytes(lambda x: jnp.sin(x) @ x, jnp.ones((8, 8)))
    256

    Args:
      fn: any JAX function; pass a jitted one if it donates arguments.
      *args: its arguments: trees of arrays or `ShapeDtypeStruct`s.
      **kwargs: likewise.

    Returns:
      The number of bytes, as reported by the compiler.
    """
    return int(_compiled(fn, args, kwargs).memory_analysis().temp_size_in_bytes)


def compiled_flops(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> int:
    """Compiles a call and returns the compiler's count of its FLOPs.

    Dead code does not count. But the body of a loop counts once, whatever its length, and functions such as `exp` do
    not count: compare only programs with the same loops, or use `flops`.

    >>> import jax.numpy as jnp
    >>> compiled_flops(lambda x, w: x @ w, jnp.ones((2, 8)), jnp.ones((8, 4)))
    128

    Args:
      fn: any JAX function.
      *args: its arguments: trees of arrays or `ShapeDtypeStruct`s.
      **kwargs: likewise.

    Returns:
      The number of FLOPs.
    """
    return int(_compiled(fn, args, kwargs).cost_analysis()["flops"])


def collectives(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Collective]:
    """Compiles a call and lists its collectives, the operations with which devices send data to each other.

    The body of a loop counts once per iteration; of a conditional, the branch that sends the most counts. The program
    is compiled for the available devices. On CPUs it sends bfloat16 as float32; compilers for other devices may combine
    or replace collectives.

    >>> import jax, jax.numpy as jnp
    >>> from jax.sharding import NamedSharding, PartitionSpec
    >>> n = jax.device_count()
    >>> x = jax.device_put(jnp.ones((8, 4)), NamedSharding(jax.make_mesh((n,), ("data",)), PartitionSpec("data")))
    >>> found = collectives(lambda x: x.sum(0), x)
    >>> {(each.kind, each.bytes, each.group) for each in found} == ({("all-reduce", 16, n)} if n > 1 else set())
    True

    Args:
      fn: any JAX function; pass a jitted one if it has shardings, or a compiled one without arguments.
      *args: its arguments: trees of arrays, or of `ShapeDtypeStruct`s with shardings.
      **kwargs: likewise.

    Returns:
      The collectives, in the program's order. Each has a `kind`; the `bytes` of one device's operand and of its
      `result`; the `group`, the number of devices in a group; and `times`, how often it runs.

    Raises:
      NotImplementedError: for a loop with collectives whose trip count the compiler does not know, and for a collective
        whose bytes do not follow from its shapes.
    """
    return collectives_of_text(_compiled(fn, args, kwargs).as_text())


def wire_bytes(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> collections.Counter[str]:
    """Compiles a call and counts the bytes that each device sends to others, by kind of collective.

    In a ring of n devices, each device sends for an array of S bytes in total:

        all-reduce                    2·(n-1)/n·S
        all-gather, reduce-scatter      (n-1)/n·S
        all-to-all                      (n-1)/n·S
        collective-permute              one shard

    These are the factors of the bus bandwidth in NCCL's tests
    (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md). Loops count as in `collectives`.

    >>> import jax, jax.numpy as jnp
    >>> from jax.sharding import NamedSharding, PartitionSpec
    >>> n = jax.device_count()
    >>> x = jax.device_put(jnp.ones((8, 4)), NamedSharding(jax.make_mesh((n,), ("data",)), PartitionSpec("data")))
    >>> wire_bytes(lambda x: x.sum(0), x)["all-reduce"] == 2 * (n - 1) * 16 // n
    True

    Args:
      fn: any JAX function; pass a jitted one if it has shardings, or a compiled one without arguments.
      *args: its arguments: trees of arrays, or of `ShapeDtypeStruct`s with shardings.
      **kwargs: likewise.

    Returns:
      The bytes by kind; `.total()` is their sum.

    Raises:
      NotImplementedError: where `collectives` raises it.
    """
    sent: collections.Counter[str] = collections.Counter()
    for collective in collectives(fn, *args, **kwargs):
        sent[collective.kind] += collective.wire
    return sent


def _compiled(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(fn, jax.stages.Compiled):
        return fn
    lower = fn.lower if hasattr(fn, "lower") else jax.jit(fn).lower
    return lower(*args, **kwargs).compile()
