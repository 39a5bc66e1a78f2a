"""The benchmark of scale measures memory and communication, finds regressions, and writes its page."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import records
import scale
import scale_qlora
import scale_report
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from scale import llama

from lora_jax._compat import compiler_options

pytestmark = pytest.mark.sweep

TINY = llama.Llama(layers=3, width=48, heads=8, hidden=80, kv_heads=4, vocabulary=160)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))


@pytest.fixture(scope="module")
def row(mesh):
    return {"model": "70B", **scale.measure(TINY, mesh, rank=4, length=16)}


def test_a_row_is_written_into_the_page(row, tmp_path, monkeypatch, capsys):
    page, picture, figures = tmp_path / "scale.md", tmp_path / "scale.png", tmp_path / "figures.json"
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*records.marks("scale.py")))
    growth = {what: [row, {**row, what: 2 * row[what]}] for what in scale.SWEEPS}
    found = {"versions": {"jax": "1.2.3"}, "rows": [row], "growth": growth}
    figures.write_text(json.dumps(found))
    monkeypatch.setattr(scale, "PAGE", page)
    monkeypatch.setattr(scale, "PICTURE", picture)
    monkeypatch.setattr("sys.argv", ["scale.py", "--read", str(figures), "--write-docs"])
    scale.main()
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    for part in ("jax 1.2.3 for cpu", "| 70B   | 8 (2 × 4) |", "| rank ", "| 4 ", "| 8 "):
        assert part in text
    assert "| 70B   | 8 (2 × 4) |" in capsys.readouterr().out


def test_ratios_match_the_measurements(row):
    [_, cells] = scale_report.memory([row])
    assert cells[-1] == f"{row['lora']['peak'] / row['full']['peak']:.2f}"
    assert row["lora"]["peak"] < row["full"]["peak"]
    assert row["resident"] > 1e8


def compiled(mesh, stack_at, *, dtype=None):
    """A step that loops over a stack of kernels after resharding and casting it."""
    leaf = TINY.shapes(mesh)["blocks"]["up"]

    def loop(stack, x):
        stack = lax.with_sharding_constraint(stack, NamedSharding(mesh, stack_at))
        layers = stack if dtype is None else stack.astype(dtype)
        return lax.scan(lambda x, w: (((x @ w) @ w.T).astype(x.dtype), None), x, layers)[0]

    x = jax.ShapeDtypeStruct((8, TINY.width), leaf.dtype, sharding=NamedSharding(mesh, P()))
    return types.SimpleNamespace(compiled=jax.jit(loop).lower(leaf, x).compile(compiler_options("cpu")))


def test_a_gather_of_all_layers_is_found(mesh):
    scale.check(TINY, mesh, compiled(mesh, P(None, "data", "model")))
    with pytest.raises(AssertionError, match="all layers are gathered at once"):
        scale.check(TINY, mesh, compiled(mesh, P(None, None, "model")))


def test_a_copy_of_the_base_in_float32_is_found(mesh):
    with pytest.raises(AssertionError, match="the base is copied in float32"):
        scale.check(TINY, mesh, compiled(mesh, P(None, "data", "model"), dtype=jnp.float32))


@pytest.mark.parametrize("on_host", [False, True])
def test_a_row_of_qlora_says_where_the_bytes_are(on_host, tmp_path, monkeypatch, capsys):
    model = llama.Llama(layers=2, width=64, heads=4, hidden=128, kv_heads=4, vocabulary=160)
    mesh = scale_qlora.mesh_of(None)
    row = scale_qlora.measure(mesh, model=model, rank=4, length=16, base_on_host=on_host, optimizer_on_host=on_host)
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    rest = 2 * (2 * 160 * 64 + 5 * 64)  # embedding, head and norms in bfloat16
    kernels = row["parameters"] - rest
    assert 4.125 <= 8 * kernels / weights < 4.3  # few scales share the second-level scales of a small kernel
    assert row["parameters on host"] == (kernels if on_host else 0)
    assert row["host"] == (kernels + row["optimizer"] - 4 if on_host else 0)
    held = rest + row["adapter"] + (4 if on_host else kernels + row["optimizer"]) + row["temporary"]
    assert 0 <= row["peak"] - held < 1000  # the tokens, the loss, and the addresses of the results

    page, rows = tmp_path / "scale.md", tmp_path / "rows.json"
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*records.marks("scale_qlora.py")))
    rows.write_text(json.dumps([row]))
    monkeypatch.setattr(scale_qlora, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["scale_qlora.py", "--only", "--write-docs", str(rows)])
    scale_qlora.main()
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert ("base and optimizer" if on_host else "nothing") in text
    assert "NF4, double" in capsys.readouterr().out
