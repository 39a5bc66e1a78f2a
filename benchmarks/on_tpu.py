"""A training step compiled for a TPU in each form of evaluation, relative to LoRA by hand; no TPU is needed.

Use a separate environment: with the package `libtpu`, JAX looks for a TPU whenever it is initialized.

Usage:
    pip install -e ".[test]" libtpu
    python benchmarks/on_tpu.py
    python benchmarks/on_tpu.py --batch 32 --length 512 --only "rank 8"     # some minutes per case
    python benchmarks/on_tpu.py --quantized                                 # the tables of `quant.py`, in bfloat16
    PYTHONPATH=examples python benchmarks/on_tpu.py --many                  # the tables of `many.py`
"""

from __future__ import annotations

import os

# No TPU is present: the compiler must not query its type, and arrays stay on the CPU.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}

import dataclasses
from collections.abc import Iterator
from typing import Any

import forms
import jax
import jax.numpy as jnp
import models
import quant
import records
from against.figures import progress
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from sizes import SMALL
from timing import copied_args, jitted

TOPOLOGY = "v5e:2x4"
METHODS = ("LoRA by hand", "lora()", "lora(form='factored')", "W0 + s·A·B each step", "full fine-tuning")
UNITS = {"FLOPs": "×G", "bytes accessed": "×MB", "temporary bytes": "×MB"}  # of the compiler


def cases(batch: int, length: int) -> dict[str, Any]:
    """Returns decoders with float32 adapters."""

    def decoder(width: int, rank: int, *, scanned: bool = False, dtype: Any = jnp.float32) -> Any:
        size = dataclasses.replace(SMALL, batch=batch, length=length, width=width, hidden=4 * width, rank=rank)
        return lambda: models.case(size, scanned=scanned, dtype=dtype)

    return {
        "d = 256, rank 8": decoder(256, 8),
        "d = 256, rank 8, scan + remat": decoder(256, 8, scanned=True),
        "d = 256, rank 64": decoder(256, 64),
        "d = 256, rank 64, scan + remat": decoder(256, 64, scanned=True),
        "d = 768, rank 8": decoder(768, 8),
        "d = 768, rank 8, bfloat16": decoder(768, 8, dtype=jnp.bfloat16),
        "d = 768, rank 8, bfloat16, scan + remat": decoder(768, 8, scanned=True, dtype=jnp.bfloat16),
    }


def measure(case: Any, sharding: Any) -> dict[str, dict[str, float]]:
    """Returns the compiler's figures for all methods of a case."""

    def shape(x: Any) -> Any:
        return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=sharding)

    figures = {}
    makes = forms.methods(models)
    for name in METHODS:
        method = makes[name](case)
        program = jitted(method).lower(*jax.tree.map(shape, (*copied_args(method), case.tokens))).compile()
        cost = program.cost_analysis()
        figures[name] = {
            "FLOPs": cost["flops"],  # counts a loop body once
            "temporary bytes": program.memory_analysis().temp_size_in_bytes,
            "bytes accessed": cost["bytes accessed"],
        }
    return figures


def tables(only: str, batch: int, length: int, device: Any) -> Iterator[records.Table]:
    """Yields a table for each figure, with a row for each case."""
    found = {}
    for title, make in cases(batch, length).items():
        if only in title:
            progress(title)
            found[title] = measure(make(), SingleDeviceSharding(device))
    for figure, unit in UNITS.items():
        yield forms.across(figure, unit, found)


def main() -> None:
    """Compiles, prints, and writes the requested file."""
    parser = records.parser(__doc__)
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--batch", type=int, default=SMALL.batch)
    parser.add_argument("--length", type=int, default=SMALL.length)
    parser.add_argument("--quantized", action="store_true", help="steps on quantized bases instead")
    parser.add_argument("--many", action="store_true", help="many adapters of one base instead")
    given = parser.parse_args()
    device = topologies.get_topology_desc(TOPOLOGY, platform="tpu").devices[0]
    if given.quantized:
        found = quant.tables(device, ["bfloat16"], steps=0, only=given.only)
    elif given.many:
        import many  # needs the packages of the examples

        found = many.counted(device)
    else:
        found = tables(given.only, given.batch, given.length, device)
    records.publish(found, given.json, "libtpu", *(quant.PACKAGES if given.quantized else []))


if __name__ == "__main__":
    main()
