"""Writes docs/benchmarks.md from the figures that the benchmarks have stored, and measures them before if told to.

Usage:
    make benchmarks                             # measures and writes; 12 minutes on 2 cores that do nothing else
    make benchmarks ONLY="forms layers"         # measures these and writes
    python benchmarks/page.py                   # writes only
"""

from __future__ import annotations

import argparse
import collections
import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

from records import read
from sections import BENCHMARKS, Benchmark

ROOT = Path(__file__).resolve().parents[1]
PAGE, FOLDER = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks"
# What some benchmarks need, and the environment of the Makefile that has it.
ENVIRONMENTS = {"torch": ".venv-oracle", "qwix": ".venv-peers-quant", "libtpu": ".venv-tpu"}
NAMES = {"python": "Python", "jax": "JAX", "flax": "Flax", "torch": "PyTorch", "peft": "PEFT", "qwix": "Qwix"}

INTRODUCTION = """\
# Benchmarks

{machine}; {versions}; {date}.
A section with other versions or another date names them.

- "×" marks ratios: to the first row, which has absolute figures; in some tables to the first column.
- *FLOPs* are counted on the jaxpr, with loop bodies times their iterations, and bytes are those of the compiler. Both
  are deterministic.
- Columns in *italics* are times. Compared programs are interleaved, on a machine that does nothing else. A ratio of
  times is the median of the ratios of adjacent runs, ± half their interquartile range. Differences below a tenth are
  noise. glibc keeps the memory that XLA frees, as [recommended](performance.md#memory-on-the-cpu) for the CPU.

`make benchmarks` measures and writes this page, and `make benchmarks ONLY=forms` measures one section again
([programs](../benchmarks/README.md)).
"""
ELSEWHERE = """\
## On other pages

- [Other libraries](performance.md#against-other-libraries): the step with every other LoRA library (`make peers`).
- [Scale](scale.md): training 8B to 70B parameters on 8 to 256 devices (`scale.py`, `scale_qlora.py`).
- [Losses on quantized bases](quantization.md#training) (`quant_curves.py`).
"""


def interpreter(package: str) -> str | None:
    """Returns a Python that has a package: that of its environment, or this one; None if neither has it."""
    for python in (str(ROOT / ENVIRONMENTS[package] / "bin" / "python"), sys.executable):
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
        if os.path.exists(python) and not subprocess.call([python, "-c", code]):
            return python
    return None


def measure(benchmark: Benchmark) -> int:
    """Runs a benchmark, which stores its figures, and returns its exit code; says why not if something is missing."""
    python = interpreter(benchmark.needs) if benchmark.needs else sys.executable
    if python is None:
        print(f"{benchmark.name}: not measured, {ENVIRONMENTS[benchmark.needs]} has no {benchmark.needs}", flush=True)
        return 0
    script, *arguments = shlex.split(benchmark.arguments)
    command = [sys.executable if "PYTHON" in arguments else python, str(ROOT / "benchmarks" / script)]
    command += [python if argument == "PYTHON" else argument for argument in arguments]
    print(f"\n{benchmark.name}: {benchmark.arguments}", flush=True)
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
    code = subprocess.call([*command, "--json", str(file_of(benchmark))], cwd=ROOT, env=os.environ | paths)
    print(f"{benchmark.name}: exit code {code}", flush=True)
    return code


def file_of(benchmark: Benchmark) -> Path:
    return FOLDER / f"{benchmark.name}.json"


def named(versions: dict[str, str]) -> str:
    """Returns versions, or a date, as part of a sentence."""
    return ", ".join(f"{NAMES.get(name, name)} {version}" for name, version in versions.items())


def render() -> dict[Path, str]:
    """Returns the page and its pictures, as text by path."""
    stored = {one.name: read(file_of(one)) for one in BENCHMARKS if file_of(one).exists()}
    facts = {name: record["versions"] | {"date": record["date"]} for name, (record, _) in stored.items()}
    names = ("date", "python", "jax", "jaxlib", "flax")
    common = {name: collections.Counter(fact[name] for fact in facts.values()).most_common(1)[0][0] for name in names}
    machines = dict.fromkeys(record["machine"] for record, _ in stored.values())
    versions = named({name: common[name] for name in names[1:]})
    parts = [INTRODUCTION.format(date=common["date"], machine=" and ".join(machines), versions=versions)]
    written: dict[Path, str] = {}
    for benchmark in BENCHMARKS:
        parts.append(f"## {benchmark.title}\n\n{textwrap.fill(benchmark.measures, 120)}\n")
        if benchmark.name not in stored:
            parts.append("Not measured.\n")
            continue
        record, tables = stored[benchmark.name]
        other = {name: value for name, value in facts[benchmark.name].items() if common.get(name) != value}
        parts.append(f"    {record['command']}\n")
        parts += [f"Measured with {named(other)}.\n"] * bool(other)
        if benchmark.chart:
            picture = FOLDER / f"{benchmark.name}.svg"
            written[picture] = str(benchmark.chart.draw(tables))
            parts.append(f"![{benchmark.chart.title}](benchmarks/{picture.name})\n")
        parts += [f"**{table.title}**\n\n{table.markdown()}\n" for table in tables]
    return {PAGE: "\n".join([*parts, ELSEWHERE]), **written}


def main() -> int:
    """Measures what is named, and writes the page; returns 1 if a benchmark fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"measures: {', '.join(b.name for b in BENCHMARKS)}")
    parser.add_argument("--default", action="store_true", help="measures those that take some minutes each")
    given = parser.parse_args()
    by_name = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    if unknown := set(given.names) - set(by_name):
        parser.error(f"expected names of benchmarks, got {', '.join(sorted(unknown))}; there are {', '.join(by_name)}")
    FOLDER.mkdir(exist_ok=True)
    chosen = [one for one in BENCHMARKS if one.name in given.names or (given.default and one.by_default)]
    codes = [measure(benchmark) for benchmark in chosen]
    for path, text in render().items():
        path.write_text(text)
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
