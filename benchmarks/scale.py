"""Memory, FLOPs and communication of training Llama-3-like models of 8B and 70B parameters, from `plan`.

Nothing is allocated or run: the 8 to 256 devices are simulated, or belong to a TPU topology that is not attached.

Usage:
    python benchmarks/scale.py --write-docs                        # all tables of docs/scale.md; some minutes
    python benchmarks/scale.py --only 8B --devices 8               # one row
    python benchmarks/scale.py --topology v5p --json tpu.json      # with the TPU compiler; needs `pip install libtpu`
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import llama
import numpy as np
import optax
import records
from jax.sharding import Mesh
from llama import Llama
from scale_report import SWEEPS, document, plot, tables

import lora_jax as lj

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs" / "scale.md", ROOT / "docs" / "scale.png"
MODELS = {
    "8B": Llama(layers=32, width=4096, heads=32, hidden=14336),
    "70B": Llama(layers=80, width=8192, heads=64, hidden=28672),
}
MESHES = {8: (2, 4), 64: (8, 8), 256: (32, 8)}  # data × model
TOPOLOGIES = {8: "2x2x2", 64: "4x4x4", 256: "4x8x8"}
KERNELS = "blocks/{query,key,value,out,gate,up,down}"
RANK, LENGTH = 16, 2048


def mesh_of(devices: int, topology: str | None) -> Mesh:
    """Returns a mesh of simulated CPU devices, or of a TPU topology such as v5p."""
    if topology is None:
        found = jax.devices()[:devices]
    else:
        from jax.experimental import topologies

        found = topologies.get_topology_desc(f"{topology}:{TOPOLOGIES[devices]}", platform="tpu").devices
    return Mesh(np.array(found).reshape(MESHES[devices]), ("data", "model"))


def measure(
    model: Llama,
    mesh: Mesh,
    *,
    rank: int = RANK,
    sequences: int = 1,
    length: int = LENGTH,
    loss: Callable[..., Any] = llama.loss,
) -> dict[str, Any]:
    """Plans one step: `sequences` per row of the mesh, LoRA on all kernels of the blocks, AdamW."""
    before = live_bytes()
    found = lj.plan(
        loss,
        model.shapes(mesh),
        {KERNELS: lj.LoRA(rank=rank, alpha=2 * rank)},
        optax.adamw(1e-4),
        mesh,
        llama.tokens(mesh, sequences * mesh.shape["data"], length),
    )
    allocated = live_bytes() - before
    assert allocated < 1_000_000, f"{allocated} bytes are allocated"
    check(model, mesh, found.lora)
    return {
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "kind": found.kind,
        "layers": model.layers,
        "rank": rank,
        "sequences": sequences,
        "lora": figures(found.lora),
        "full": figures(found.full),
        "resident": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def figures(step: Any) -> dict[str, Any]:
    """Returns the fields of a step that JSON can hold."""
    fields = {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}
    del fields["compiled"], fields["collectives"]
    return fields | {"wire": step.wire and dict(step.wire), "largest_gather": step.largest_gather}


def live_bytes() -> int:
    """Returns the bytes of all arrays on devices."""
    return sum(array.nbytes for array in jax.live_arrays())


def check(model: Llama, mesh: Mesh, step: Any) -> None:
    """Asserts that the step does not gather all layers at once, nor carry a float32 copy of the base in a loop."""
    text = step.compiled.as_text()
    gathers = re.findall(r"= \(?\w+\[([\d,]+)\]\S* all-gather", text)
    replicated = stack_sizes(model, mesh, sharded=[(), ("data",), ("model",)])
    stacks = [sizes for sizes in map(parse_sizes, gathers) if sizes in replicated]
    assert not stacks, f"all layers are gathered at once: {stacks}"
    carried = re.findall(r"f32\[([\d,]+)\]", " ".join(re.findall(r"= (\(.*?\)) while\(", text)))
    shards = stack_sizes(model, mesh, sharded=[("data", "model")])
    copies = [sizes for sizes in map(parse_sizes, carried) if sizes in shards]
    assert not copies, f"the base is copied in float32: {copies}"


def stack_sizes(model: Llama, mesh: Mesh, *, sharded: Sequence[tuple[str, ...]]) -> list[list[int]]:
    """Returns the sorted sizes of the stacks of kernels, sharded along only these axes of the mesh."""
    stacks = [leaf for leaf in model.shapes(mesh)["blocks"].values() if leaf.ndim > 2]
    return [
        sorted(
            size // (mesh.shape[name] if name in names else 1)
            for size, name in zip(leaf.shape, leaf.sharding.spec, strict=True)
        )
        for leaf in stacks
        for names in sharded
    ]


def parse_sizes(text: str) -> list[int]:
    return sorted(map(int, text.split(",")))


def main() -> None:
    """Measures, prints, and writes the requested files."""
    parser = records.parser(__doc__)
    parser.add_argument("--only", choices=MODELS, action="append", help="only this model; repeatable")
    parser.add_argument("--devices", type=int, choices=MESHES, nargs="*", default=list(MESHES))
    parser.add_argument("--topology", help="a TPU topology such as v5p instead of simulated devices")
    parser.add_argument("--growth", action="store_true", help="also vary layers, rank and tokens")
    parser.add_argument("--read", type=Path, nargs="+", help="read the figures from these files instead of measuring")
    parser.add_argument("--write-docs", action="store_true", help="write docs/scale.md; implies --growth")
    given = parser.parse_args()
    results = read(given.read) if given.read else run(given)
    print("\n" + tables(results))
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")
    if given.write_docs:
        plot(results, PICTURE)
        records.fill(PAGE, Path(__file__).name, document(results, PICTURE.name))


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measures all rows."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(MESHES))
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # the topology is not attached
    rows = []
    for name in given.only or MODELS:
        for devices in given.devices:
            rows.append({"model": name, **measure(MODELS[name], mesh_of(devices, given.topology))})
            print(describe(rows[-1]), file=sys.stderr, flush=True)
    growth: dict[str, list[dict[str, Any]]] = {}
    if given.growth or given.write_docs:
        mesh = mesh_of(64, given.topology)
        for what, values in SWEEPS.items():
            growth[what] = [measure_change(what, value, mesh) for value in values]
    return {"versions": {"jax": jax.__version__}, "rows": rows, "growth": growth}


def measure_change(what: str, value: int, mesh: Mesh) -> dict[str, Any]:
    """Measures the 70B model with one size changed."""
    model = MODELS["70B"]
    if what == "layers":
        model, options = dataclasses.replace(model, layers=value), {}
    else:
        options = {what: value}
    row = {"model": "70B", **measure(model, mesh, **options)}
    print(what, describe(row), file=sys.stderr, flush=True)
    return row


def read(paths: list[Path]) -> dict[str, Any]:
    """Reads the figures of several runs."""
    runs = [json.loads(path.read_text()) for path in paths]
    return {
        "versions": runs[0]["versions"],
        "rows": [row for run in runs for row in run["rows"]],
        "growth": {what: rows for run in runs for what, rows in run["growth"].items()},
    }


def describe(row: dict[str, Any]) -> str:
    """Returns one row as a sentence."""
    seconds = row["lora"]["seconds"] + row["full"]["seconds"]
    return (
        f"{row['model']} of {row['layers']} layers, rank {row['rank']}, "
        f"{row['sequences']} × {LENGTH} tokens per mesh row, {row['devices']} devices ({row['kind']}): "
        f"{row['lora']['peak'] / 1e9:.2f} GB per device, {seconds:.1f} s, "
        f"{row['resident'] / 1e9:.2f} GB resident"
    )


if __name__ == "__main__":
    main()
