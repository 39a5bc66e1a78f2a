"""Exports an adapter that is sharded over processes. test_distributed.py runs it in several processes."""

from pathlib import Path
from typing import Any

import distributed_values
import jax
import numpy as np
from helpers import bits
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import peft

SPEC = {"kernel": lj.LoRA(rank=2, alpha=4), "layers": lj.Full()}
MAPPING = {"kernel": peft.linear("fc"), "layers": peft.linear("layers.{i}")}
SHARDED = {"kernel": {"a": P("x"), "b": P(None, "x")}, "layers": {"value": P("x")}}


def run(root: Path) -> dict[str, Any]:
    """The results of one process, with the adapter in device memory and in host memory."""
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))
    base = distributed_values.make_base()
    adapter = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, lj.init(jax.random.key(0), base, SPEC))
    results = {}
    for kind in ("device", "pinned_host"):
        shardings = {
            path: lj.Adapter(
                part.variant,
                part.axes,
                **{name: NamedSharding(mesh, spec, memory_kind=kind) for name, spec in SHARDED[path].items()},
            )
            for path, part in adapter.items()
        }
        sharded = jax.device_put(adapter, shardings)
        assert not any(leaf.is_fully_addressable for leaf in jax.tree.leaves(sharded))
        peft.export(root / kind, sharded, MAPPING, base=base)
        results[kind] = bits(peft.load(root / kind, MAPPING, base)) == bits(adapter)
    (root / "file").write_text("")
    try:
        peft.export(root / "file", adapter, MAPPING, base=base)
    except lj.CheckpointError as error:
        results["error"] = str(error)
    return results
