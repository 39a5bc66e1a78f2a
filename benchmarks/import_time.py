"""The time of `import lora_jax` in addition to `import jax, flax`; fails above a limit.

Usage:
    python benchmarks/import_time.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from typing import NamedTuple

BASE = "import jax, flax"
IMPORT = "import lora_jax"
LIMIT = 100  # milliseconds
MARK = "import of lora_jax"


class Import(NamedTuple):
    """A line of `python -X importtime`: milliseconds in a module, without and with its imports."""

    module: str
    own: float
    total: float


def fresh(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new process."""
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True)


def milliseconds(*statements: str) -> list[float]:
    """Returns the time of each statement, run in order in one new process."""
    lines = ["import time", "clock = time.perf_counter"]
    for statement in statements:
        lines += ["start = clock()", statement, "print(1e3 * (clock() - start))"]
    return [float(line) for line in fresh("\n".join(lines)).stdout.split()]


def imports() -> list[Import]:
    """Returns the modules that `import lora_jax` adds, slowest first; the best times of three processes."""
    code = f"{BASE}\nimport sys\nprint({MARK!r}, file=sys.stderr)\n{IMPORT}"
    best: dict[str, Import] = {}
    for _ in range(3):
        after = fresh(code, "-X", "importtime").stderr.split(MARK)[1]
        for line in after.splitlines():
            if line.startswith("import time:"):
                own, total, name = line.removeprefix("import time:").split("|")
                row = Import(name.strip(), int(own) / 1e3, int(total) / 1e3)
                best[row.module] = min(row, best.get(row.module, row), key=lambda row: row.own)
    return sorted(best.values(), key=lambda row: -row.own)


def main() -> int:
    """Measures and prints; returns 1 if the limit is exceeded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=9, help="processes for each measurement")
    given = parser.parse_args()
    milliseconds(BASE, IMPORT)  # writes the bytecode of modules that were never imported
    after, together, without = [], [], []
    for _ in range(given.processes):
        after.append(milliseconds(BASE, IMPORT)[1])
        together.append(milliseconds(f"{BASE}; {IMPORT}")[0])
        without.append(milliseconds(BASE)[0])
    cost = statistics.median(after)
    print(f"{BASE:42} {statistics.median(without):7.1f} ms")
    print(f"{BASE + ', lora_jax':42} {statistics.median(together):7.1f} ms")
    print(f"{IMPORT + ', after the others':42} {cost:7.1f} ms   (limit: {LIMIT} ms)")
    print(f"\nMedians of {given.processes} processes. The slowest modules, in ms (with their imports):")
    for row in imports()[:8]:
        print(f"  {row.module:40} {row.own:6.1f} ({row.total:.1f})")
    return int(cost > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
