"""The presets of NNX models: logits of Tunix's models equal those of `transformers`, through PEFT's files both ways."""

import jax
import numpy as np
import peft as torch_peft
import pytest
import torch
from bonsai_models import bonsai_case, with_bonsai_values
from test_peft_files import load_in_peft, near, randomized, torch_logits
from tunix_models import WORD_IDS, torch_model, tunix_case

import lora_jax as lj
from lora_jax import peft

# With 1 head of keys and values, as the small Gemma 3; with 4, as many as of queries, they are fused.
CASES = [("llama3", 2, True), ("llama3", 2, False), ("qwen2", 2, False), ("qwen3", 2, True), ("qwen3", 2, False)]
CASES += [("gemma", 2, True), ("gemma", 4, True), ("gemma1", 1, True), ("gemma3", 2, True), ("gemma3", 1, True)]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request):
    mapping, apply, params, model = tunix_case(*request.param)
    return mapping, jax.jit(apply), params, model


def test_the_weights_move_through_the_mapping(case):
    _, apply, params, model = case
    near(apply(params, WORD_IDS), torch_logits(model, WORD_IDS))


def check_export(case, spec, tmp_path, parameters):
    mapping, apply, params, _ = case
    adapted, adapter = lj.adapt(apply, params, spec, WORD_IDS, key=jax.random.key(0))
    adapter, adapted = randomized(adapter, 0.2), jax.jit(adapted)
    peft.export(tmp_path, adapter, mapping, base=params, task_type="CAUSAL_LM")
    expected = adapted(params, adapter, WORD_IDS)
    near(torch_logits(load_in_peft(torch_model(*parameters), tmp_path), WORD_IDS), expected)
    assert np.abs(expected - apply(params, WORD_IDS)).max() > 0.05
    near(adapted(params, peft.load(tmp_path, mapping, params), WORD_IDS), expected)


@pytest.mark.parametrize("make", [lj.LoRA, lj.DoRA])
def test_an_adapter_of_tunix_loads_in_peft(case, make, tmp_path, request):
    spec = {lj.targets.all_linear: make(rank=3, alpha=6)}
    spec |= {lj.targets.embeddings: lj.LoRA(rank=2, alpha=5)} if make is lj.LoRA else {}
    check_export(case, spec, tmp_path, request.node.callspec.params["case"])


@pytest.mark.parametrize("table", [lj.Rows(ids=(4, 9)), lj.Full()], ids=str)
@pytest.mark.parametrize("name", [("gemma3", 1, True), ("llama3", 2, False)], ids=str)
def test_a_table_of_tunix_loads_in_peft(name, table, tmp_path):
    spec = {lj.targets.all_linear: lj.LoRA(rank=3, alpha=6), lj.targets.embeddings: table}
    check_export(tunix_case(*name), spec, tmp_path, name)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("options", [{"use_rslora": True}, {"use_dora": True}], ids=str)
def test_an_adapter_of_peft_loads_in_tunix(case, options, tmp_path, request):
    mapping, apply, params, _ = case
    model = torch_model(*request.node.callspec.params["case"])
    config = torch_peft.LoraConfig(r=2, lora_alpha=5, target_modules=TARGETS, init_lora_weights=False, **options)
    torch.manual_seed(1)
    model = torch_peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path)
    adapter = peft.load(tmp_path, mapping, params)
    expected = torch_logits(model, WORD_IDS)
    near(jax.jit(lj.lora(apply))(params, adapter, WORD_IDS), expected)
    assert np.abs(expected - apply(params, WORD_IDS)).max() > 0.05
    peft.export(tmp_path / "again", adapter, mapping, base=params)
    again = load_in_peft(torch_model(*request.node.callspec.params["case"]), tmp_path / "again")
    near(torch_logits(again, WORD_IDS), expected)


def bonsai_spec(name, make):
    axes = {"conv": "iiio", "out": "io", "q": "io"}
    if name == "qwen3":
        axes = {"conv": "iiio", "out": "iio", "q": "ioo"}
    spec = {"**/patch_embedding/kernel": make(rank=2, alpha=3, axes=axes["conv"])} if name == "gemma3" else {}
    spec |= {"**/o_proj/kernel": make(rank=2, alpha=3, axes=axes["out"])}
    spec |= {"**/{q,k,v}_proj/kernel": make(rank=3, alpha=3, axes=axes["q"])} if name == "qwen3" else {}
    return spec | {"**/kernel": make(rank=2, alpha=4), "**/embed*/**/embedding": lj.LoRA(rank=2, alpha=5)}


def bonsai_inputs(name):
    """Ids, of which one is an image in the model that reads images, and that image."""
    if name != "gemma3":
        return WORD_IDS, {}
    ids = np.concatenate([np.full((4, 1), 30), WORD_IDS % 29], axis=1)
    images = np.random.default_rng(3).standard_normal((4, 3, 8, 8)).astype(np.float32)
    return ids, {"pixel_values": torch.from_numpy(images)}


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma3"])
def test_an_adapter_of_a_tree_of_bonsai_loads_in_peft(name, tmp_path):
    mapping, tree, model = bonsai_case(name)
    ids, more = bonsai_inputs(name)
    before = torch_logits(model, ids, **more)
    adapter = randomized(lj.init(jax.random.key(0), tree, bonsai_spec(name, lj.LoRA)), 0.2)
    peft.export(tmp_path, adapter, mapping, base=tree)
    got = torch_logits(load_in_peft(model, tmp_path), ids, **more)
    near(got, torch_logits(with_bonsai_values(name, lj.merge(tree, adapter)), ids, **more))
    assert np.abs(got - before).max() > 0.05
    back = peft.load(tmp_path, mapping, tree)
    assert set(back) == set(adapter)
    for one, other in zip(jax.tree.leaves(dict(sorted(back.items()))), jax.tree.leaves(adapter), strict=True):
        near(one, other, 1e-6)
