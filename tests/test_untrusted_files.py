"""Files that are damaged or made to do harm: each is a clear error, or loads as what it says."""

import collections
import random
import resource
import time
import tracemalloc
from pathlib import Path
from typing import Any

import mutated_files
import numpy as np
import pytest
from mutated_files import MAPPING, PARAMS

import lora_jax as lj
from lora_jax import peft

MEMORY = 2**24  # bytes that a load of a small file may take, as traced
RESIDENT = 2**28  # bytes by which the process may grow; JAX's caches do


def outcome(directory: Path) -> tuple[str, Any]:
    """Loads an adapter; returns the kind of its error, or "read" and what it means."""
    try:
        adapter = peft.load(directory, MAPPING, PARAMS)
    except lj.CheckpointError as error:
        text = str(error)
        assert str(directory) in text and len(text.splitlines()) > 1 and len(text) < 20_000, text
        start = text.split(";")[0].replace(str(directory), "")
        return start.split(", in ")[0].split(" in  to fit")[0], None
    return "read", mutated_files.meaning(adapter)


def is_same(got: Any, expected: Any, tolerance: float) -> bool:
    """Whether two adapters mean the same; a value that is the base's need not be there."""
    for path in got.keys() | expected.keys():
        one, other = dict(got.get(path, {})), dict(expected.get(path, {}))
        zero = {"value": np.asarray(PARAMS[path]), "bias": np.zeros(1)}
        for name in one.keys() | other.keys():
            first, second = (entry.get(name, zero.get(name)) for entry in (one, other))
            if name == "rows" and first is not None and second is not None:
                if list(first) != list(second):
                    return False
                first, second = (np.array(list(rows.values())) for rows in (first, second))
            if name == "variant" or first is None or second is None:
                if first is not second and first != second:
                    return False
            elif not np.allclose(first, second, rtol=0, atol=tolerance * max(1e-30, np.abs(second).max())):
                return False
    return True


def snapshot(directory: Path) -> Any:
    """Everything below a directory, without following links."""
    return sorted(
        (str(path), path.lstat().st_size, path.lstat().st_mtime_ns, path.lstat().st_mode)
        for path in directory.rglob("*")
    )


def resident() -> int:
    """The largest resident set of this process up to now, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check(count: int, seed: int, tmp_path: Path, *, trace: bool) -> None:
    """Loads damaged adapters; prints how many had which outcome. Tracing allocations takes as long as loading."""
    bases = {name: mutated_files.stored(*parts) for name, parts in mutated_files.adapters().items()}
    directory = tmp_path / "outside" / "adapter"
    directory.mkdir(parents=True)
    (directory.parent / "victim").write_text("as it was")
    whole = {}
    for name, file in bases.items():
        text = mutated_files.joined(file.header)
        tensors = len(text).to_bytes(8, "little") + text + file.data
        mutated_files.write(mutated_files.Case("", name, mutated_files.joined(file.config), tensors, None), directory)
        kind, whole[name] = outcome(directory)
        assert kind == "read" and is_same(whole[name], mutated_files.expected(directory), 1e-2), name

    rng = random.Random(seed)
    counts: collections.Counter[str] = collections.Counter()
    slowest, largest, at_first = 0.0, 0, resident()
    if trace:
        tracemalloc.start()
    try:
        for _ in range(count):
            case = mutated_files.case(rng, bases)
            mutated_files.write(case, directory)
            before = snapshot(directory.parent)
            start, used = time.process_time(), tracemalloc.get_traced_memory()[0]
            if trace:
                tracemalloc.reset_peak()
            kind, got = outcome(directory)
            slowest = max(slowest, time.process_time() - start)
            largest = max(largest, tracemalloc.get_traced_memory()[1] - used)
            assert snapshot(directory.parent) == before, case
            if got is not None:
                tolerance = 2e-2 if b'16"' in case.tensors else 1e-5
                assert is_same(got, mutated_files.expected(directory), tolerance), (case.name, case.base)
                kind = "read, as before" if is_same(got, whole[case.base], tolerance) else "read, as the file now says"
            counts[kind] += 1
    finally:
        tracemalloc.stop()
    grown = resident() - at_first
    assert largest < MEMORY and grown < RESIDENT
    print(f"\n{count} damaged adapters; at most {slowest:.2f} s of the processor for one")
    print(f"largest allocation {largest / 2**20:.1f} MiB, " * trace + f"resident set grown by {grown / 2**20:.0f} MiB")
    for kind, number in counts.most_common():
        print(f"{number:>7} {kind}")


def test_damaged_adapters_are_refused_or_load_as_what_they_say(tmp_path: Path) -> None:
    check(150, 0, tmp_path, trace=True)


@pytest.mark.sweep
def test_ten_thousand_damaged_adapters_are_refused_or_load_as_what_they_say(tmp_path: Path) -> None:
    check(10_000, 1, tmp_path, trace=False)
