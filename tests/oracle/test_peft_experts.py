"""Exchanges adapters of experts with PEFT, which has them as `target_parameters`; `make test-oracle`."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft as torch_peft
import pytest
import torch
import transformers
from test_peft_files import load_in_peft, near, random_array, randomized, torch_logits
from torch import nn

import lora_jax as lj
from lora_jax import peft

L, D, F, E, K = 2, 8, 12, 3, 2
WORDS = np.random.default_rng(2).integers(3, 31, (4, 5))
SIZES = {"vocab_size": 31, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L, "head_dim": 4}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": E, "num_experts_per_tok": K}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

MODELS = {  # the class, what its configuration needs, the module of the experts, whether it has kernels as (in, out)
    "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig, {}, "mlp.experts", False),
    "gpt-oss": (transformers.GptOssForCausalLM, transformers.GptOssConfig, {}, "mlp.experts", True),
    "llama 4": (
        transformers.Llama4ForCausalLM,
        transformers.Llama4TextConfig,
        {"intermediate_size_mlp": F, "attn_temperature_tuning": False, "attention_chunk_size": 8},
        "feed_forward.experts",
        True,
    ),
}


def torch_model(name):
    make, config, options, _, _ = MODELS[name]
    torch.manual_seed(0)
    model = make(config(**SIZES, **TOKENS, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def mapping_of(name):
    experts = f"model.layers.{{i}}.{MODELS[name][3]}"
    swapped = name == "llama 4"
    mapping = {key: peft.experts(experts, parameter=f"{key}_proj", swapped=swapped) for key in ("gate_up", "down")}
    mapping["query"] = peft.linear("model.layers.{i}.self_attn.q_proj")
    return mapping | {"router": peft.experts("model.layers.{i}.mlp.gate", parameter="weight")}


def kernels(model, name):
    """The kernels of a torch model as stacks of all layers."""
    experts, is_in_out = MODELS[name][3:]
    state = model.state_dict()

    def stack(key, transpose):
        array = np.stack([state[f"model.layers.{i}.{key}"].numpy() for i in range(L)])
        return array.swapaxes(-1, -2) if transpose else array

    found = {key: stack(f"{experts}.{key}_proj", not is_in_out) for key in ("gate_up", "down")}
    found["query"] = stack("self_attn.q_proj.weight", True)
    return found | ({"router": stack("mlp.gate.weight", True)} if name == "mixtral" else {})


def with_kernels(name, tree):
    """The torch model with other kernels: the inverse of `kernels`."""
    experts, is_in_out = MODELS[name][3:]
    names = {f"{experts}.{key}_proj": (key, not is_in_out) for key in ("gate_up", "down")}
    names |= {"self_attn.q_proj.weight": ("query", True), "mlp.gate.weight": ("router", True)}
    model = torch_model(name)
    for parameter, (key, transpose) in names.items():
        for i in range(L) if key in tree else ():
            array = np.asarray(tree[key][i])
            array = array.swapaxes(-1, -2) if transpose else array
            model.get_parameter(f"model.layers.{i}.{parameter}").data = torch.from_numpy(array.copy())
    return model


EXPERTS = {"{gate_up,down}": lj.LoRA(rank=2, alpha=6, axes="bbio")}
SPECS = {
    "both": EXPERTS,
    "the first": {"gate_up": lj.LoRA(rank=2, alpha=3, axes="bbio")},
    "the second": {"down": lj.RSLoRA(rank=3, alpha=3, axes="bbio")},
    "of another rank": EXPERTS | {"query": lj.LoRA(rank=3, alpha=2, axes="bio")},
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", MODELS)
def test_exported_experts_load_in_peft(name, spec, tmp_path):
    params = kernels(torch_model(name), name)
    adapter = randomized(lj.init(jax.random.key(0), params, spec))
    peft.export(tmp_path, adapter, mapping_of(name), base=params)
    got = torch_logits(load_in_peft(torch_model(name), tmp_path), WORDS)
    near(got, torch_logits(with_kernels(name, lj.merge(params, adapter)), WORDS))
    assert np.abs(got - torch_logits(torch_model(name), WORDS)).max() > 0.02
    back = peft.load(tmp_path, mapping_of(name), params)
    assert jax.tree.structure(back) == jax.tree.structure(
        dict(sorted(adapter.items(), key=lambda x: [*params].index(x[0])))
    )
    for path, part in adapter.items():
        jax.tree.map(np.testing.assert_array_equal, back[path], part)


CONFIGS = {
    "both": {"target_parameters": ["gate_up_proj", "down_proj"]},
    "both in another order": {"target_parameters": ["experts.down_proj", "experts.gate_up_proj"]},
    "one, of another scale": {"target_parameters": ["down_proj"], "use_rslora": True, "target_modules": ["q_proj"]},
    "patterns": {
        "target_parameters": ["gate_up_proj", "down_proj"],
        "rank_pattern": {r".*\.gate_up_proj": 4, r"layers\.1\..*\.down_proj": 3},
        "alpha_pattern": {r".*\.gate_up_proj": 8},
    },
}


def made_by_peft(model, config, path):
    defaults = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, "target_modules": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch_peft.get_peft_model(model, torch_peft.LoraConfig(**(defaults | config)))
        random = np.random.default_rng(5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.from_numpy(0.3 * random.standard_normal(parameter.shape).astype(np.float32))
        model.save_pretrained(path)
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_experts_made_by_peft_load_here(name, config, tmp_path):
    model, params = made_by_peft(torch_model(name), config, tmp_path), kernels(torch_model(name), name)
    adapter = peft.load(tmp_path, mapping_of(name), params)
    near(torch_logits(with_kernels(name, lj.merge(params, adapter)), WORDS), torch_logits(model, WORDS))
    assert np.abs(torch_logits(model, WORDS) - torch_logits(torch_model(name), WORDS)).max() > 0.02


def test_all_linear_of_peft_has_experts_and_routers(tmp_path):
    model = made_by_peft(torch_model("mixtral"), {"target_modules": "all-linear"}, tmp_path)
    params = kernels(torch_model("mixtral"), "mixtral")
    mapping = mapping_of("mixtral")
    others = {f"{key}_proj": peft.linear(f"model.layers.{{i}}.self_attn.{key}_proj") for key in "kvo"}
    state = torch_model("mixtral").state_dict()
    for key in others:
        params[key] = np.stack([state[f"model.layers.{i}.self_attn.{key}.weight"].numpy().T for i in range(L)])
    adapter = peft.load(tmp_path, mapping | others, params)
    assert set(adapter) == set(params) and {"router", "gate_up"} < set(adapter)
    merged = lj.merge(params, adapter)
    expected = with_kernels("mixtral", merged)
    for key in others:
        for i in range(L):
            name = f"model.layers.{i}.self_attn.{key}.weight"
            expected.get_parameter(name).data = torch.from_numpy(np.array(merged[key][i]).T.copy())
    near(torch_logits(expected, WORDS), torch_logits(model, WORDS))


QWEN3 = {"qwen 3": (transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig)}
QWEN_SIZES = {"num_experts": E, "moe_intermediate_size": F, "norm_topk_prob": True}


def whole_model(name):
    if name in MODELS:
        return torch_model(name)
    make, config = QWEN3[name]
    torch.manual_seed(0)
    model = make(config(**SIZES, **TOKENS, **QWEN_SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def whole_tree(name):
    """All parameters of a torch model, kernels as `(in, out)`, and their rows."""
    stored = "io" if name in MODELS and MODELS[name][4] else "oi"
    params, mapping = {}, {}
    for key, parameter in whole_model(name).named_parameters():
        module, _, last = key.rpartition(".")
        array = parameter.detach().numpy()
        if last in ("gate_up_proj", "down_proj"):
            mapping[key] = peft.experts(module, parameter=last, stored=stored, swapped=name == "llama 4")
            array = array.swapaxes(-1, -2) if stored == "oi" else array
        elif last == "weight" and array.ndim == 2:
            mapping[key] = peft.embedding(module) if "embed" in module else peft.linear(module)
            if module.endswith("mlp.gate"):  # a parameter without a module, in Mixtral and Qwen
                mapping[key] = peft.experts(module, parameter="weight", stored="oi")
            array = array if "embed" in module else array.T
        else:
            mapping[key] = peft.vector(module, parameter=last, keep_shape=True)
        params[key] = jnp.asarray(array.copy())
    return params, mapping


@pytest.mark.parametrize("name", [*MODELS, *QWEN3])
def test_models_of_experts_are_written_merged_and_read(name, tmp_path):
    params, mapping = whole_tree(name)
    model = whole_model(name)
    spec = {"*.{gate_up_proj,down_proj}": lj.LoRA(rank=2, alpha=6, axes="bio")}
    adapter = randomized(lj.init(jax.random.key(0), params, spec))
    merged = lj.merge(params, adapter)
    # The same parameters set one by one.
    expected = whole_model(name)
    for key, array in merged.items():
        row, array = mapping[key], np.asarray(array)
        turned = row.kind == "linear" or row.stored == "oi"
        expected.get_parameter(key).data = torch.from_numpy((array.swapaxes(-1, -2) if turned else array).copy())
    expected = torch_logits(expected, WORDS)
    assert np.abs(expected - torch_logits(model, WORDS)).max() > 0.02

    peft.export_merged(tmp_path, params, mapping, adapter=adapter, config=model.config.to_dict())
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    near(torch_logits(loaded, WORDS), expected)
    back = peft.load_params(tmp_path, mapping, jax.eval_shape(lambda: params))
    jax.tree.map(np.testing.assert_array_equal, back, merged)


class Block(nn.Module):
    """One block of Mixtral."""

    def __init__(self):
        super().__init__()
        config = transformers.MixtralConfig(**SIZES)
        config._experts_implementation = "eager"
        self.block = transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock(config)
        for at, parameter in enumerate(self.parameters()):
            parameter.data = torch.from_numpy(random_array(*parameter.shape, seed=at))

    def forward(self, x):
        return self.block(x)


def mixture(params, x):
    """The block in JAX."""
    chances = jax.nn.softmax(x @ params["router"])
    top, chosen = jax.lax.top_k(chances, K)
    weights = (jax.nn.one_hot(chosen, E) * (top / top.sum(-1, keepdims=True))[..., None]).sum(-2)
    gate, up = jnp.split(jnp.einsum("btd,edf->ebtf", x, params["gate_up"]), 2, axis=-1)
    return jnp.einsum("ebtf,efd,bte->btd", jax.nn.silu(gate) * up, params["down"], weights)


def test_a_mixture_of_experts_has_equal_results_in_both_frameworks(tmp_path):
    state = {name: parameter.detach().numpy() for name, parameter in Block().named_parameters()}
    params = {"router": state["block.gate.weight"].T}
    params |= {key: state[f"block.experts.{key}_proj"].swapaxes(1, 2) for key in ("gate_up", "down")}
    mapping = {key: peft.experts("block.experts", parameter=f"{key}_proj") for key in ("gate_up", "down")}
    mapping["router"] = peft.experts("block.gate", parameter="weight")
    x = random_array(2, 7, D, seed=8)
    near(torch_logits(Block(), x), mixture(params, x))
    spec = {"router": lj.LoRA(rank=1, alpha=2), "*": lj.LoRA(rank=2, alpha=3, axes="bio")}
    adapter = randomized(lj.init(jax.random.key(0), params, spec))
    peft.export(tmp_path, adapter, mapping, base=params)
    expected = lj.lora(mixture)(params, adapter, x)
    # It says that it ignores the ranks of parameters, and does not.
    with pytest.warns(RuntimeWarning, match="_pattern keys did not match any targeted module"):
        model = torch_peft.PeftModel.from_pretrained(Block(), tmp_path)
    near(torch_logits(model, x), expected)
    assert np.abs(expected - mixture(params, x)).max() > 0.05
