"""`peft.guess`: what it proposes, and what it does not claim to know. `oracle/test_peft_guess.py` has real models."""

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lj
from lora_jax import peft
from lora_jax._core.uses import Kernel
from lora_jax.peft import Guess, Part, Row, _sites
from lora_jax.peft._guess import values

L, D, H, HD, F, V = 2, 8, 2, 4, 12, 10
LEAVES_OF_DENSE = {"kernel": (D, F), "bias": (F,)}
Shapes = dict[str, tuple[int, ...]]


def tree(shapes: Shapes) -> dict[str, np.ndarray]:
    return {path: random(*shape, seed=at) for at, (path, shape) in enumerate(shapes.items())}


def random(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def traced(axes: dict[str, str | None], shapes: Shapes) -> dict[str, Kernel]:
    return {path: Kernel(shapes[path], jnp.float32, axes[path], ()) for path in axes}


def row_of(guess: Guess, path: str) -> tuple[Row, str, str]:
    (found,) = [row for row in guess.rows if path in row.paths.values()]
    return found.row, found.confidence, "; ".join(found.reasons)


def modules(row: Row) -> list[str]:
    return [part.module for part in row.parts]


def module_of(path: str, mapping: dict[str, Row]) -> str:
    """Returns the module of a leaf of shape (D, F), as `export` resolves it."""
    found = _sites.find(path, _sites.compiled(mapping))
    assert found is not None
    (site,) = _sites.sites(path, (D, F), found)
    assert not isinstance(site, str)
    return site.module


def layers(**modules: tuple[int, ...]) -> Shapes:
    return {f"model.layers.{i}.{name}.weight": shape for i in range(L) for name, shape in modules.items()}


def test_a_stack_and_numbered_layers_are_paired_with_numbered_modules() -> None:
    torch = layers(up=(F, D), down=(D, F)) | {"model.norm.weight": (D,)}
    stacked = peft.guess(
        tree({"layers/up/kernel": (L, D, F), "layers/down/kernel": (L, F, D), "norm/scale": (D,)}), torch
    )
    numbered = {
        f"layer_{i}/{name}/kernel": shape for i in range(L) for name, shape in {"up": (D, F), "down": (F, D)}.items()
    }
    unrolled = peft.guess(tree(numbered | {"norm/scale": (D,)}), torch)
    norm = {"norm/scale": peft.vector("model.norm", parameter="weight")}
    rows = {name: peft.linear(f"model.layers.{{i}}.{name}") for name in ("up", "down")}
    assert stacked.mapping == {f"layers/{name}/kernel": row for name, row in rows.items()} | norm
    assert unrolled.mapping == {f"layer_{{i}}/{name}/kernel": row for name, row in rows.items()} | norm
    assert not stacked.leaves and not stacked.tensors and not stacked.unsure


@pytest.mark.parametrize("with_values", [True, False])
def test_a_numbered_pattern_does_not_take_a_leaf_beside_its_leaves(with_values: bool) -> None:
    params = tree(dict.fromkeys(("fc0/kernel", "fc1/kernel", "fc_out/kernel"), (D, F)))
    torch = {"fc.0.weight": "fc0/kernel", "fc.1.weight": "fc1/kernel", "fc_out.weight": "fc_out/kernel"}
    tensors = {name: params[path].T if with_values else (F, D) for name, path in torch.items()}
    mapping = peft.guess(params, tensors).mapping
    assert {name: module_of(path, mapping) for name, path in torch.items()} == {
        name: name.removesuffix(".weight") for name in torch
    }
    del tensors["fc_out.weight"]
    mapping = peft.guess(params, tensors).mapping
    assert module_of("fc1/kernel", mapping) == "fc.1" and _sites.find("fc_out/kernel", _sites.compiled(mapping)) is None


@pytest.mark.parametrize("with_values", [True, False])
def test_numbers_of_leaves_with_zeros_in_front_are_those_of_modules(with_values: bool) -> None:
    params = tree({f"layer_{i:02d}/up/kernel": (D, F) for i in range(11)})
    names = {f"model.layers.{i}.up.weight": f"layer_{i:02d}/up/kernel" for i in range(11)}
    tensors = {name: params[path].T if with_values else (F, D) for name, path in names.items()}
    guess = peft.guess(params, tensors)
    assert [row.confidence for row in guess.rows] == ["sure"]
    assert all(f"{module_of(path, guess.mapping)}.weight" == name for name, path in names.items())
    if with_values:  # those of all layers are compared, also of the first
        name = "model.layers.3.up.weight"
        (row,) = peft.guess(params, tensors | {name: -tensors[name]}).rows
        assert row.confidence == "unsure" and "cosine -1.00" in row.reasons[-1]


def test_numbers_of_modules_with_zeros_in_front_stay() -> None:
    params = tree({f"layer_{i:02d}/up/kernel": (D, F) for i in range(3)})
    tensors = {f"layers.{i:02d}.up.weight": params[f"layer_{i:02d}/up/kernel"].T for i in range(3)}
    mapping = peft.guess(params, tensors).mapping
    assert [module_of(path, mapping) for path in params] == [name.removesuffix(".weight") for name in tensors]


@pytest.mark.parametrize("modules_of", ["net.0 net.2 net.4", "fc1 fc2 fc3", "net.1 net.2 net.3"])
def test_numbers_that_are_not_those_of_the_modules_are_unsure(modules_of: str) -> None:
    params = tree({f"Dense_{i}/{leaf}": shape for i in range(3) for leaf, shape in LEAVES_OF_DENSE.items()})
    names = dict(enumerate(modules_of.split()))
    tensors = {f"{name}.weight": params[f"Dense_{i}/kernel"].T for i, name in names.items()}
    tensors |= {f"{name}.bias": params[f"Dense_{i}/bias"] for i, name in names.items()}
    by_shape = peft.guess(params, {name: tensor.shape for name, tensor in tensors.items()})
    assert len(by_shape.unsure) == 6
    by_value = peft.guess(params, tensors)
    assert not by_value.unsure
    assert {path: module_of(path, by_value.mapping) for path in params if path.endswith("kernel")} == {
        f"Dense_{i}/kernel": name for i, name in names.items()
    }


def test_a_head_with_almost_the_values_of_a_table_is_not_tied() -> None:
    params = tree({"embed/embedding": (V, D)})
    table = params["embed/embedding"]
    tensors = {"model.embed.weight": table, "lm_head.weight": table + 0.004 * random(V, D, seed=9)}
    guess = peft.guess(params, tensors)
    assert row_of(guess, "embed/embedding")[0].head is None and list(guess.tensors) == ["lm_head.weight"]
    params = {"embed/embedding": jnp.asarray(table, jnp.bfloat16)}
    guess = peft.guess(params, tensors | {"lm_head.weight": table})
    assert row_of(guess, "embed/embedding")[:2] == (peft.embedding("model.embed", head="lm_head"), "sure")


@pytest.mark.parametrize("shape", [(D, 2, 3, HD), (D, 6, 3, HD), (D, 5, 3)])
def test_a_fused_kernel_whose_first_outputs_are_not_the_modules_is_unsure(shape: tuple[int, ...]) -> None:
    width = int(np.prod(shape[1:])) // 3
    torch = {f"attn.{name}_proj.weight": (width, D) for name in "qkv"}
    _, confidence, reasons = row_of(peft.guess(tree({"attn/qkv/kernel": shape}), torch), "attn/qkv/kernel")
    assert confidence == "unsure" and "state `outputs`" in reasons
    shape = (D, 3, *(size for size in shape[1:] if size != 3))
    assert row_of(peft.guess(tree({"attn/qkv/kernel": shape}), torch), "attn/qkv/kernel")[1] == "likely"


def test_a_layer_that_is_not_a_number_is_not_equal() -> None:
    params = tree({f"layer_{i}/up/kernel": (D, F) for i in range(3)})
    tensors = {f"layers.{i}.up.weight": params[f"layer_{i}/up/kernel"].T.copy() for i in range(3)}
    params["layer_1/up/kernel"][0, 0] = np.nan
    assert row_of(peft.guess(params, tensors), "layer_1/up/kernel")[1] == "unsure"


def test_of_two_tensors_with_almost_the_values_the_nearer_one_is_taken() -> None:
    params = tree({"encoder/fc/kernel": (D, F)})
    kernel = params["encoder/fc/kernel"]
    almost = kernel + 0.005 * random(D, F, seed=9)
    guess = peft.guess(params, {"encoder.fc.weight": almost.T, "momentum.fc.weight": kernel.T})
    row, confidence, reasons = row_of(guess, "encoder/fc/kernel")
    assert modules(row) == ["momentum.fc"] and confidence == "unsure" and "encoder.fc" in reasons


def test_a_stack_of_experts_in_numbered_layers() -> None:
    shapes = {f"layers/{i}/experts/up": (3, D, F) for i in range(L)}
    torch = {f"layers.{i}.experts.{j}.up.weight": (F, D) for i in range(L) for j in range(3)}
    mapping = peft.guess(tree(shapes), torch).mapping
    assert mapping == {"layers/{i}/experts/up": peft.linear("layers.{i}.experts.{j}.up")}


ATTENTION = {"layers/query/kernel": (L, D, H, HD), "layers/out/kernel": (L, H, HD, D)}


def test_the_axes_of_square_kernels_of_attention_are_those_of_the_trace_or_marked() -> None:
    torch = layers(q_proj=(D, D), o_proj=(D, D))
    guess = peft.guess(tree(ATTENTION), torch)
    for path, module, axes in [("query", "q_proj", "bioo"), ("out", "o_proj", "biio")]:
        row, confidence, reasons = row_of(guess, f"layers/{path}/kernel")
        assert (modules(row), row.axes, confidence) == ([f"model.layers.{{i}}.{module}"], axes, "likely")
        assert f"square: axes {axes!r} by its name" in reasons
    axes = {"layers/query/kernel": "boii", "layers/out/kernel": "booi"}  # as an unusual model would use them
    row, _, reasons = row_of(peft.guess(tree(ATTENTION), torch, kernels=traced(axes, ATTENTION)), "layers/query/kernel")
    assert row.axes == "boii" and "square" not in reasons


def test_the_orientation_of_a_square_matrix_is_never_silently_a_convention() -> None:
    shapes, torch = {"a/kernel": (D, D)}, {"a.weight": (D, D)}
    row, confidence, reasons = row_of(peft.guess(tree(shapes), torch), "a/kernel")
    assert row.axes is None and confidence == "likely"
    assert reasons == "the same name; square: axes 'io' by the convention, 'oi' fits as well"
    for axes, expected in [("io", None), ("oi", "oi")]:
        row, confidence, _ = row_of(
            peft.guess(tree(shapes), torch, kernels=traced({"a/kernel": axes}, shapes)), "a/kernel"
        )
        assert (row.axes, confidence) == (expected, "sure")
    params = tree(shapes)
    for array, axes in [(params["a/kernel"].T, None), (params["a/kernel"], "oi")]:
        row, confidence, _ = row_of(peft.guess(params, {"a.weight": array}), "a/kernel")
        assert (row.axes, confidence) == (axes, "sure")
    _, confidence, reasons = row_of(peft.guess(params, {"a.weight": random(D, D, seed=9)}), "a/kernel")
    assert confidence == "unsure" and "values differ, cosine" in reasons


def test_modules_of_one_shape_with_names_that_say_nothing_are_unsure() -> None:
    shapes = {"mixer/first/kernel": (D, F), "mixer/second/kernel": (D, F)}
    torch = {"block.alpha.weight": (F, D), "block.omega.weight": (F, D)}
    guess = peft.guess(tree(shapes), torch)
    assert [row.confidence for row in guess.rows] == ["unsure", "unsure"]
    assert guess.rows[0].reasons == ("its name is not much nearer than that of 'block.omega.weight'",)
    assert guess.unsure == guess.rows
    params = tree(shapes)
    arrays = {
        "block.alpha.weight": params["mixer/second/kernel"].T,
        "block.omega.weight": params["mixer/first/kernel"].T,
    }
    guess = peft.guess(params, arrays)
    assert [modules(row.row) for row in guess.rows] == [["block.omega"], ["block.alpha"]]
    assert [row.confidence for row in guess.rows] == ["sure", "sure"]


def test_values_show_the_rotary_order_and_a_factor() -> None:
    params = tree({"q/kernel": (D, H, HD), "k/kernel": (D, H, HD)})
    q, k = (params[f"{name}/kernel"].reshape(D, -1) for name in "qk")
    halves = [0, 2, 1, 3, 4, 6, 5, 7]
    torch = {"k_proj.weight": q.T[halves] / 0.5, "q_proj.weight": k.T[halves]}  # and the names are exchanged
    guess = peft.guess(params, torch)
    q_row, k_row = (row_of(guess, f"{name}/kernel") for name in "qk")
    assert q_row[0] == peft.linear(Part("k_proj", interleaved=HD, factor=0.5), axes="ioo") and q_row[1] == "sure"
    assert k_row[0] == peft.linear(Part("q_proj", interleaved=HD), axes="ioo") and k_row[1] == "sure"
    shapes = peft.guess(params, {"q_proj.weight": (D, D), "k_proj.weight": (D, D)})
    assert "values would show a rotary order" in row_of(shapes, "q/kernel")[2]


@pytest.mark.parametrize("most", [2**20, 20])
def test_of_large_leaves_some_of_the_inputs_are_compared(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_MOST", most)
    params = tree({"q": (L, H, D, HD), "out": (L, H, HD, D), "table": (V, D), "fc/w": (F, D)})
    torch = {"y.weight": params["table"], "x.weight": params["fc/w"].T, "x.bias": np.ones(F)}
    for i in range(L):
        torch[f"h.{i}.a.weight"] = params["q"][i].transpose(0, 2, 1).reshape(-1, D)
        torch[f"h.{i}.b.weight"] = params["out"][i].reshape(-1, D).T
    guess = peft.guess(params, torch)
    assert [row.confidence for row in guess.rows] == ["sure"] * 4, guess
    assert guess.mapping["q"] == peft.linear("h.{i}.a", axes="boio")
    assert guess.mapping["out"] == peft.linear("h.{i}.b", axes="biio")
    assert guess.mapping["fc/w"] == peft.linear("x", axes="oi", conv1d=True)
    torch["h.1.a.weight"] = torch["h.0.a.weight"]  # a second layer that differs
    assert row_of(peft.guess(params, torch), "q")[1] == "unsure"


def test_fused_kernels_are_divided_by_the_sizes_of_the_modules() -> None:
    torch = {"attn.q_proj.weight": (D, D), "attn.k_proj.weight": (4, D), "attn.v_proj.weight": (4, D)}
    torch |= {f"attn.{name}_proj.bias": (size,) for name, size in {"q": D, "k": 4, "v": 4}.items()}
    guess = peft.guess(tree({"attn/qkv/kernel": (D, 16), "attn/qkv/bias": (16,)}), torch)
    parts = [Part(f"attn.{name}_proj", size=size) for name, size in {"q": D, "k": 4, "v": 4}.items()]
    assert guess.mapping == {"attn/qkv/kernel": peft.linear(parts), "attn/qkv/bias": peft.vector(parts)}
    assert {row.confidence for row in guess.rows} == {"likely"} and not guess.tensors


def test_values_show_the_order_of_what_a_kernel_fuses() -> None:
    params = tree({"mixer/w": (D, 2, F)})
    arrays = {f"block.m{at}.weight": params["mixer/w"][:, 1 - at].T for at in range(2)}
    (row,) = peft.guess(params, arrays).rows
    assert row.row == peft.linear([Part("block.m1"), Part("block.m0")], axes="ioo") and row.confidence == "sure"
    (row,) = peft.guess(params, {name: value.shape for name, value in arrays.items()}).rows
    assert row.confidence == "unsure" and "fused: nothing states the order" in row.reasons


def test_leaves_that_a_module_fuses_are_unsure_without_values() -> None:
    shapes = {f"attn/{name}/kernel": (D, D) for name in ("key", "query", "value")}
    params, biases = tree(shapes | {"attn/key/bias": (D,)}), {"h.c_attn.bias": (3 * D,)}
    guess = peft.guess(params, biases | {"h.c_attn.weight": (D, 3 * D)})
    row, confidence, reasons = row_of(guess, "attn/key/kernel")
    assert row == peft.linear(Part("h.c_attn", of=(D, 3 * D)), conv1d=True) and confidence == "unsure"
    assert "one of q, k, v in a module that fuses them, by the convention of their order" in reasons
    fused = np.concatenate([params[f"attn/{name}/kernel"] for name in ("query", "key", "value")], axis=1)
    guess = peft.guess(params, biases | {"h.c_attn.weight": fused})
    assert [row.confidence for row in guess.rows] == ["sure"] * 4
    assert guess.mapping["attn/key/bias"] == peft.vector(Part("h.c_attn", of=(D, 3 * D)))


def test_a_tied_head_is_part_of_the_row_of_the_table() -> None:
    torch = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D)}
    mapping = {"embedder/input_embedding": peft.embedding("model.embed_tokens", head="lm_head")}
    assert peft.guess(tree({"embedder/input_embedding": (V, D)}), torch).mapping == mapping
    own = peft.guess(tree({"embedder/input_embedding": (V, D), "lm_head/kernel": (D, V)}), torch).mapping
    assert own["embedder/input_embedding"].head is None and own["lm_head/kernel"] == peft.linear("lm_head")
    params = tree({"table": (V, D)})
    arrays = {"words.weight": params["table"], "decoder.weight": params["table"]}
    row, confidence, _ = row_of(peft.guess(params, arrays), "table")
    assert confidence in ("sure", "unsure") and modules(row) in (["words"], ["decoder"])


def test_a_table_that_the_model_uses_as_its_head_is_unsure_without_a_tensor_of_the_head() -> None:
    # A file that `save_pretrained` writes has no tensor of a tied head.
    params, torch = tree({"table": (V, D)}), {"model.embed_tokens.weight": (V, D)}
    tied = lj.kernels(lambda p, ids: p["table"][ids] @ p["table"].T, params, np.zeros((2, 3), int))
    row, confidence, reasons = row_of(peft.guess(params, torch, kernels=tied), "table")
    assert (row, confidence) == (peft.embedding("model.embed_tokens"), "unsure")
    assert "the model uses it as its head, too, and no tensor is that head: state `head=`, such as 'lm_head'" in reasons
    lookup = lj.kernels(lambda p, ids: p["table"][ids], params, np.zeros((2, 3), int))
    for rest in ({"kernels": lookup}, {}):
        assert row_of(peft.guess(params, torch, **rest), "table")[1] == "likely"
    row = row_of(peft.guess(params, torch | {"lm_head.weight": (V, D)}, kernels=tied), "table")[0]
    assert row.head == "lm_head"


@pytest.mark.parametrize(
    "row",
    [
        peft.linear("up"),
        peft.linear([Part("q", interleaved=4, factor=0.5), Part("k", size=8)], axes="bioo", outputs=(1, 0)),
        peft.linear(Part("c_attn", of=(8, 24)), conv1d=True),
        peft.embedding("words", head="lm_head"),
        peft.conv("patch", axes="iiio"),
        peft.vector("up"),
        peft.vector("norm", parameter="weight"),
        peft.vector("cls", parameter="cls", keep_shape=True),
        peft.experts("mlp.experts", parameter="down_proj", swapped=True, experts_first=True),
        peft.experts("mlp.gate", parameter="weight"),
    ],
    ids=lambda row: row.kind,
)
def test_a_row_prints_as_the_call_that_makes_it(row: Row) -> None:
    assert eval(repr(row)) == row
    assert "None" not in repr(row) and "False" not in repr(row)


def test_conv_kernels_and_what_has_no_partner() -> None:
    shapes = {"patch/kernel": (3, 5, D, F), "patch/bias": (F,), "cls": (1, 1, D), "params/probe": (7,)}
    torch = {"patch.weight": (F, D, 3, 5), "patch.bias": (F,), "rotary.inv_freq": (4,), "other.weight": (5, 5)}
    guess = peft.guess(tree(shapes), torch)
    assert guess.mapping == {"patch/kernel": peft.conv("patch"), "patch/bias": peft.vector("patch")}
    assert guess.leaves == {"cls": (1, 1, D), "probe": (7,)}
    assert guess.tensors == {"rotary.inv_freq": (4,), "other.weight": (5, 5)}
    text = str(guess)
    assert "leaves without a partner:\n  cls (1, 1, 8)\n  probe (7,)" in text and text.endswith("  other.weight (5, 5)")


def test_parameters_that_are_no_weights_are_paired_by_shape_and_name() -> None:
    shapes = {
        "vit/cls": (1, 1, D),
        "vit/pos_embed": (1, 5, D),
        "logit_scale": (),
        "blocks/gamma_1": (L, D),
        "probe": (7,),
    }
    torch: Shapes = {"v.cls_token": (1, 1, D), "v.mask_token": (1, 1, D), "v.position_embeddings": (1, 5, D)}
    torch |= {"logit_scale": (), "rotary.inv_freq": (7,)} | {f"v.layer.{i}.gamma_1": (D,) for i in range(L)}
    guess = peft.guess(tree(shapes), torch)
    assert guess.mapping == {
        "vit/cls": peft.vector("v", parameter="cls_token", keep_shape=True),
        "vit/pos_embed": peft.vector("v", parameter="position_embeddings", keep_shape=True),
        "logit_scale": peft.vector("", parameter="logit_scale", keep_shape=True),
        "blocks/gamma_1": peft.vector("v.layer.{i}", parameter="gamma_1"),
    }
    assert {row.pattern: (row.confidence, *row.reasons) for row in guess.rows} == {
        "vit/cls": ("likely", "of several with its shape, by name"),
        "vit/pos_embed": ("sure", "no other has its shape"),
        "logit_scale": ("sure", "the same name"),
        "blocks/gamma_1": ("sure", "no other has its shape"),
    }
    assert guess.leaves == {"probe": (7,)} and set(guess.tensors) == {"v.mask_token", "rotary.inv_freq"}
    params = tree({"probe": (7,)})
    row, confidence, reasons = row_of(peft.guess(params, {"m.other": params["probe"]}), "probe")
    assert row == peft.vector("m", parameter="other") and (confidence, reasons) == ("sure", "values are equal")


def test_kernels_of_experts_are_not_taken_for_parameters() -> None:
    guess = peft.guess(tree({"experts/down": (L, D, F)}), {"mlp.experts.down_proj": (L, D, F)})
    assert not guess.rows


def test_the_norms_of_a_block_are_named_by_what_follows_them() -> None:
    scales: Shapes = {f"layers/{i}/{name}/scale": (D,) for i in range(L) for name in ("attention_norm", "mlp_norm")}
    torch = layers(input_layernorm=(D,), post_attention_layernorm=(D,))
    guess = peft.guess(tree(scales), torch)
    assert modules(row_of(guess, "layers/0/attention_norm/scale")[0]) == ["model.layers.{i}.input_layernorm"]
    assert modules(row_of(guess, "layers/0/mlp_norm/scale")[0]) == ["model.layers.{i}.post_attention_layernorm"]
    assert {row.confidence for row in guess.rows} == {"likely"}


def test_the_table_in_the_documentation_is_what_is_printed() -> None:
    text = (Path(__file__).parents[1] / "docs" / "peft.md").read_text()
    (block,) = (
        one for one in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if "peft.guess" in one
    )
    kernels: Shapes = {"query": (2, 16, 4, 4), "up": (2, 16, 32), "down": (2, 32, 16)}
    shapes = {f"layers/{name}/kernel": shape for name, shape in kernels.items()}
    shapes |= {"layers/query/bias": (2, 4, 4), "head/kernel": (16, 3), "head/bias": (3,)}
    names: dict[str, Any] = {"peft": peft, "params": tree(shapes)}
    exec(block.split("print(")[0], names)
    assert str(names["proposed"]) in text


def test_a_leaf_without_the_name_of_a_parameter_is_not_sure() -> None:
    for path in ("norm/offsets", "rope/frequencies"):
        _, confidence, reasons = row_of(peft.guess(tree({path: (7,)}), {"model.norm.weight": (7,)}), path)
        assert confidence == "likely" and "its name is not that of a bias or a scale" in reasons
    _, confidence, reasons = row_of(peft.guess(tree({"a/kernel": (D, F)}), {"x.weight": (F, D)}), "a/kernel")
    assert confidence == "likely" and reasons == "no other has its shape, and their names share no word"


def test_a_guess_exports_and_loads(tmp_path: Path) -> None:
    params = {"layers": {"up": {"kernel": jnp.asarray(random(L, D, F, seed=0))}}}
    mapping = peft.guess(params, layers(up=(F, D))).mapping
    part = lj.LoRA(rank=2, alpha=4)
    adapter = {"layers/up/kernel": lj.Adapter(part, "bio", a=jnp.ones((L, D, 2)), b=jnp.ones((L, 2, F)))}
    peft.export(tmp_path, adapter, mapping, base=params)
    assert list(peft.load(tmp_path, mapping, params)) == list(adapter)


def test_the_headers_of_a_directory_are_read(tmp_path: Path) -> None:
    for at, name in enumerate(("up", "down")):
        array = np.zeros((F, D) if name == "up" else (D, F), np.float16)
        safetensors.numpy.save_file({f"{name}.weight": array}, tmp_path / f"model-{at}.safetensors")
    params = tree({"up/kernel": (D, F), "down/kernel": (F, D)})
    expected = {f"{name}/kernel": peft.linear(name) for name in ("up", "down")}
    assert peft.guess(params, tmp_path).mapping == expected
    assert peft.guess({"up/kernel": params["up/kernel"]}, tmp_path / "model-0.safetensors").mapping.keys() == {
        "up/kernel"
    }


def test_heads_of_an_odd_size_have_no_rotary_order() -> None:
    params = {"q": {"kernel": np.arange(80.0).reshape(8, 2, 5)}}
    found = peft.guess(params, {"q.weight": params["q"]["kernel"].reshape(8, 10).T})
    assert found.mapping["q/kernel"] == peft.linear("q", axes="ioo")


def test_what_has_no_shapes_is_refused(tmp_path: Path) -> None:
    bad: Any = {"x.weight": "float32"}
    with pytest.raises(lj.SpecError, match=r"a shape for each torch parameter; got str for 'x\.weight'"):
        peft.guess({}, bad)
    with pytest.raises(lj.CheckpointError, match=r"Expected safetensors files in .*; got none"):
        peft.guess({}, tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"abc")
    with pytest.raises(lj.CheckpointError, match=r"Expected a valid x.safetensors; its header states"):
        peft.guess({}, tmp_path)
