"""The comparison with other libraries runs, and reports a library that computes another function."""

import dataclasses
import json
import re

import peers
import pytest
import records
from against import BY_HAND, FULL, MERGED, capabilities, lora_jax, values
from against.by_hand import METHODS, merged
from against.cases import ONE_LAYER, decoder
from against.measure import measure

OWN = "lora_jax"


@pytest.fixture(scope="module")
def results():
    """The results that need no other library, at a tiny size."""
    builds = {name: METHODS[name] for name in (BY_HAND, MERGED, FULL)} | {OWN: lora_jax.build, "Quax": refusing}
    rows = measure(decoder(ONE_LAYER), builds, rounds=1, steps=2)
    plain = {name: row if isinstance(row, str) else dataclasses.asdict(row) for name, row in rows.items()}
    supported = {OWN: {"convolution": capabilities.support(lora_jax.build, "convolution")}}
    found = {"versions": {"jax": "1.2.3"}, "cases": {"unrolled layers": plain}, "capabilities": supported}
    return {"command": "the command", "machine": "the machine", "size": "tiny", "environments": {"jax": found}}


def refusing(case):
    raise ValueError(f"no rank of {case.rank}\nand a long explanation")


@pytest.mark.sweep
def test_results_match_the_methods(results):
    rows = results["environments"]["jax"]["cases"]["unrolled layers"]
    assert rows[OWN]["flops"] <= rows[BY_HAND]["flops"]
    assert rows[BY_HAND]["flops"] < rows[MERGED]["flops"] < rows[FULL]["flops"]
    assert rows[OWN]["optimizer"] < rows[FULL]["optimizer"]
    assert all(len(row["steps"]) == 2 and row["temporary"] > 0 for name, row in rows.items() if name != "Quax")
    assert rows["Quax"] == "ValueError: no rank of 4"


def test_a_stack_of_layers_equals_its_layers():
    stack = values.values("blocks/norm_1/scale", (2, 3))
    assert (stack[1] == values.values("block_1/norm_1/scale", (3,))).all() and (stack[0] != stack[1]).any()


def test_a_library_that_trains_another_function_is_reported():
    def half_the_scale(case):
        return merged(case._replace(rank=2 * case.rank))

    assert capabilities.support(lora_jax.build, "convolution") == capabilities.YES
    assert capabilities.support(half_the_scale, "convolution") == "runs, but computes another function"
    assert capabilities.support(refusing, "convolution") == "ValueError: no rank of 2"


@pytest.mark.sweep
def test_the_page_is_written_between_the_marks(results, tmp_path, monkeypatch, capsys):
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*records.marks("peers.py")))
    figures.write_text(json.dumps(results))
    monkeypatch.setattr(peers, "PAGE", page)
    monkeypatch.setattr(peers, "PICTURE", tmp_path / "peers.png")
    monkeypatch.setattr("sys.argv", ["peers.py", "--read", str(figures), "--write-docs"])
    assert peers.main() == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert re.search(r"^\| lora_jax +\| × \d", text, re.MULTILINE)
    assert "- Quax: ValueError: no rank of 4" in text
    assert (tmp_path / "peers.png").stat().st_size > 0
    assert "lora_jax" in capsys.readouterr().out
