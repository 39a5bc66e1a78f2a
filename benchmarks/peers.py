"""The cost of a training step with this library and other LoRA libraries, and what each of them can adapt.

Usage:
    make peers                                           # creates environments, measures, writes docs/performance.md
    python benchmarks/peers.py --only Quax --size small  # this library and another one
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import records
from against import BY_HAND, ENVIRONMENTS
from against.picture import plot
from against.report import document, tables

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "peers.png"
DEFAULTS = {"tiny": (1, 3), "small": (3, 25), "base": (1, 7)}  # how many times each step is compiled and run
OWN = "lora_jax"


def interpreter(environment: str) -> str | None:
    """Returns the Python of an environment of `make peers`; if missing, the current one for the environment `jax`."""
    path = ROOT / f".venv-peers-{environment}" / "bin" / "python"
    return str(path) if path.exists() else sys.executable if environment == "jax" else None


def measure_environment(environment: str, options: list[str]) -> dict[str, Any]:
    """Measures one environment in a separate process; returns the reason if that fails."""
    python = interpreter(environment)
    if python is None:
        return {"missing": "the environment does not exist: run `make peers`"}
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [python, "-W", "ignore", "-m", "against", environment, *options, "--out", str(out)]
        print(f"{environment}: {python}", file=sys.stderr, flush=True)
        run = subprocess.run(command, cwd=ROOT / "benchmarks", env=os.environ | paths, check=False)
        return json.loads(out.read_text()) if run.returncode == 0 else {"missing": f"exit code {run.returncode}"}


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [peer.name for peers in ENVIRONMENTS.values() for peer in peers]
    parser.add_argument("--size", choices=DEFAULTS, default="small")
    parser.add_argument("--rounds", type=int, help="how many times each step is compiled")
    parser.add_argument("--steps", type=int, help="number of steps to time")
    parser.add_argument("--only", action="append", choices=names, help="this library and the named one; repeatable")
    parser.add_argument("--quick", action="store_true", help="without the table of capabilities")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--read", type=Path, help="read the figures from here instead of measuring")
    parser.add_argument("--plot", type=Path, help="write a plot of the ratios here, as PNG")
    parser.add_argument("--write-docs", action="store_true", help="write docs/performance.md")
    return parser.parse_args()


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Measures the environments one after the other."""
    rounds, steps = DEFAULTS[given.size]
    options = ["--size", given.size, "--rounds", str(given.rounds or rounds), "--steps", str(given.steps or steps)]
    options += ["--quick"] * given.quick
    only = given.only and {OWN, *given.only}
    options += [word for name in sorted(only or ()) for word in ("--only", name)]
    wanted = [name for name, peers in ENVIRONMENTS.items() if not only or any(peer.name in only for peer in peers)]
    return {
        "command": shlex.join(["python", "benchmarks/peers.py", *sys.argv[1:]]),
        "machine": records.processor(),
        "size": given.size,
        "environments": {name: measure_environment(name, options) for name in wanted},
    }


def main() -> int:
    """Measures, prints, and writes the requested files; returns 1 if this library could not be measured."""
    given = arguments()
    results = json.loads(given.read.read_text()) if given.read else measure(given)
    print(tables(results))
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")
    if given.plot:
        plot(results, given.plot)
    if given.write_docs:
        plot(results, PICTURE)
        records.fill(PAGE, Path(__file__).name, document(results, PICTURE.name))
    cases = results["environments"].get("jax", {}).get("cases", {})
    return int(not cases or any(isinstance(rows[name], str) for rows in cases.values() for name in (OWN, BY_HAND)))


if __name__ == "__main__":
    sys.exit(main())
