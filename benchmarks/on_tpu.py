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

import argparse
import dataclasses
from typing import Any

import forms
import jax
import jax.numpy as jnp
import models
import quant
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from sizes import SMALL
from timing import copied_args, jitted

TOPOLOGY = "v5e:2x4"
METHODS = ("LoRA by hand", "lora()", "lora(form='factored')", "W0 + s·A·B each step", "full fine-tuning")
UNITS = {"FLOPs": (1e9, "G"), "temporary": (1e6, "MB"), "accessed": (1e6, "MB")}


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
            "temporary": program.memory_analysis().temp_size_in_bytes,
            "accessed": cost["bytes accessed"],
        }
    return figures


def row(figures: dict[str, float], reference: dict[str, float]) -> str:
    """Returns absolute figures for the reference, and ratios for the others."""
    if figures is reference:
        return "".join(f"{figures[name] / size:>11.2f} {unit:2}" for name, (size, unit) in UNITS.items())
    return "".join(f"{'× ' + format(figures[name] / reference[name], '.3f'):>14}" for name in UNITS)


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--batch", type=int, default=SMALL.batch)
    parser.add_argument("--length", type=int, default=SMALL.length)
    parser.add_argument("--quantized", action="store_true", help="steps on quantized bases instead")
    parser.add_argument("--many", action="store_true", help="many adapters of one base instead")
    given = parser.parse_args()
    device = topologies.get_topology_desc(TOPOLOGY, platform="tpu").devices[0]
    if given.quantized:
        for found in quant.tables(device, [jnp.bfloat16], steps=0, only=given.only):
            print(f"\n{found}", flush=True)
        return
    if given.many:
        import many  # needs the packages of the examples

        many.counted(device)
        return
    sharding = SingleDeviceSharding(device)
    for title, make in cases(given.batch, given.length).items():
        if given.only in title:
            figures = measure(make(), sharding)
            print(f"\n{title:50}" + "".join(f"{name:>14}" for name in UNITS))
            for name, found in figures.items():
                print(f"{name:50}{row(found, figures['LoRA by hand'])}", flush=True)


if __name__ == "__main__":
    main()
