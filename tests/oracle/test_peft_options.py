"""Adapters that PEFT makes with the options that have a counterpart here load here with equal logits.

`test_peft_files.py` has those of linear layers, embeddings and convolutions, and `test_peft_experts.py` those of
parameters without a module. Here are those that need a language model, or change its weights; `make test-oracle`.
"""

import warnings

import numpy as np
import peft as torch_peft
import pytest
import torch
from test_peft_files import (
    LINEAR,
    MAPPING,
    PARAMS,
    TOKENS,
    WORD_IDS,
    Net,
    llama_pair,
    near,
    net,
    preset_case,
    torch_logits,
    with_values,
)

import lora_jax as lj
from lora_jax import peft

IDS = WORD_IDS.copy()
IDS[0, 1:3], IDS[1, -2:] = (5, 7), (5, 7)  # two rows have the invocation tokens, and the others do not

LLAMA = {
    "targets by architecture": {},
    "all-linear": {"target_modules": "all-linear"},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "ids of tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [4, 9]},
    "tied table": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "saved tied table": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "invocation": {"target_modules": ["q_proj", "up_proj"], "alora_invocation_tokens": [5, 7]},
}


def made(model, path, **options):
    """PEFT's model with random values, after it was saved."""
    defaults = {"r": 2, "lora_alpha": 3, "init_lora_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch_peft.get_peft_model(model, torch_peft.LoraConfig(**(defaults | options)))
        random = np.random.default_rng(5)
        for parameter in {id(one): one for one in model.parameters() if one.requires_grad}.values():
            change = 0.3 * random.standard_normal(parameter.shape).astype(np.float32)
            parameter.data += torch.from_numpy(change)
        model.save_pretrained(path)
    return model


@pytest.mark.parametrize("options", LLAMA.values(), ids=LLAMA)
def test_an_adapter_of_a_language_model_made_by_peft_loads_here(options, tmp_path):
    apply, params, model = llama_pair(scanned=True)
    before = torch_logits(model, IDS)
    model = made(model, tmp_path, task_type="CAUSAL_LM", **options)
    adapter = peft.load(tmp_path, peft.presets.smollm2(), params)
    weights = {"token_weights": lj.active_tokens(adapter, IDS)} if "alora_invocation_tokens" in options else {}
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.from_numpy(IDS)).logits.numpy()
    near(lj.lora(apply)(params, adapter, IDS, **weights), expected)
    assert np.abs(expected - before).max() > 0.01


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_of_conv1d_made_by_peft_loads_here(use_dora, tmp_path):
    model, params, mapping, x, _ = preset_case("gpt2")
    model = made(model, tmp_path, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=use_dora)
    adapter = peft.load(tmp_path, mapping, params)
    near(torch_logits(with_values(preset_case("gpt2")[0], lj.merge(params, adapter)), x), torch_logits(model, x))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of `preprocess_loraga`
@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4", "lora_ga"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_start_that_changes_the_base_loads_here_after_peft_has_converted_it(start, rslora, tmp_path):
    torch.manual_seed(0)
    base, options = Net(), {"r": 2, "lora_alpha": 3, "target_modules": LINEAR[:-1], "use_rslora": rslora}
    config = torch_peft.LoraConfig(**options, init_lora_weights=start)
    if start == "lora_ga":
        config = torch_peft.LoraConfig(**options, init_lora_weights=start, lora_ga_config=torch_peft.LoraGAConfig())
        tokens = torch.from_numpy(TOKENS)
        torch_peft.tuners.lora.preprocess_loraga(base, config, lambda: (base(tokens) ** 2).sum().backward())
    model = torch_peft.get_peft_model(base, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    random = np.random.default_rng(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            change = 0.2 * random.standard_normal(parameter.shape).astype(np.float32)
            parameter.data += torch.from_numpy(change)
    expected = torch_logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "trained")
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with pytest.raises(lj.CheckpointError, match="path_initial_model_for_weight_conversion"):
        peft.load(tmp_path / "trained", MAPPING, PARAMS)
    near(lj.lora(net)(PARAMS, peft.load(tmp_path / "plain", MAPPING, PARAMS), TOKENS), expected, 1e-4)
