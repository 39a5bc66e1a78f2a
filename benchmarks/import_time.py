"""The time of `import lora_jax` in addition to `import jax, flax`; fails above a limit.

Usage:
    python benchmarks/import_time.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import NamedTuple

import records
from against.figures import progress

BASE = "import jax, flax"
IMPORT = "import lora_jax"
LIMIT = 0.25  # of the time of BASE, because milliseconds depend on the machine
AFTER = f"{IMPORT}, after that"
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


def measure(processes: int) -> records.Table:
    """Returns the times of both imports alone, together, and of the second after the first, interleaved."""
    milliseconds(BASE, IMPORT)  # writes the bytecode of modules that were never imported
    seconds: dict[str, list[float]] = {name: [] for name in (BASE, f"{BASE}, lora_jax", AFTER)}
    for number in range(processes):
        progress(f"process {number + 1} of {processes}")
        for took, statements in zip(seconds.values(), ([BASE], [f"{BASE}; {IMPORT}"], [BASE, IMPORT]), strict=True):
            took.append(milliseconds(*statements)[-1] / 1e3)
    return records.Table("Import", {"time": "×ms"}, {name: {"time": took} for name, took in seconds.items()})


def main() -> int:
    """Measures and prints; returns 1 if the limit is exceeded."""
    parser = records.parser(__doc__)
    parser.add_argument("--processes", type=int, default=9, help="processes for each measurement")
    given = parser.parse_args()
    table = measure(given.processes)
    records.publish([table], given.json)
    base, cost = (1e3 * statistics.median(table.rows[name]["time"]) for name in (BASE, AFTER))
    print(f"\n{AFTER}: {cost:.1f} ms (limit: {LIMIT * base:.1f} ms). The slowest modules, in ms (with their imports):")
    for row in imports()[:8]:
        print(f"  {row.module:40} {row.own:6.1f} ({row.total:.1f})")
    return int(cost > LIMIT * base)


if __name__ == "__main__":
    sys.exit(main())
