"""Loads models that the library writes in `transformers`, and compares merged files with PEFT; `make test-oracle`."""

import warnings

import jax
import numpy as np
import peft as torch_peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from safetensors.torch import load_file as torch_load_file
from safetensors.torch import save_file
from test_peft_files import (
    IMAGES,
    SIZES,
    WORD_IDS,
    WORDS,
    Net,
    flax_tree,
    llama_pair,
    near,
    preset_case,
    randomized,
    torch_logits,
)

import lora_jax as lj
from lora_jax import peft


def loaded(kind, path):
    """A model of `transformers`; a missing or unexpected tensor is an error."""
    model, info = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("size", ["5GB", "4KB"])
def test_the_llama_of_the_example_is_written_and_read(scanned, size, tmp_path):
    apply, params, model = llama_pair(scanned)
    spec = {lj.targets.all_linear: lj.DoRA(rank=3, alpha=6), lj.targets.embeddings: lj.LoRA(rank=2, alpha=5)}
    adapted, adapter = lj.adapt(apply, params, spec, WORD_IDS, key=jax.random.key(0))
    adapter = randomized(adapter)
    mapping, config = peft.presets.smollm2(), model.config.to_dict()
    out = tmp_path / "out"
    peft.export_merged(out, params, mapping, adapter=adapter, config=config, max_shard_size=size)
    assert (out / "model.safetensors.index.json").exists() == (size == "4KB")
    expected = adapted(params, adapter, WORD_IDS)
    near(torch_logits(loaded(transformers.LlamaForCausalLM, out), WORD_IDS), expected)
    assert np.abs(expected - apply(params, WORD_IDS)).max() > 0.05
    near(apply(peft.load_params(out, mapping, params), WORD_IDS), expected)
    model.save_pretrained(tmp_path / "torch", max_shard_size=size)
    near(apply(peft.load_params(tmp_path / "torch", mapping, params), WORD_IDS), apply(params, WORD_IDS))


CLASSES = {
    "bert": transformers.BertForMaskedLM,
    "roberta": transformers.RobertaForSequenceClassification,
    "gpt2": transformers.GPT2LMHeadModel,
    "vit": transformers.ViTForImageClassification,
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_preset_writes_and_reads_a_whole_model(name, tmp_path):
    torch.manual_seed(0)
    model, params, mapping, x, _ = preset_case(name)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    params = {path: array for path, array in zip(params, flax_tree(model).values(), strict=True)}
    model.save_pretrained(tmp_path / "torch")
    peft.export_merged(tmp_path / "out", params, mapping, config=model.config.to_dict())
    if name == "bert":  # the file has the bias under the other name that `transformers` has for it
        mapping = {"cls/predictions/bias": peft.vector("cls.predictions")} | mapping
    if name == "vit":  # the file has the names of `transformers` 4
        mapping = peft.presets.vit(transformers=4)
    near(torch_logits(loaded(CLASSES[name], tmp_path / "out"), x), torch_logits(model, x), 1e-6)
    back = peft.load_params(tmp_path / "torch", mapping, params)
    assert all(np.array_equal(back[path], array) for path, array in params.items())


def test_the_preset_of_clip_writes_and_reads_a_whole_model(tmp_path):
    images = {"image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=WORDS | SIZES, vision_config=images | SIZES, projection_dim=12)
    model = transformers.CLIPModel(config)
    params, mapping = flax_tree(model), peft.presets.clip()
    peft.export_merged(tmp_path, params, mapping, config=model.config.to_dict())
    with torch.no_grad():
        inputs = {"input_ids": torch.from_numpy(WORD_IDS), "pixel_values": torch.from_numpy(IMAGES)}
        one, other = (m.eval()(**inputs).logits_per_text for m in (model, loaded(transformers.CLIPModel, tmp_path)))
    near(one, other, 1e-6)
    back = peft.load_params(tmp_path, mapping, params)
    assert [path for path, array in params.items() if not np.array_equal(back[path], array)] == []


# Files


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA = {
    "LoRA": {"target_modules": LINEAR},
    "rsLoRA": {"target_modules": LINEAR, "use_rslora": True, "rank_pattern": {"q_proj": 3}},
    "DoRA": {"target_modules": LINEAR, "use_dora": True, "alpha_pattern": {"layers.1.mlp.up_proj": 5}},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [4, 9]}},
    "tied table": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
}


def adapted_by_peft(model, config, path):
    """PEFT's model with a random adapter, which it saves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch_peft.get_peft_model(model, torch_peft.LoraConfig(**config))
        random = np.random.default_rng(5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                change = 0.3 * random.standard_normal(parameter.shape).astype(np.float32)
                parameter.data += torch.from_numpy(change)
        model.save_pretrained(path)
    return model


DEFAULTS = {"r": 2, "lora_alpha": 3, "init_lora_weights": False}


@pytest.mark.parametrize("config", LLAMA.values(), ids=LLAMA)
def test_merged_files_have_the_logits_of_peft(config, tmp_path):
    _, _, model = llama_pair(scanned=False)
    before = torch_logits(model, WORD_IDS)
    model.save_pretrained(tmp_path / "base", max_shard_size="5KB")
    model = adapted_by_peft(model, DEFAULTS | config, tmp_path / "adapter")
    peft.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", max_shard_size="10KB")
    got = torch_logits(loaded(transformers.LlamaForCausalLM, tmp_path / "out"), WORD_IDS)
    near(got, torch_logits(model, WORD_IDS))
    assert np.abs(got - before).max() > 0.05


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_untied_head_has_the_logits_of_peft(target, tmp_path):
    _, _, model = llama_pair(scanned=False)
    model.save_pretrained(tmp_path / "base")
    model = adapted_by_peft(model, DEFAULTS | {"target_modules": [target]}, tmp_path / "adapter")
    with pytest.raises(lj.MergeError, match=f"only '.*{target}.weight' has one"):
        peft.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    peft.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", untie="lm_head")
    got = torch_logits(loaded(transformers.LlamaForCausalLM, tmp_path / "out"), WORD_IDS)
    near(got, torch_logits(model, WORD_IDS))


OTHERS = {
    "bert": {"target_modules": ["query", "dense"], "lora_bias": True},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "bias": "lora_only"},
    "roberta": {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_merged_files_of_other_models_have_the_logits_of_peft(name, tmp_path):
    torch.manual_seed(0)
    model, _, _, x, _ = preset_case(name)
    before = torch_logits(model, x)
    model.save_pretrained(tmp_path / "base")
    model = adapted_by_peft(model, DEFAULTS | OTHERS[name], tmp_path / "adapter")
    peft.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    got = torch_logits(loaded(CLASSES[name], tmp_path / "out"), x)
    near(got, torch_logits(model, x))
    assert np.abs(got - before).max() > 0.05


NET = {
    "DoRA": {"target_modules": ["conv", "q", "down"], "use_dora": True, "modules_to_save": ["head"]},
    "biases": {"target_modules": ["conv", "q"], "lora_bias": True, "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("config", NET.values(), ids=NET)
def test_merged_files_of_any_module_have_the_results_of_peft(config, tmp_path):
    model = Net()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model = adapted_by_peft(model, DEFAULTS | config, tmp_path / "adapter")
    peft.merge_files(tmp_path, tmp_path / "adapter", tmp_path / "out")
    merged = Net()
    merged.load_state_dict(torch_load_file(tmp_path / "out" / "model.safetensors"))
    near(torch_logits(merged), torch_logits(model))
    assert np.abs(torch_logits(merged) - torch_logits(Net())).max() > 0.05


def test_vera_is_merged_as_peft_does(tmp_path):
    model = Net()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model = torch_peft.get_peft_model(model, torch_peft.VeraConfig(r=5, target_modules=["q", "out", "down", "gate"]))
    random = np.random.default_rng(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.from_numpy(0.5 * random.standard_normal(parameter.shape).astype(np.float32))
    model.save_pretrained(tmp_path / "adapter")
    peft.merge_files(tmp_path, tmp_path / "adapter", tmp_path / "out")
    merged = Net()
    merged.load_state_dict(torch_load_file(tmp_path / "out" / "model.safetensors"))
    near(torch_logits(merged), torch_logits(model))


@pytest.mark.parametrize("config", LLAMA.values(), ids=LLAMA)
def test_what_is_read_without_a_mapping_is_written_byte_by_byte(config, tmp_path):
    _, _, model = llama_pair(scanned=False)
    model.save_pretrained(tmp_path / "base")
    adapted_by_peft(model, DEFAULTS | config, tmp_path / "adapter")
    found = peft.read(tmp_path / "adapter", base=tmp_path / "base")
    peft.export(tmp_path / "again", found.adapter, found.mapping, base=found.params)
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("adapter", "again"))
    if "embed_tokens" not in config["target_modules"]:
        assert one.read_bytes() == other.read_bytes()
        return
    tensors, others = load_file(one), load_file(other)  # without PEFT's copies of the base
    assert {name for name in tensors if not name.endswith("base_layer.weight")} == set(others)
    assert all(np.array_equal(tensors[name], array) for name, array in others.items())
