"""FLOPs and temporary bytes of a training step of each variant, relative to LoRA; nothing is run.

Usage:
    python benchmarks/variants.py                                    # the CPU compiler; 4 to 6 minutes on 2 cores
    python benchmarks/variants.py --batch 16 --length 512 --tpu      # the TPU compiler; environment as for `on_tpu.py`
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Any

if "--tpu" in sys.argv:
    import on_tpu  # sets environment variables before JAX looks for a TPU

import jax
import jax.numpy as jnp
import records
from against.figures import progress
from decoder import Decoder, Method, cross_entropy, plain
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from sizes import ALPHA, SMALL, Size
from timing import jitted

import lora_jax as lj
from lora_jax import testing

RANK = 8
VARIANTS = {
    "LoRA": lj.LoRA(rank=RANK, alpha=ALPHA),
    "DoRA": lj.DoRA(rank=RANK, alpha=ALPHA),
    "AdaLoRA": lj.AdaLoRA(rank=RANK, alpha=ALPHA),
    "VeRA": lj.VeRA(rank=RANK, seed=0),
    "VeRA, rank 256": lj.VeRA(rank=256, seed=0),
    "LoRA-XS": lj.LoRAXS(rank=RANK, alpha=ALPHA),
    "DeLoRA": lj.DeLoRA(rank=RANK),
    "IA3": lj.IA3(),
    "MiSS": lj.MiSS(rank=RANK),
    "QA-LoRA": lj.QALoRA(rank=RANK, alpha=ALPHA, group=32),
}
CASES: dict[str, dict[str, Any]] = {
    "unrolled": {},
    "scan + remat": {"scanned": True},
    "bfloat16": {"dtype": jnp.bfloat16},
}


def method(size: Size, variant: Any, **options: Any) -> tuple[Method, jax.ShapeDtypeStruct]:
    """Returns a factored step that trains a variant on all kernels of the layers, and its tokens, as shapes."""
    model = Decoder(size, **options)
    apply, tokens = plain(model), jax.ShapeDtypeStruct((size.batch, size.length), jnp.int32)
    params = jax.eval_shape(lambda key, tokens: model.init(key, tokens)["params"], jax.random.key(0), tokens)
    kernels = lj.kernels(apply, params, tokens)
    init = functools.partial(lj.init, spec={"**/kernel": variant}, kernels=kernels)
    adapter = jax.eval_shape(lambda key, params: init(key, params), jax.random.key(0), params)
    adapted = lj.lora(apply, form="factored")

    def loss(adapter: Any, params: Any, tokens: Any) -> Any:
        return cross_entropy(adapted(params, adapter, tokens), tokens)

    return Method(loss, adapter, params), tokens


def figures(title: str, method: Method, tokens: Any, sharding: Any) -> dict[str, float]:
    """Returns FLOPs, counted on the jaxpr, and temporary bytes, as reported by the compiler."""
    args = (*jax.eval_shape(method.initial_args), tokens)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    program = jitted(method).lower(*args).compile()
    temporary = program.memory_analysis().temp_size_in_bytes
    return {f"FLOPs, {title}": testing.flops(method.step, *args), f"temporary, {title}": temporary}


def tables(size: Size, device: Any, only: str) -> Iterator[records.Table]:
    """Yields the table of all variants."""
    rows: dict[str, dict[str, float]] = {name: {} for name in VARIANTS}
    for title, options in CASES.items():
        for name, variant in VARIANTS.items() if only in title else ():
            progress(f"{title}: {name}")
            rows[name] |= figures(title, *method(size, variant, **options), SingleDeviceSharding(device))
    columns = {column: "×G" if column.startswith("FLOPs") else "×MB" for column in rows["LoRA"]}
    yield records.Table(f"{size.batch} × {size.length} tokens, d = {size.width}, rank {RANK}", columns, rows)


def main() -> None:
    """Compiles, prints, and writes the requested file."""
    parser = records.parser(__doc__)
    parser.add_argument("--batch", type=int, default=SMALL.batch)
    parser.add_argument("--length", type=int, default=SMALL.length)
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--tpu", action="store_true", help="compile for a TPU v5e")
    given = parser.parse_args()
    device = jax.devices()[0]
    if given.tpu:
        device = topologies.get_topology_desc(on_tpu.TOPOLOGY, platform="tpu").devices[0]
    size = dataclasses.replace(SMALL, width=768, heads=12, hidden=3072, rank=RANK, vocabulary=256)
    size = dataclasses.replace(size, batch=given.batch, length=given.length)
    records.publish(tables(size, device, given.only), given.json, *["libtpu"] * given.tpu)


if __name__ == "__main__":
    main()
