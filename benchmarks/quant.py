"""Quantized bases: their error, and the cost of a training step, relative to LoRA on a dense base and to Qwix's QLoRA.

Usage:
    make quant                                # in float32, with Qwix, in an environment of its own
    python benchmarks/quant.py --steps 0      # deterministic figures only
    python benchmarks/on_tpu.py --quantized   # the same steps, compiled for a TPU

`quant_curves.py` trains on quantized bases.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.util
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import records
from against import lora_jax
from against.cases import Case, decoder
from against.figures import progress
from against.flops import flops
from decoder import Method
from jax.sharding import SingleDeviceSharding
from sizes import Size
from timing import copied_args, jitted, run

from lora_jax import quant

SIZE = Size(layers=6, width=512, heads=8, hidden=2048, vocabulary=2048, batch=4, length=128, rank=8)
DEPTHS = (3, 6, 12)
DENSE = "dense"
PACKAGES = ["qwix"] * bool(importlib.util.find_spec("qwix"))  # those that are compared
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
COLUMNS = {"FLOPs": "×G", "arguments": "MB", "temporary": "MB", "step": "×ms", "first loss": ""}
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
    if PACKAGES:
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
        losses, seconds = run(programs, args, case.inputs, steps=steps)
        for name, row in rows.items():
            row |= {"step": seconds[name], "first loss": losses[name]}
    return rows


def growth(device: Any, dtype: Any) -> records.Table:
    """Returns the temporary bytes of a step by layers, and the dequantized kernels at once in the deepest."""
    size = dataclasses.replace(SIZE, vocabulary=SIZE.vocabulary // 2, batch=2, length=48)
    elements = {size.width**2, size.width * size.hidden}  # no activation has as many
    rows: dict[str, dict[str, Any]] = {}
    for (scanned, title), (name, build) in itertools.product(TITLES.items(), methods(GROWING).items()):
        row: dict[str, Any] = {}
        for layers in DEPTHS:
            progress(f"{title}, {layers} layers: {name}")
            case = decoder(dataclasses.replace(size, layers=layers), scanned=scanned, dtype=dtype)
            program = compile_for(build(case), case.inputs, device)
            row[f"{layers} layers"] = program.memory_analysis().temp_size_in_bytes
        first, *_, last = row.values()
        row["each layer adds"] = (last - first) / (DEPTHS[-1] - DEPTHS[0])
        row["kernels at once"] = None if name == DENSE else alive_at_once(program.as_text(), elements)
        rows[f"{title}: {name}"] = row
    columns = {column: "" if column == "kernels at once" else "MB" for column in row}
    return records.Table(f"Temporary bytes by layers, {jnp.dtype(dtype).name}", columns, rows)


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


def errors() -> records.Table:
    """Returns bits per weight and relative error for kernels of standard normal values."""
    w = jax.random.normal(jax.random.key(0), (1024, 1024))
    rows = {}
    for name, format_ in FORMATS.items():
        leaf = quant.quantize({"w": w}, {"w": format_})["w"]
        error = float(jnp.linalg.norm(leaf.dequantize() - w) / jnp.linalg.norm(w))
        rows[name] = {
            "bits per weight": f"{8 * leaf.nbytes / leaf.size:.3f}",
            "relative error": f"{error:.5f}",
        }
    return records.Table("Errors", dict.fromkeys(rows[name], ""), rows)


def tables(device: Any, dtypes: list[Any], *, steps: int, only: str = "") -> Iterator[records.Table]:
    """Yields the tables of steps compiled for a device; they are run if `steps` is positive."""
    for dtype in dtypes:
        name = jnp.dtype(dtype).name
        for scanned, title in TITLES.items():
            if only in f"{name}, {title}":
                rows = measure(decoder(SIZE, scanned=scanned, dtype=dtype), device, steps=steps)
                yield records.Table(f"{name}, {title}", COLUMNS, rows)
                jax.clear_caches()
        if only in f"{name}, growth":
            yield growth(device, dtype)


def main() -> None:
    """Measures, prints, and writes the requested file."""
    parser = records.parser(__doc__)
    parser.add_argument("--steps", type=int, default=9, help="steps to time for each method; 0 for none")
    parser.add_argument("--only", default="", help="only tables whose name contains this")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    given = parser.parse_args()
    found = tables(jax.devices()[0], given.dtypes, steps=given.steps, only=given.only)
    records.publish(itertools.chain([errors()] * (given.only in "errors"), found), given.json, *PACKAGES)


if __name__ == "__main__":
    main()
