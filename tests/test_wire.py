"""Bytes sent between devices, against programs with known bytes and against texts of compilers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import testing
from lora_jax._report.collectives import collectives


@functools.cache
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("x", "y"))


def mapped(function: Callable[..., Any], into: P, out: P) -> Callable[..., Any]:
    return jax.shard_map(function, mesh=mesh(), in_specs=into, out_specs=out, check_vma=False)


def five_sums(x: jax.Array) -> jax.Array:
    return lax.scan(lambda x, _: (lax.psum(x, "y") / 4, None), x, length=5)[0]


def nested(x: jax.Array) -> jax.Array:
    return lax.scan(lambda x, _: (five_sums(x), None), x, length=3)[0]


def either(x: jax.Array) -> jax.Array:
    """A conditional with the sum of a shard in one branch, of half of it in the other."""
    return lax.cond(x[0] > 0, lambda x: lax.psum(x, "y"), lambda x: jnp.concatenate([lax.psum(x[:16], "x"), x[16:]]), x)


both = ("x", "y")
exchange = functools.partial(lax.ppermute, axis_name="x", perm=[(0, 1), (1, 0)])

# 256 float32 values on eight devices: 128 bytes on each, 512 on the four devices of an axis.
SHARDED = {
    "all-reduce of two": (mapped(lambda x: lax.psum(x, "x"), P(both), P()), {"all-reduce": 128}),
    "all-reduce of four": (mapped(lambda x: lax.psum(x, "y"), P(both), P()), {"all-reduce": 2 * 3 * 128 // 4}),
    "all-reduce of all": (mapped(lambda x: lax.psum(x, both), P(both), P()), {"all-reduce": 2 * 7 * 128 // 8}),
    "all-gather": (mapped(lambda x: lax.all_gather(x, "y", tiled=True), P(both), P()), {"all-gather": 3 * 128}),
    "reduce-scatter": (
        mapped(lambda x: lax.psum_scatter(x, "y", tiled=True), P(both), P(both)),
        {"reduce-scatter": 3 * 128 // 4},
    ),
    "all-to-all": (
        mapped(lambda x: lax.all_to_all(x.reshape(4, 8), "y", 0, 1), P(both), P(both)),
        {"all-to-all": 3 * 128 // 4},
    ),
    "collective-permute": (mapped(exchange, P(both), P(both)), {"collective-permute": 128}),
    "a loop": (mapped(five_sums, P(both), P()), {"all-reduce": 5 * 192}),
    "a loop in a loop": (mapped(nested, P(both), P()), {"all-reduce": 15 * 192}),
    "a conditional": (mapped(either, P(both), P()), {"all-reduce": 192}),
    "of bytes": (
        mapped(lambda x: lax.all_gather(x.astype(jnp.int8), "y", tiled=True), P(both), P()),
        {"all-gather": 3 * 32},
    ),
    "of bfloat16, which a CPU sends as float32": (
        mapped(lambda x: lax.all_gather(x.astype(jnp.bfloat16), "y", tiled=True), P(both), P()),
        {"all-gather": 3 * 128},
    ),
    "nothing": (mapped(jnp.sin, P(both), P(both)), {}),
    # Collectives that the partitioner adds, in which XLA names the axes of the mesh.
    "partitioned": (lambda x: jnp.sum(x.reshape(8, 32), 0), {"all-reduce": 2 * 7 * 128 // 8}),
}


@pytest.mark.parametrize("name", SHARDED)
def test_bytes_match_a_count_by_hand(name: str) -> None:
    function, expected = SHARDED[name]
    x = jax.ShapeDtypeStruct((256,), jnp.float32, sharding=NamedSharding(mesh(), P(both)))
    assert testing.wire_bytes(function, x) == expected


def test_a_collective_has_kind_bytes_and_count() -> None:
    x = jax.ShapeDtypeStruct((256,), jnp.float32, sharding=NamedSharding(mesh(), P(both)))
    (found,) = testing.collectives(SHARDED["all-gather"][0], x)
    assert (found.kind, found.bytes, found.result, found.group, found.times) == ("all-gather", 128, 512, 4, 1)


def test_a_loop_of_unknown_length_is_an_error_if_it_sends() -> None:
    def sends(x: jax.Array) -> jax.Array:
        return lax.while_loop(lambda x: x[0] < 9, lambda x: lax.psum(x, "y"), x)

    def does_not(x: jax.Array) -> jax.Array:
        return lax.while_loop(lambda x: x[0] < 9, lambda x: x * 2, x)

    x = jax.ShapeDtypeStruct((256,), jnp.float32, sharding=NamedSharding(mesh(), P(both)))
    with pytest.raises(
        NotImplementedError, match=r"loops whose trip count the compiler knows; got `while[^`]*`, with coll"
    ):
        testing.wire_bytes(mapped(sends, P(both), P()), x)
    assert testing.wire_bytes(mapped(does_not, P(both), P(both)), x) == {}


# Texts of compilers for other devices

HEAD = """\
HloModule jit_f, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}

"""
MAIN = """\
ENTRY %main (x: f32[32]) -> f32[32] {
  %x = f32[32]{0:T(128)} parameter(0)
"""


def text(body: str, before: str = "") -> str:
    return f"{HEAD}{before}{MAIN}{body}\n}}\n"


TEXTS = {
    "a pair counts once": (
        text(
            "  %s = (f32[32]{0}, f32[128]{0}) all-gather-start(%x), channel_id=1, replica_groups=[2,4]<=[8], "
            "dimensions={0}\n  %d = f32[128]{0:T(128)} all-gather-done(%s)"
        ),
        ("all-gather", 128, 4),
    ),
    "counted off across": (
        text("  %d = f32[32]{0} all-reduce(%x), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add"),
        ("all-reduce", 128, 2),
    ),
    "all devices are one group": (
        text("  %d = f32[32]{0} all-reduce(%x), replica_groups={}, to_apply=%add"),
        ("all-reduce", 128, 8),
    ),
    "several arrays in one": (
        text(
            "  %p = bf16[3,4]{1,0:T(8,128)(2,1)} copy(%x)\n"
            "  %d = (f32[32]{0}, /*index=1*/bf16[3,4]{1,0}) all-reduce(%x, /*index=1*/%p), "
            "replica_groups={{0,1},{2,3}}, to_apply=%add"
        ),
        ("all-reduce", 128 + 24, 2),
    ),
    "an asynchronous computation": (
        text(
            "  %s = ((f32[32]{0}), f32[8]{0}, u32[]) async-start(%x), calls=%beside\n"
            "  %u = ((f32[32]{0}), f32[8]{0}, u32[]) async-update(%s), calls=%beside\n"
            "  %d = f32[8]{0} async-done(%u), calls=%beside",
            "%beside (y: f32[32]) -> f32[8] {\n  %y = f32[32]{0} parameter(0)\n"
            "  ROOT %r = f32[8]{0} reduce-scatter(%y), "
            "replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}, dimensions={0}, to_apply=%add\n}\n\n",
        ),
        ("reduce-scatter", 128, 4),
    ),
    "a permutation that stays where it is": (
        text("  %d = f32[32]{0} collective-permute(%x), source_target_pairs={{0,0},{1,1}}"),
        ("collective-permute", 128, 1),
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_bytes_of_texts_of_other_compilers(name: str) -> None:
    program, expected = TEXTS[name]
    (found,) = collectives(program)
    assert (found.kind, found.bytes, found.group) == expected
    assert found.wire > 0 or found.group == 1


def test_transfers_to_the_host_are_not_counted() -> None:
    sent = "  %t = token[] after-all()\n  %s = (f32[32]{0}, u32[], token[]) send(%x, %t), channel_id=1"
    assert collectives(text(f"{sent}, is_host_transfer=true")) == []
    with pytest.raises(NotImplementedError, match=r"bytes follow from their shapes; got `send`"):
        collectives(text(sent))
    with pytest.raises(NotImplementedError, match=r"groups of devices.*; got\n  %x\), somehow"):
        collectives(text("  %d = f32[32]{0} all-reduce(%x), somehow"))
