"""The benchmarks of many adapters, and the example of a sweep, run at a tiny size."""

import json
import re
import sys
from pathlib import Path

import many_lookups as lookups
import many_serving as serving
import numpy as np
import pytest

import sweep
from benchmarks import many

pytestmark = pytest.mark.sweep


def test_the_tables_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    many.main(["training", "--short", "--steps", "2"])
    out = capsys.readouterr().out
    assert re.search(r"^\| 2 adapters \| \S+ G +\| × (1\.000|0\.99\d) ", out, re.MULTILINE), out
    assert len(re.findall(r"^\| (?:4|16) sequences +\| \S+ ms +\| × .*\|$", out, re.MULTILINE)) == 2, out


def test_the_three_ways_to_reach_factors_have_one_result(capsys: pytest.CaptureFixture[str]) -> None:
    many.main(["lookups", "--short", "--steps", "1"])  # compares the results
    out = capsys.readouterr().out
    assert all(f"| {name}: accessed |" in out and f"| *{name}* " in out for name in ("gathered", "sorted", "all")), out


def test_flops_do_not_depend_on_the_number_of_loaded_adapters_except_where_all_are_multiplied() -> None:
    few, many_ = (lookups.measure(size, rounds=0) for size in lookups.TINY)
    for column, tolerance in (("FLOPs", 0), ("FLOPs of the compiler", 0.02)):  # which counts the arithmetic of indices
        assert few["gathered"][column] == pytest.approx(many_["gathered"][column], rel=tolerance)
        assert few["all"][column] < many_["all"][column]
    assert few["sorted"]["FLOPs"] == many_["sorted"]["FLOPs"]
    assert few["sorted"][column] < many_["sorted"][column]  # XLA multiplies with all groups


def test_mixed_batches_decode_as_each_adapter_by_itself_and_as_by_hand() -> None:
    load = serving.TINY
    found = dict(serving.methods(load, (1, 2)))
    ids = np.arange(load.rows * 3).reshape(load.rows, 3).astype(np.int32)
    results = {
        name: serving.Session(name, method, load)
        .jitted(method.held, ids, serving.smollm2.empty_cache(load.sizes, load.rows, 8))[1]
        .values
        for name, method in found.items()
    }
    same = ["merged", "one adapter for all rows", "mixed, 1 adapter", "mixed, 1 adapter, selected before"]
    for name in same:
        np.testing.assert_allclose(results[name], results["by hand, 1 adapter"], atol=1e-4)
    mixed = results["mixed, 2 adapters"]
    np.testing.assert_allclose(mixed, results["by hand, 2 adapters"], atol=1e-4)
    np.testing.assert_allclose(mixed, results["mixed, 2 adapters, selected before"], atol=1e-4)
    assert np.abs(mixed[:, 1] - results["merged"][:, 1]).max() > 1e-3


def test_the_table_of_serving_says_what_is_not_installed(capsys: pytest.CaptureFixture[str]) -> None:
    many.main(["serving", "--short", "--steps", "1", "--torch", "/no/such/python"])
    out = capsys.readouterr().out
    assert re.search(r"^\| base +\| \S+ ms +\|", out, re.MULTILINE), out
    assert re.search(r"^\| PEFT.* not installed: ", out, re.MULTILINE), out
    assert serving.why_no_torch(sys.executable).startswith("not installed: ModuleNotFoundError")


def test_the_example_sweeps_all_cells(tmp_path: Path) -> None:
    sweep.run(tmp_path, sweep.SHORT)
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert list(found["accuracy"]) == [sweep.name_of(*cell) for cell in sweep.SHORT.cells]
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    assert (tmp_path / "best" / "0").exists()
