"""Notebooks: results as tables in HTML and text, adapters and quantized leaves in Treescope, the notebook itself."""

import json
import pathlib
import re
import runpy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
import treescope
from IPython.core.formatters import DisplayFormatter

import lora_jax as lj
from lora_jax import quant
from lora_jax._core import display

ROOT = pathlib.Path(__file__).parents[1]
PARAMS = {"layers": jnp.ones((3, 8, 4)), "<b>": jnp.ones(4)}
LORA = lj.LoRA(rank=2, alpha=4)
A = np.ones((3, 8, 2), np.float32) * np.array([1, 2, 3], np.float32)[:, None, None]
PART = lj.Adapter(LORA, "bio", a=A, b=np.zeros((3, 2, 4), np.float32))
ADAPTER = {"layers": PART, "<b>": lj.Adapter(lj.Full(), "", value=jnp.array([0.0, 3.0, 4.0, jnp.nan]))}
COMMENT = "batch 3 × in 8 × rank 2 · norm 15 · by batch 4 ▁▅█ 12"


def tree_text(tree: Any) -> str:
    return treescope.render_to_text(tree, ignore_exceptions=False)


def part(array: Any, *, axes: str = "bio") -> lj.Adapter:
    return lj.Adapter(LORA, axes, a=array)


def comment(array: Any, *, axes: str = "bio") -> str:
    """What is said about an array, and that Treescope and IPython show it."""
    adapted = part(array, axes=axes)
    found = display.described(LORA, axes, adapted.arrays)["a"].line
    assert found in tree_text({"path": adapted, "other": {"nested": (adapted, [1, 2])}})
    bundle = adapted._repr_mimebundle_()
    assert found.split(" · ")[0] in bundle["text/html"] and bundle["text/plain"] == repr(adapted)
    return found


# Tables


def test_a_report_is_a_dict_and_a_table() -> None:
    half = {"layers": PARAMS["layers"].astype(jnp.bfloat16)}
    adapter = {"layers": lj.Adapter(LORA, "bio", a=np.full((3, 8, 2), 2.0**-11), b=np.ones((3, 2, 4)))}
    report = lj.merge_report(half, adapter, lj.merge(half, adapter))
    assert report == {"layers": report["layers"]} and isinstance(report, dict)
    text = "path    max error  mean error     lost\n──────  ─────────  ──────────  ───────\n"
    text += "layers    0.00195     0.00195  100.00%"
    assert str(report) == text
    assert "<tr><td>layers</td><td>0.00195</td><td>0.00195</td><td>100.00%</td></tr>" in plain(report._repr_html_())
    shown, _ = DisplayFormatter().format(report)
    assert shown == {"text/plain": text, "text/html": report._repr_html_()}
    assert console_text(report) == text


def test_a_report_is_a_pytree_as_a_dict_is() -> None:
    found = lj.kernels(lambda p, x: x @ p["layers"][0] + p["<b>"], PARAMS, jnp.ones((2, 8)))
    paths = [jax.tree_util.keystr(keys) for keys, _ in jax.tree.leaves_with_path(found)]
    assert paths == [jax.tree_util.keystr(keys) for keys, _ in jax.tree.leaves_with_path(dict(found))]
    axes = jax.tree.map(lambda kernel: kernel.axes or "none", found)
    assert type(axes) is type(found) and axes == {"<b>": "none", "layers": "bio"}
    assert str(axes) == "path    value\n──────  ─────\n<b>     none\nlayers  bio"
    assert jax.jit(lambda report: report)(jax.tree.map(lambda kernel: 1, found)) == {"<b>": 1, "layers": 1}


def test_kernels_and_requantize_return_tables() -> None:
    found = lj.kernels(lambda p, x: x @ p["layers"][0] + p["<b>"], PARAMS, jnp.ones((2, 8)))
    rows = [line.split("  ") for line in re.sub(" {2,}", "  ", str(found)).split("\n")]
    assert rows[0] == ["path", "shape", "dtype", "axes", "kind", "used"]
    assert rows[2:] == [
        ["<b>", "4", "float32", "-", "bias", "add ×1"],
        ["layers", "3×8×4", "float32", "bio", "head", "dot_general ×1"],
    ]
    assert "<td>&lt;b&gt;</td><td>4</td><td>float32</td>" in plain(found._repr_html_())
    base = quant.quantize({"w": jnp.eye(64)}, {"w": quant.NF4()})
    _, report = quant.requantize(base, {"w": 2 * jnp.eye(64)})
    assert [line.split() for line in str(report).split("\n")][::2] == [
        ["path", "survived", "error"],
        ["w", "100.00%", "0"],
    ]
    assert str(type(report)()).split() == ["path", "────"]


def test_the_tables_of_explain_and_plan_are_shown_in_a_terminal_and_by_rich() -> None:
    apply, adapter = lambda p, x: x @ p["layers"][0], {"layers": PART}
    explained = lj.explain(apply, PARAMS, adapter, jnp.ones((2, 8)))
    assert DisplayFormatter().format(explained)[0] == {
        "text/plain": str(explained),
        "text/html": explained._repr_html_(),
    }
    assert console_text(explained) == str(explained)
    assert "<script" not in explained._repr_html_() and "color" not in explained._repr_html_()


def test_stacks_trees_and_pools_are_shown_as_tables_of_their_adapters() -> None:
    stacked = lj.many.stack({"one": {"layers": PART, "<b>": ADAPTER["<b>"]}, "two": {}}, rank=3)
    small = lj.Adapter(lj.RSLoRA(rank=1, alpha=1), "bio", a=A[..., :1], b=np.zeros((3, 1, 4), np.float32))
    part = {"layers": small}
    stacked = lj.many.swap(stacked, "two", part)
    lines = str(stacked).split("\n")
    assert [re.split(" {2,}", line.rstrip()) for line in lines] == [
        ["adapter", "leaves", "variants", "memory"],
        ["───────", "──────", "─────────────────────────────", "──────"],
        ["one", "2", "Full(), LoRA(rank=2, alpha=4)", "304 B"],
        ["two", "1", "RSLoRA(rank=1, alpha=1)", "144 B"],
        [""],
        ["2 leaves, padded to the largest ranks: 896 B"],
    ]
    tree = lj.many.tree({"chat": ("base", part), "polite": ("chat", part), "code": ("base", part)})
    names = [line.split("  ")[0].rstrip() for line in str(tree).split("\n")]
    assert names == ["adapter", "─" * 10, "base", "├ chat", "│ └ polite", "└ code"]
    with lj.many.Pool(lambda name: part, capacity=1) as pool:
        pool.get("<fr>")
        assert "<td>&lt;fr&gt;</td><td>in memory</td><td>1</td>" in plain(pool._repr_html_())
        assert str(pool).endswith("1 of at most 1 in memory, the least recently used first; "
                                  "hits 0, misses 1, evictions 0, failures 0")  # fmt: skip
        for value in (stacked, tree, pool):
            assert DisplayFormatter().format(value)[0]["text/html"] == value._repr_html_()
            assert console_text(value) == str(value)


def test_a_stack_without_values_is_shown_by_its_names() -> None:
    stacked = lj.many.stack({"one": ADAPTER, "two": {}})
    names = "adapter\n───────\none\ntwo\n\nWithout values, the ranks are not known."
    assert str(jax.eval_shape(lambda: stacked)) == names
    seen: list[str] = []
    jax.eval_shape(lambda stacked: (seen.append(str(stacked)), 0)[1], stacked)
    assert seen == [names]
    stacked.members.settings["layers"].rank.delete()
    assert str(stacked) == names


def plain(html: str) -> str:
    return re.sub(r' style="[^"]*"', "", html)


def console_text(value: Any) -> str:
    console = rich.console.Console(width=300)
    with console.capture() as capture:
        console.print(value)
    return capture.get().rstrip("\n")


# Treescope


def test_treescope_shows_an_adapter_with_axes_norms_and_sparklines() -> None:
    text = tree_text(ADAPTER)
    assert "'layers': Adapter(LoRA(rank=2, alpha=4), 'bio'," in text
    assert f"  # {COMMENT}\n" in text
    assert "  # batch 3 × rank 2 × out 4 · norm 0 · by batch 0 ▁▁▁ 0\n" in text
    assert "'<b>': Adapter(Full(), '',\n" in text and ",  # 4 · norm nan\n" in text
    assert ">by batch 4 ▁▅█ 12</td>" in PART._repr_mimebundle_()["text/html"]
    assert "▁▅█" in treescope.render_to_html(ADAPTER, compressed=False)


def test_treescope_shows_each_kind_of_leaf_without_values() -> None:
    shape = jax.ShapeDtypeStruct((3, 8, 2), jnp.bfloat16)
    assert comment(shape) == "batch 3 × in 8 × rank 2"
    assert comment(jnp.ones((3, 8, 2), jnp.int32)) == "batch 3 × in 8 × rank 2"
    assert comment(jax.random.split(jax.random.key(0), (3, 8, 2))) == "batch 3 × in 8 × rank 2"
    for other in (
        None,
        jax.P("data"),
        True,
        1.0,
        jax.devices()[0],
        "text",
        jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    ):
        assert comment(other) == ""
    deleted = jnp.ones((3, 8, 2))
    deleted.delete()
    assert comment(deleted) == "batch 3 × in 8 × rank 2"
    seen: list[str] = []
    jax.eval_shape(jax.vmap(jax.grad(lambda a: (seen.append(comment(a)), jnp.sum(a))[1])), jnp.asarray(A))
    assert seen == ["in 8 × rank 2"]  # a layer
    values = jnp.asarray(A)
    jax.eval_shape(lambda x: (seen.append(comment(values)), x)[1], 1.0)  # while another array is traced
    assert seen[1] == COMMENT


def test_treescope_shows_each_kind_of_array() -> None:
    assert comment(A) == comment(jnp.asarray(A)) == comment(jnp.asarray(A, jnp.bfloat16)) == COMMENT
    assert comment(A[0], axes="io") == "in 8 × rank 2 · norm 4 · by rank 2.83 ▁▁ 2.83"
    assert comment(A[None]) == "1 × batch 3 × in 8 × rank 2 · norm 15 · by first axis 15 ▁ 15"
    assert comment(np.ones((0, 8, 2), np.float32)) == "batch 0 × in 8 × rank 2 · norm 0"
    assert (
        comment(np.array([[np.inf, 1], [2, 3]], np.float32), axes="io")
        == "in 2 × rank 2 · norm inf · by rank 3.16 ×▁ 3.16"
    )
    assert (
        comment(np.full((1, 2), 3e30, np.float32), axes="io")
        == "in 1 × rank 2 · norm 4.24e+30 · by rank 3e+30 ▁▁ 3e+30"
    )
    assert comment(np.broadcast_to(np.float32(1), (2**23, 4)), axes="io") == "in 8388608 × rank 4"  # too many elements


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_norms_of_a_sharded_array_are_computed_on_its_devices(kind: Any) -> None:
    mesh = jax.make_mesh((2,), ("data",), (kind,), devices=jax.devices()[:2])
    sharded = jax.device_put(A, jax.NamedSharding(mesh, jax.P(None, "data")))
    with jax.debug_nans(True):
        assert comment(sharded) == COMMENT
        assert "norm nan · by batch 8 ×▁█ 12" in comment(
            jax.device_put(np.where(A == 1, np.float32(np.nan), A), sharded.sharding)
        )
    program = display._squares_on_device.lower(sharded, 0).compile().as_text()
    assert "all-reduce" in program and "all-gather" not in program


def test_norms_in_host_memory_are_computed_unless_the_array_is_sharded() -> None:
    host = jax.device_put(A, jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"))
    assert comment(host) == COMMENT
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    place = jax.NamedSharding(mesh, jax.P(None, "data"), memory_kind="pinned_host")
    assert comment(jax.device_put(A, place)) == "batch 3 × in 8 × rank 2"


def test_treescope_shows_quantized_leaves_and_stacks() -> None:
    base = quant.quantize({"w": jnp.ones((64, 64)), "v": jnp.ones((64, 4))}, {"w": quant.NF4(), "v": quant.Int8()})
    for tree in (base, jax.eval_shape(lambda: base)):
        text = tree_text(tree)
        assert "'w': NF4Leaf(float32[64, 64] in NF4(axes='io'), 4.14 bits per element,\n" in text
        assert "'v': ScaledLeaf(float32[64, 4] in Int8(axes='io'), 8.5 bits per element,\n" in text
    jax.eval_shape(lambda tree: (tree_text(tree), 0)[1], base)
    assert "NF4Leaf(float32,\n" in tree_text(
        quant.shardings(base, jax.tree.map(lambda _: jax.devices()[0], {"w": 0, "v": 0}))
    )
    stacked = lj.many.stack({"one": {"layers": PART}, "two": {}})
    text = tree_text(stacked)
    assert text.startswith("Stack(2 adapters, 1 leaves,\n") and "by first axis 0 █▁ 15" in text


def test_treescope_shows_the_state_of_an_optimizer() -> None:
    state = optax.adam(1e-3).init({"layers": PART})
    assert tree_text(state).count("batch 3 × in 8 × rank 2 · norm 0") == 2


def test_a_sparkline_has_at_most_24_bars() -> None:
    assert display.sparkline(np.arange(240.0)) == "4.5 ▁▁▂▂▂▃▃▃▃▄▄▄▅▅▅▆▆▆▆▇▇▇██ 234"


# The notebook

NOTEBOOK = ROOT / "examples" / "notebook.ipynb"


def test_the_stored_notebook_has_small_outputs_without_scripts() -> None:
    text = NOTEBOOK.read_text()
    cells = json.loads(text)["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert len(text) < 300_000 and "<script" not in text and "/tmp/" not in text
    tables = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", ())]
    assert len(tables) == 5  # kernels, explain, plan, an Adapter, merge_report
    assert len(bars(outputs)) == 2
    assert [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"] == list(range(1, 12))


def bars(outputs: list[Any]) -> list[str]:
    texts = [output.get("data", {}).get("text/plain", "") for output in outputs]
    return [text for text in map("".join, texts) if "█| 300/300" in text]


@pytest.mark.sweep
def test_the_notebook_runs() -> None:
    names = runpy.run_path(str(ROOT / "docs" / "make_notebook.py"))
    notebook = names["stored"](names["run"]())
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    before, after = re.findall(r"accuracy on turned images: base (\S+)%, merged (\S+)%", text)[0]
    assert float(before) < 30 and float(after) > 85
    assert len(bars(outputs)) == 2 and "by batch" in text
