"""What `import lora_jax` costs over `import jax, flax`; fails if it is more than the limit.

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
MARK = "lora_jax starts here"


class Import(NamedTuple):
    """A line of `python -X importtime`: milliseconds in a module itself, and with what it loads."""

    module: str
    own: float
    total: float


def fresh(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter."""
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True)


def milliseconds(*statements: str) -> list[float]:
    """The time of each statement, one after the other in one new process."""
    lines = ["import time", "clock = time.perf_counter"]
    for statement in statements:
        lines += ["start = clock()", statement, "print(1e3 * (clock() - start))"]
    return [float(line) for line in fresh("\n".join(lines)).stdout.split()]


def imports() -> list[Import]:
    """What `import lora_jax` loads that `import jax, flax` has not, the slowest first; the best of three processes."""
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
    """Measures, prints; returns 1 if the limit is passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=9, help="new processes for each of the two measurements")
    given = parser.parse_args()
    milliseconds(BASE, IMPORT)  # writes the bytecode of what was never imported
    after, alone, without = [], [], []
    for _ in range(given.processes):
        after.append(milliseconds(BASE, IMPORT)[1])
        alone.append(milliseconds(f"{BASE}; {IMPORT}")[0])
        without.append(milliseconds(BASE)[0])
    cost = statistics.median(after)
    print(f"{BASE:42} {statistics.median(without):7.1f} ms")
    print(f"{BASE + ', lora_jax':42} {statistics.median(alone):7.1f} ms")
    print(f"{IMPORT + ', after the others':42} {cost:7.1f} ms   of at most {LIMIT} ms")
    print(f"\nMedians of {given.processes} processes. The slowest of what it loads, in ms (with what they load):")
    for row in imports()[:8]:
        print(f"  {row.module:40} {row.own:6.1f} ({row.total:.1f})")
    return int(cost > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
