"""What a training step costs with this library and with every other that installs, and what each can adapt.

Usage:
    make peers                                           # makes the environments, measures, writes docs/performance.md
    python benchmarks/peers.py --only Quax --size small  # this library and one other
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from against import BY_HAND, ENVIRONMENTS
from against.picture import plot
from against.report import document, tables

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "peers.png"
BEGIN, END = "<!-- written by benchmarks/peers.py -->", "<!-- end of what benchmarks/peers.py writes -->"
DEFAULTS = {"tiny": (1, 3), "small": (3, 25), "base": (1, 7)}  # how often each step is compiled, and run
OWN = "lora_jax"


def interpreter(environment: str) -> str | None:
    """The Python of an environment that `make peers` has made; for JAX's, else the one that runs this."""
    made = ROOT / f".venv-peers-{environment}" / "bin" / "python"
    return str(made) if made.exists() else sys.executable if environment == "jax" else None


def measured(environment: str, options: list[str]) -> dict[str, Any]:
    """Measures one environment in a process of its own, or says why it cannot."""
    python = interpreter(environment)
    if python is None:
        return {"missing": "its environment is not made: run `make peers`"}
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [python, "-W", "ignore", "-m", "against", environment, *options, "--out", str(out)]
        print(f"{environment}: {python}", file=sys.stderr, flush=True)
        run = subprocess.run(command, cwd=ROOT / "benchmarks", env=os.environ | paths, check=False)
        return json.loads(out.read_text()) if run.returncode == 0 else {"missing": f"exit code {run.returncode}"}


def processor() -> str:
    """The name of the machine's processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def write_docs(results: dict[str, Any]) -> None:
    """Replaces what stands between the two marks."""
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{document(results, PICTURE.name)}\n\n{END}{after}")


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [peer.name for peers in ENVIRONMENTS.values() for peer in peers]
    parser.add_argument("--size", choices=DEFAULTS, default="small")
    parser.add_argument("--rounds", type=int, help="how often each step is compiled")
    parser.add_argument("--steps", type=int, help="how many steps are timed")
    parser.add_argument("--only", action="append", choices=names, help="this library and that one; more than once")
    parser.add_argument("--quick", action="store_true", help="without the table of what each can adapt")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--read", type=Path, help="measure nothing: read the figures from here")
    parser.add_argument("--plot", type=Path, help="draw the ratios here, as PNG")
    parser.add_argument("--write-docs", action="store_true", help="write them into docs/performance.md")
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
        "machine": processor(),
        "size": given.size,
        "environments": {name: measured(name, options) for name in wanted},
    }


def main() -> int:
    """Measures, prints, and writes what was asked for; 1 if this library itself could not be measured."""
    given = arguments()
    results = json.loads(given.read.read_text()) if given.read else measure(given)
    print(tables(results))
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")
    if given.plot:
        plot(results, given.plot)
    if given.write_docs:
        plot(results, PICTURE)
        write_docs(results)
    cases = results["environments"].get("jax", {}).get("cases", {})
    return int(not cases or any(isinstance(its[name], str) for its in cases.values() for name in (OWN, BY_HAND)))


if __name__ == "__main__":
    sys.exit(main())
