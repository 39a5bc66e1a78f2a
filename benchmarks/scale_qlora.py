"""Memory of QLoRA for a Llama of 65B parameters on one device, from `plan`: what fits into 24 and 48 GB.

Nothing is allocated or run: the device is the CPU, or a TPU that is not attached.

Usage:
    python benchmarks/scale_qlora.py                           # two minutes
    python benchmarks/scale_qlora.py --only 3 4 5 --topology v5p:2x2x1 --json tpu.json # needs `pip install libtpu`
    python benchmarks/scale_qlora.py --write-docs tpu.json     # the table of docs/scale.md, with these rows too
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import llama
import numpy as np
import optax
import records
from jax.sharding import AxisType, Mesh
from llama import Llama
from records import aligned
from scale_report import gigabytes

import lora_jax as lj

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
LLAMA_65B = Llama(layers=80, width=8192, heads=64, hidden=22016, kv_heads=64, vocabulary=32000)
KERNELS = ["blocks/{query,key,value}", "blocks/out", "blocks/{gate,up,down}"]
RANK, LENGTH = 64, 512
BASES = {
    "bfloat16": None,
    "NF4": lj.quant.NF4(double=False),
    "NF4, double": lj.quant.NF4(),
}
DEVICES = [24, 48]  # GB


def mesh_of(topology: str | None) -> Mesh:
    """Returns a mesh of one device: a CPU, or one of a TPU topology."""
    if topology is None:
        device = jax.devices()[0]
    else:
        from jax.experimental import topologies

        device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    return Mesh(np.array([[device]]), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def measure(
    mesh: Mesh,
    *,
    base: str = "NF4, double",
    model: Llama = LLAMA_65B,
    param_dtype: Any = jnp.float32,
    base_on_host: bool = False,
    optimizer_on_host: bool = False,
    rank: int = RANK,
    length: int = LENGTH,
) -> dict[str, Any]:
    """Plans a step with one sequence: LoRA on all kernels of the blocks, AdamW."""
    params = model.shapes(mesh)
    axes = dict(zip(KERNELS, ("bioo", "biio", "bio"), strict=True))
    if (format_ := BASES[base]) is not None:
        formats = {path: type(format_)(double=format_.double, axes=axes[path]) for path in KERNELS}
        params = lj.quant.quantize(params, formats)
    if base_on_host:
        params = lj.sharding.to_host(params, paths=KERNELS)
    tx = optax.adamw(1e-4)
    found = lj.plan(
        llama.loss,
        params,
        {path: lj.LoRA(rank=rank, alpha=rank, axes=axes[path]) for path in KERNELS},
        lj.optim.offload(tx) if optimizer_on_host else tx,
        mesh,
        llama.tokens(mesh, 1, length),
        full=False,
        param_dtype=param_dtype,
    ).lora
    state_on_host = found.optimizer - 4 if optimizer_on_host else 0  # the count stays on the device
    return {
        "kind": mesh.devices.flat[0].device_kind,
        "base": base,
        "adapter dtype": jnp.dtype(param_dtype).name,
        "base on host": base_on_host,
        "optimizer on host": optimizer_on_host,
        "parameters": found.parameters,
        "adapter": found.adapter,
        "optimizer": found.optimizer,
        "parameters on host": found.host - state_on_host,
        "temporary": found.temporary,
        "peak": found.peak,
        "host": found.host,
        "seconds": found.seconds,
    }


CASES: list[dict[str, Any]] = [
    {"base": "bfloat16"},
    {"base": "NF4"},
    *(
        {"base_on_host": base_on_host, "optimizer_on_host": optimizer_on_host, "param_dtype": dtype}
        for dtype, base_on_host, optimizer_on_host in itertools.product(
            (jnp.float32, jnp.bfloat16), (False, True), (False, True)
        )
    ),
]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the table of the memory, in GB."""
    heads = ["base", "adapter", "on the host", "compiler", "base", "adapter", "optimizer", "temporary", "peak", "host"]
    lines = [[*heads, *(f"fits {size} GB" for size in DEVICES)]]
    for row in rows:
        moved = [name for name in ("base", "optimizer") if row[f"{name} on host"]]
        on_device = row["parameters"] - row["parameters on host"]
        optimizer = 0 if row["optimizer on host"] else row["optimizer"]
        lines.append(
            [
                row["base"],
                row["adapter dtype"],
                " and ".join(moved) or "nothing",
                row["kind"],
                *map(gigabytes, (on_device, row["adapter"], optimizer, row["temporary"], row["peak"], row["host"])),
                *("yes" if row["peak"] <= size * 1e9 else "no" for size in DEVICES),
            ]
        )
    return aligned(lines)


def main() -> None:
    """Measures, prints, and writes the requested files."""
    parser = records.parser(__doc__)
    parser.add_argument("--topology", help="a TPU topology such as v5p:2x2x1 instead of the CPU")
    parser.add_argument("--only", type=int, nargs="*", help="only these rows, counted from 0")
    parser.add_argument("--write-docs", type=Path, nargs="*", help="write docs/scale.md, with the rows of these files")
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # the topology is not attached
    mesh, rows = mesh_of(given.topology), []
    for number, case in enumerate(CASES):
        if given.only is None or number in given.only:
            rows.append(measure(mesh, **case))
            print(rows[-1], file=sys.stderr, flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")
    for path in given.write_docs or ():
        rows += json.loads(path.read_text())
    print("\n" + table(rows))
    if given.write_docs is not None:
        records.fill(PAGE, Path(__file__).name, table(rows))


if __name__ == "__main__":
    main()
