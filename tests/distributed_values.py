"""Compares kernels that are sharded over processes. test_distributed.py runs it in several processes."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import starts
from lora_jax.checkpoint._fingerprint import fingerprint

SPEC = {"kernel": lj.LoRA(rank=2, alpha=4, axes="io"), "layers": lj.AdaLoRA(rank=2, alpha=4, axes="bio")}
SHARDED = {"kernel": P(None, "x"), "layers": P("x")}


def make_base() -> dict[str, Any]:
    draw = np.random.default_rng(0).normal
    return {name: draw(size=size).astype(np.float32) for name, size in (("kernel", (16, 8)), ("layers", (4, 8, 4)))}


def run() -> dict[str, Any]:
    """The results of all comparisons, with kernels in device memory and in host memory."""
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SHARDED.items()}

    def make(base: Any) -> Any:
        adapter = lj.init(jax.random.key(0), base, SPEC)
        return jax.tree.map(lambda leaf: leaf + 0.1, adapter)

    local = make_base()
    places = {"kernel": NamedSharding(mesh, P()), "layers": shardings["layers"]}
    adapter = jax.jit(make, out_shardings=places)(jax.device_put(local, shardings))
    return {
        kind: compare({name: sharding.with_memory_kind(kind) for name, sharding in shardings.items()}, local, adapter)
        for kind in ("device", "pinned_host")
    }


def compare(shardings: Any, local: Any, adapter: Any) -> dict[str, Any]:
    base, other = jax.device_put(local, shardings), jax.device_put({n: x + 1 for n, x in local.items()}, shardings)
    assert not any(leaf.is_fully_addressable for leaf in (*base.values(), adapter["layers"].e))
    merged = lj.merge(base, adapter)
    # The base after an initialization that subtracts its factors from it.
    kernel, start = {"kernel": base["kernel"]}, {"kernel": adapter["kernel"]}
    residue, drift = lj.unmerge_approximately(kernel, start)
    restored = lj.unmerge(merged, adapter, base=base)
    return {
        "fingerprint": fingerprint(base),
        "drift": drift["kernel"],
        "restored": all(restored[name] is base[name] for name in base),
        "another base": error_of(lambda: lj.unmerge(merged, adapter, base=other)),
        "rank as plain": starts.as_plain(kernel, start, residue, start)["kernel"].variant.rank,
        "another start": error_of(lambda: starts.as_plain({"kernel": other["kernel"]}, start, residue, start)),
        "rank compact": lj.adaptive.compact({"layers": adapter["layers"]})["layers"].variant.rank,
    }


def error_of(call: Any) -> str:
    """The first line of the error that a call raises, or "nothing"."""
    try:
        call()
    except lj.LoRAError as error:
        return str(error).splitlines()[0]
    return "nothing"
