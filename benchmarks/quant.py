"""Quantized bases: their error, and the cost of a training step, relative to LoRA on a dense base and to Qwix's QLoRA.

Usage:
    make quant                                # all tables, with Qwix, in an environment of its own
    python benchmarks/quant.py --only errors  # in an environment with bitsandbytes, also its errors
    python benchmarks/quant.py --steps 0      # deterministic figures only
    python benchmarks/on_tpu.py --quantized   # the same steps, compiled for a TPU

`quant_curves.py` trains on quantized bases.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import importlib.util
import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from against import lora_jax
from against.cases import Case, decoder
from against.figures import progress
from against.flops import flops
from against.measure import run
from against.report import aligned, ratio
from decoder import Method
from jax.sharding import SingleDeviceSharding
from sizes import Size
from timing import copied_args, jitted

from lora_jax import quant

SIZE = Size(layers=6, width=512, heads=8, hidden=2048, vocabulary=2048, batch=4, length=128, rank=8)
DEPTHS = (3, 6, 12)
DENSE = "dense"
FORMATS: dict[str, quant.Format] = {
    "NF4": quant.NF4(double=False),
    "NF4, double": quant.NF4(),
    "Int8": quant.Int8(),
    "Float8": quant.Float8(),
}
QWIX: dict[str, dict[str, Any]] = {
    "Qwix, dense": {},
    "Qwix, nf4, tiles of 64": {"weight_qtype": "nf4", "tile_size": 64},
    "Qwix, int8": {"weight_qtype": "int8"},
}
GROWING = (DENSE, "NF4", "NF4, double", "Int8", "Qwix, nf4, tiles of 64")
TITLES = {False: "unrolled", True: "scan + remat"}


def on_lora_jax(case: Case, format_: quant.Format | None) -> Method:
    """Trains an adapter of all kernels of the layers, which are in a format."""
    if format_ is None:
        return lora_jax.build(case)
    spec = {path: dataclasses.replace(format_, axes=factors.roles) for path, factors in case.adapter.items()}
    return lora_jax.build(case._replace(params=quant.quantize(case.params, spec)))


def methods(names: tuple[str, ...] = ()) -> dict[str, Callable[[Case], Method]]:
    """Returns the methods: all, or those named. Those of Qwix are left out if it is not installed."""
    found = {DENSE: functools.partial(on_lora_jax, format_=None)}
    found |= {name: functools.partial(on_lora_jax, format_=format_) for name, format_ in FORMATS.items()}
    if importlib.util.find_spec("qwix"):
        from against import qwix_linen

        found |= {name: functools.partial(qwix_linen.build, **options) for name, options in QWIX.items()}
    return {name: build for name, build in found.items() if not names or name in names}


def compile_for(method: Method, inputs: Any, device: Any) -> Any:
    """Compiles a training step for a device, which need not exist."""
    sharding = SingleDeviceSharding(device)

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=sharding)

    return jitted(method).lower(*jax.tree.map(shape, (*method.initial_args(), inputs))).compile()


def measure(case: Case, device: Any, *, steps: int) -> dict[str, dict[str, Any]]:
    """Returns the figures of all methods. The steps are interleaved."""
    rows, programs, args = {}, {}, {}
    for name, build in methods().items():
        progress(f"compile: {name}")
        method = build(case)
        args[name] = copied_args(method)
        programs[name] = compile_for(method, case.inputs, device)
        memory = programs[name].memory_analysis()
        rows[name] = {
            "FLOPs": flops(method.step, *args[name], case.inputs),
            "arguments": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
        }
    if steps:
        losses, seconds = run(programs, args, case, steps=steps)
        for name, row in rows.items():
            row |= {"step": seconds[name], "first loss": losses[name]}
    return rows


UNITS = {"FLOPs": (1e9, "G"), "arguments": (1e6, "MB"), "temporary": (1e6, "MB"), "step": (1e-3, "ms")}


def step_table(rows: dict[str, dict[str, Any]]) -> str:
    """Returns bytes, and the ratios of FLOPs and time to LoRA on a dense base."""
    lines = [["base", *next(iter(rows.values()))]]
    for name, row in rows.items():
        cells = []
        for column, value in row.items():
            if column not in UNITS:
                cells.append(f"{value:.4f}")
                continue
            size, unit = UNITS[column]
            found = ratio(column, row, rows[DENSE])
            if row is rows[DENSE] or unit == "MB":
                middle = statistics.median(value) if isinstance(value, list) else value
                cells.append(f"{middle / size:.1f} {unit}")
            else:
                cells.append(f"× {found.value:.3f}" + (f" ± {found.spread:.3f}" if found.spread else ""))
        lines.append([name, *cells])
    return aligned(lines)


def growth(device: Any, dtype: Any) -> str:
    """Returns the temporary bytes of a step by layers, and the dequantized kernels at once in the deepest."""
    size = dataclasses.replace(SIZE, vocabulary=SIZE.vocabulary // 2, batch=2, length=48)
    elements = {size.width**2, size.width * size.hidden}  # no activation has as many
    lines = [["layers", "base", *map(str, DEPTHS), "each layer adds", "kernels at once"]]
    for scanned, title in TITLES.items():
        for name, build in methods(GROWING).items():
            found = []
            for layers in DEPTHS:
                progress(f"{title}, {layers} layers: {name}")
                case = decoder(dataclasses.replace(size, layers=layers), scanned=scanned, dtype=dtype)
                program = compile_for(build(case), case.inputs, device)
                found.append(program.memory_analysis().temp_size_in_bytes)
            added = (found[-1] - found[0]) / (DEPTHS[-1] - DEPTHS[0])
            cells = [f"{value / 1e6:.1f} MB" for value in (*found, added)]
            alive = "–" if name == DENSE else str(alive_at_once(program.as_text(), elements))
            lines.append([title, name, *cells, alive])
    return aligned(lines)


INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = (\([^=]*?\)|\S+) ([\w-]+)\((.*)")
SAME_ARRAY = ("bitcast", "reshape", "get-tuple-element", "copy-start", "copy-done")


def alive_at_once(scheduled: str, elements: set[int]) -> int:
    """Returns how many computed floating-point arrays of these sizes exist at once, at most, in a scheduled program."""
    fused = set(re.findall(r"calls=%([\w.-]+)", scheduled))
    most = 0
    for name, body in re.findall(r"^(?:ENTRY )?%([\w.-]+) [^\n]*\{\n(.*?)^\}", scheduled, re.MULTILINE | re.DOTALL):
        if name in fused:
            continue
        owner: dict[str, str] = {}
        made: dict[str, tuple[int, int]] = {}
        last: dict[str, int] = {}
        for at, match in enumerate(filter(None, map(INSTRUCTION.match, body.splitlines()))):
            result, types, operation, rest = match.groups()
            operands = [owner.get(operand, operand) for operand in re.findall(r"%([\w.-]+)", rest)]
            last |= dict.fromkeys(operands, at)
            if operation in SAME_ARRAY:
                owner[result] = operands[0]
            elif operation != "parameter":
                shapes = re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", types)
                made[result] = at, sum(math.prod(map(int, shape.split(","))) in elements for shape in shapes)
        change = collections.Counter()
        for result, (at, count) in made.items():
            change[at] += count
            change[last.get(result, at) + 1] -= count
        most = max(most, *itertools.accumulate(change[at] for at in range(len(body.splitlines()) + 2)))
    return most


def errors() -> str:
    """Returns bits per weight and relative error for kernels of standard normal values."""
    w = jax.random.normal(jax.random.key(0), (1024, 1024))
    lines = [["format", "bits per weight", "relative error", "bitsandbytes"]]
    for name, format_ in FORMATS.items():
        leaf = quant.quantize({"w": w}, {"w": format_})["w"]
        error = jnp.linalg.norm(leaf.dequantize() - w) / jnp.linalg.norm(w)
        lines.append([name, f"{8 * leaf.nbytes / leaf.size:.3f}", f"{error:.5f}", _of_bitsandbytes(format_, w)])
    return aligned(lines)


def _of_bitsandbytes(format_: quant.Format, w: Any) -> str:
    """Returns the relative error of bitsandbytes for the same kernel in NF4, if it is installed."""
    if not isinstance(format_, quant.NF4) or not importlib.util.find_spec("bitsandbytes"):
        return "–"
    import bitsandbytes.functional as bnb
    import numpy as np
    import torch

    kernel = torch.from_numpy(np.array(w.T))
    packed, state = bnb.quantize_4bit(kernel, quant_type="nf4", compress_statistics=format_.double)
    return f"{torch.linalg.norm(bnb.dequantize_4bit(packed, state) - kernel) / torch.linalg.norm(kernel):.5f}"


def tables(device: Any, dtypes: list[Any], *, steps: int, only: str = "") -> Iterator[str]:
    """Yields the tables of steps compiled for a device; they are run if `steps` is positive."""
    for dtype in dtypes:
        name = jnp.dtype(dtype).name
        for scanned, title in TITLES.items():
            if only in f"{name}, {title}":
                case = decoder(SIZE, scanned=scanned, dtype=dtype)
                yield f"### A step: {name}, {title}\n\n{step_table(measure(case, device, steps=steps))}"
                jax.clear_caches()
        if only in f"{name}, growth":
            yield f"### Temporary bytes by layers: {name}\n\n{growth(device, dtype)}"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=9, help="steps to time for each method; 0 for none")
    parser.add_argument("--only", default="", help="only tables whose name contains this")
    given = parser.parse_args()
    print(f"jax {jax.__version__}; {', '.join(f'{n} {v}' for n, v in dataclasses.asdict(SIZE).items())}")
    if given.only in "errors":
        print(f"\n### Errors\n\n{errors()}")
    for table in tables(jax.devices()[0], [jnp.float32, jnp.bfloat16], steps=given.steps, only=given.only):
        print(f"\n{table}", flush=True)


if __name__ == "__main__":
    main()
