"""The benchmarks store tables, and the page is what they render to."""

import json
import sys
from pathlib import Path

import page
import pytest
import records

TABLE = records.Table(
    "A step",
    {"FLOPs": "×G", "bytes": "MB", "step": "×ms"},
    {
        "by hand": {"FLOPs": 2_000_000_000, "bytes": 1_234_000, "step": [0.1, 0.2, 0.1, 0.1, 0.2]},
        "lora()": {"FLOPs": 1_500_000_000, "bytes": 123_400_000, "step": [0.2, 0.4, 0.2, 0.2, 0.2]},
        "Quax": {"step": "fails"},
    },
)


def test_the_page_is_what_the_stored_figures_render_to() -> None:
    rendered = page.render()
    for path, text in rendered.items():
        assert path.read_text() == text, f"{path.name}: python benchmarks/page.py writes it again"
    assert {path for path in page.FOLDER.glob("*.svg")} == {path for path in rendered if path.suffix == ".svg"}


def test_stored_figures_name_their_versions_and_no_path() -> None:
    stored = sorted(page.FOLDER.glob("*.json"))
    assert [path.stem for path in stored] == sorted(benchmark.name for benchmark in page.BENCHMARKS)
    for path in stored:
        record, tables = records.read(path)
        assert {"python", "jax", "jaxlib", "flax"} <= set(record["versions"]), path
        assert record["date"] and record["machine"].endswith("cores") and tables, path
        assert "/" not in record["command"].removeprefix("python benchmarks/"), path


def test_ratios_are_those_to_the_first_row_and_times_are_marked() -> None:
    assert TABLE.markdown().splitlines() == [
        "|         | FLOPs   | bytes   | *step*        |",
        "|---------|---------|---------|---------------|",
        "| by hand | 2.00 G  | 1.23 MB | 100 ms        |",
        "| lora()  | × 0.750 | 123 MB  | × 2.00 ± 0.25 |",
        "| Quax    |         |         | fails         |",
    ]


def test_ratios_across_are_those_to_the_first_column() -> None:
    rows = {"4 layers": {"by hand": [2.0], "lora()": [3.0]}, "8 layers": {"by hand": [4.0], "lora()": [4.0]}}
    table = records.Table("Compile", {"by hand": "×s", "lora()": "×s"}, rows, across=True)
    assert [table.cell("4 layers", "by hand"), table.cell("4 layers", "lora()")] == ["2.00 s", "× 1.500"]
    assert table.cell("8 layers", "lora()") == "× 1.000"


def test_tables_are_printed_and_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    path = tmp_path / "step.json"
    monkeypatch.setattr(sys, "argv", ["/a/step.py", "--json", str(path), "--torch", "/a/python", "--steps", "2"])
    records.publish([TABLE], path, torch="1.2.3")
    record, tables = records.read(path)
    assert tables == [TABLE] and str(TABLE) in capsys.readouterr().out
    assert record["command"] == "python benchmarks/step.py --torch PYTHON --steps 2"
    assert record["versions"]["torch"] == "1.2.3" and str(tmp_path) not in json.dumps(record)


def test_what_a_benchmark_lacks_is_said_and_its_figures_stay(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(page, "interpreter", lambda package: None)
    [merging] = [benchmark for benchmark in page.BENCHMARKS if benchmark.name == "merge_files"]
    assert page.measure(merging) == 0
    assert capsys.readouterr().out == "merge_files: not measured, .venv-oracle has no torch\n"


def test_marked_parts_of_other_pages_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    begin, end = records.marks("x.py")
    path.write_text(f"a\n{begin}\nold\n{end}\nb\n")
    records.fill(path, "x.py", "new")
    assert path.read_text() == f"a\n{begin}\n\nnew\n\n{end}\nb\n"


def test_columns_of_which_nothing_was_measured_are_left_out() -> None:
    table = records.Table("A step", {"FLOPs": "×G", "step": "×ms"}, {"by hand": {"FLOPs": 2_000_000_000, "step": []}})
    assert [*table.measured().columns] == ["FLOPs"] and table.cell("by hand", "step") == ""
