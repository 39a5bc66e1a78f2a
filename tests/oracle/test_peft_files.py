"""Exchanges adapters with PEFT through files, in both directions; `make test-oracle`."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft as torch_peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file
from torch import nn

import lora_jax as lj
import smollm2
from lora_jax import peft
from lora_jax.peft._export_merged import tensor_of
from lora_jax.peft._sites import compiled, find, sites

V, D, H, HD, F, L, C, T = 11, 12, 2, 6, 10, 2, 3, 7
TOKENS = np.random.default_rng(1).integers(0, V, (4, T))


def random_array(*shape, seed):
    return (np.random.default_rng(seed).standard_normal(shape) / 3).astype(np.float32)


SHAPES = {
    "embed": (V, D),
    "conv": (3, D, D),
    "conv_bias": (D,),
    "query": (D, H, HD),
    "query_bias": (H, HD),
    "out": (H, HD, D),
    "gate_up": (L, 2, D, F),
    "down": (L, F, D),
    "norm": (D,),
    "norm_bias": (D,),
    "head": (D, C),
    "head_bias": (C,),
}
PARAMS = {name: random_array(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
FACTOR = HD**-0.5  # the scale of the queries is part of the kernel here, and not of torch's

QUERY = peft.Part("q", interleaved=HD, factor=FACTOR)
MAPPING = {
    "embed": peft.embedding("embed"),
    "conv": peft.conv("conv"),
    "conv_bias": peft.vector("conv"),
    "query": peft.linear(QUERY, axes="ioo"),
    "query_bias": peft.vector(QUERY),
    "out": peft.linear("out", axes="iio"),
    "gate_up": peft.linear([peft.Part("layers.{i}.gate"), peft.Part("layers.{i}.up")], axes="boio"),
    "down": peft.linear("layers.{i}.down"),
    "norm": peft.vector("norm", parameter="weight"),
    "norm_bias": peft.vector("norm"),
    "head": peft.linear("head"),
    "head_bias": peft.vector("head"),
}


def net(p, tokens):
    x = p["embed"][tokens]
    x = jax.lax.conv_general_dilated(x, p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    x = jnp.tanh(x + p["conv_bias"])
    q = jnp.einsum("btd,dhk->bthk", x, p["query"]) + p["query_bias"]
    x = x + jnp.einsum("bthk,hkd->btd", jnp.tanh(q / FACTOR), p["out"])

    def layer(x, kernels):
        gate, up = jnp.einsum("btd,cdf->cbtf", x, kernels[0])
        return x + (jax.nn.silu(gate) * up) @ kernels[1], None

    x, _ = jax.lax.scan(layer, x, (p["gate_up"], p["down"]))
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["norm"] + p["norm_bias"]
    return x @ p["head"] + p["head_bias"]


def half_split(rows):
    """Torch's order of the outputs of the queries, written independently of the library."""
    order = [h * HD + at for h in range(H) for at in [*range(0, HD, 2), *range(1, HD, 2)]]
    return rows[order]


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = (nn.Linear(D, F, bias=False) for _ in range(2))
        self.down = nn.Linear(F, D, bias=False)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(V, D), nn.Conv1d(D, D, 3, padding=1)
        self.q, self.out = nn.Linear(D, H * HD), nn.Linear(H * HD, D, bias=False)
        self.layers = nn.ModuleList([Mlp() for _ in range(L)])
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, C)
        values = {
            "embed.weight": PARAMS["embed"],
            "conv.weight": PARAMS["conv"].transpose(2, 1, 0),
            "conv.bias": PARAMS["conv_bias"],
            "q.weight": half_split(PARAMS["query"].reshape(D, -1).T) / FACTOR,
            "q.bias": half_split(PARAMS["query_bias"].reshape(-1)) / FACTOR,
            "out.weight": PARAMS["out"].reshape(-1, D).T,
            "norm.weight": PARAMS["norm"],
            "norm.bias": PARAMS["norm_bias"],
            "head.weight": PARAMS["head"].T,
            "head.bias": PARAMS["head_bias"],
        }
        for i in range(L):
            values[f"layers.{i}.gate.weight"] = PARAMS["gate_up"][i, 0].T
            values[f"layers.{i}.up.weight"] = PARAMS["gate_up"][i, 1].T
            values[f"layers.{i}.down.weight"] = PARAMS["down"][i].T
        self.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in values.items()})

    def forward(self, tokens):
        x = torch.tanh(self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2))
        # the order of the outputs of `q` is that of the halves, and `out` has that of the pairs
        q = torch.tanh(self.q(x)).unflatten(-1, (H, 2, HD // 2)).transpose(-1, -2).flatten(-3)
        x = x + self.out(q)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def near(got, expected, tolerance=1e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


def randomized(adapter, size=0.4):
    """All arrays random and nonzero; magnitudes and full values near their start."""
    leaves, treedef = jax.tree.flatten(adapter)
    random = [x + size * jnp.asarray(random_array(*x.shape, seed=90 + i)) for i, x in enumerate(leaves)]
    return treedef.unflatten(random)


def load_in_peft(model, path):
    """PEFT's model; a warning is an error, except one of `transformers` about a name that PEFT uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to True but .* is `torch.nn.Linear`")  # GPT-2's head
        return torch_peft.PeftModel.from_pretrained(model, path)


def torch_logits(model, tokens=TOKENS, **kwargs):
    with torch.no_grad():
        result = model.eval()(torch.from_numpy(tokens), **kwargs)
    return getattr(result, "logits", getattr(result, "logits_per_image", result)).numpy()


AXES = {"conv": "iio", "query": "ioo", "out": "iio", "gate_up": "boio", "down": "bio"}
KERNELS = ("embed", "conv", "query", "out", "gate_up", "down", "head")


def for_all(make):
    return {name: dataclasses.replace(make(name), axes=AXES.get(name)) for name in KERNELS}


LORA = for_all(lambda name: lj.LoRA(rank=2, alpha=6))
BIASES = {"conv_bias": lj.LoRABias(scale=3), "query_bias": lj.LoRABias(scale=3)}
SPECS = {
    "LoRA": LORA,
    "rsLoRA": for_all(lambda name: lj.RSLoRA(rank=3, alpha=4)),
    "DoRA": for_all(lambda name: lj.DoRA(rank=2, alpha=4)),
    "DoRA, rank-stabilized": for_all(lambda name: lj.DoRA(rank=3, alpha=4, rank_stabilized=True)),
    "unequal": for_all(lambda name: lj.LoRA(rank=1 + len(name) % 3, alpha=len(name))),
    "LoRA and rsLoRA": LORA | {"down": lj.RSLoRA(rank=3, alpha=2, axes="bio")},
    "biases of B": {name: LORA[name] for name in ("conv", "query", "head")} | BIASES,
    "full": {"query": LORA["query"], "norm": lj.Full(), "head": lj.Full(), "head_bias": lj.Full()},
    "only full": {"norm_bias": lj.Full(), "conv": lj.Full()},
    "rows": {"embed": lj.Rows(ids=(7, 2)), "gate_up": LORA["gate_up"]},
    "full bias of an adapted layer": {"query": LORA["query"], "query_bias": lj.Full()},
    "some layers": {name: lj.Layers(layers=[1], variant=LORA[name]) for name in ("gate_up", "down")},
    "some layers, DoRA": {"down": lj.Layers(layers=[0], variant=lj.DoRA(rank=2, alpha=4, axes="bio"))},
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_an_exported_adapter_loads_in_peft_with_equal_logits(spec, tmp_path):
    adapter = randomized(lj.init(jax.random.key(0), PARAMS, spec))
    peft.export(tmp_path, adapter, MAPPING, base=PARAMS)
    model = load_in_peft(Net(), tmp_path)
    expected = lj.lora(net)(PARAMS, adapter, TOKENS)
    near(torch_logits(model), expected)
    assert np.abs(expected - net(PARAMS, TOKENS)).max() > 0.05
    back = peft.load(tmp_path, MAPPING, PARAMS)
    near(lj.lora(net)(PARAMS, back, TOKENS), expected)


@pytest.mark.parametrize("spec", [SPECS["LoRA"], SPECS["DoRA"], SPECS["unequal"]], ids=["LoRA", "DoRA", "unequal"])
def test_peft_has_no_other_tensors_than_the_exported(spec, tmp_path):
    adapter = randomized(lj.init(jax.random.key(0), PARAMS, spec))
    peft.export(tmp_path, adapter, MAPPING, base=PARAMS)
    model = load_in_peft(Net(), tmp_path)
    exported = load_file(tmp_path / "adapter_model.safetensors")
    state = torch_peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert {name: tuple(x.shape) for name, x in state.items()} == {name: x.shape for name, x in exported.items()}
    for name, tensor in state.items():
        np.testing.assert_array_equal(tensor.numpy(), exported[name])


LINEAR = ["q", "out", "gate", "up", "down", "head"]
CONFIGS = {
    "LoRA": {"target_modules": [*LINEAR, "conv", "embed"]},
    "rsLoRA": {"target_modules": LINEAR, "use_rslora": True},
    "DoRA": {"target_modules": [*LINEAR, "conv", "embed"], "use_dora": True},
    "lora_bias": {"target_modules": ["q", "head", "conv"], "lora_bias": True},
    "modules_to_save": {"target_modules": ["q"], "modules_to_save": ["head", "norm"]},
    "patterns": {
        "target_modules": [*LINEAR, "embed"],
        "rank_pattern": {"layers.0.gate": 3, "up": 1, "embed": 4},
        "alpha_pattern": {"layers.1.*": 7, "q": 1},
    },
    "some of the fused": {"target_modules": ["up"]},
    "some of the layers": {"target_modules": r"layers\.1\.(down|up)", "rank_pattern": {"up": 5}},
    "trainable tokens": {"target_modules": ["q"], "trainable_token_indices": {"embed": [3, 9, 0]}},
    "all biases": {"target_modules": ["q", "head"], "bias": "all"},
    "biases of adapted layers": {"target_modules": ["q", "head"], "bias": "lora_only"},
    "all-linear": {"target_modules": "all-linear"},
    "a weight as a parameter": {
        "target_modules": ["q"],
        "target_parameters": ["layers.0.down.weight"],
        "rank_pattern": {"down.weight": 3},
    },
    "exclude": {"target_modules": LINEAR, "exclude_modules": ["head"]},
    "orthogonal": {"target_modules": ["q"], "init_lora_weights": "orthogonal"},
    "gaussian": {"target_modules": ["q"], "init_lora_weights": "gaussian"},
    "eva": {"target_modules": ["q"], "init_lora_weights": "eva"},
    "default start": {"target_modules": ["q"], "init_lora_weights": True},
    "dropout": {"target_modules": LINEAR, "lora_dropout": 0.3},
    "DoRA, rank-stabilized": {"target_modules": LINEAR, "use_dora": True, "use_rslora": True},
    "layers": {"target_modules": ["down", "up"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "names": {"target_modules": ["layers.1.down", "q"], "exclude_modules": r".*\.up"},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_adapter_made_by_peft_loads_here_with_equal_logits(config, tmp_path):
    defaults = {"r": 2, "lora_alpha": 3, "init_lora_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch_peft.get_peft_model(Net(), torch_peft.LoraConfig(**(defaults | config)))
        random = np.random.default_rng(5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                change = 0.3 * random.standard_normal(parameter.shape).astype(np.float32)
                parameter.data += torch.from_numpy(change)
        model.save_pretrained(tmp_path)
    adapter = peft.load(tmp_path, MAPPING, PARAMS)
    near(lj.lora(net)(PARAMS, adapter, TOKENS), torch_logits(model))
    assert np.abs(torch_logits(model) - torch_logits(Net())).max() > 0.05


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("variant", [lj.LoRA(rank=2, alpha=3), lj.DoRA(rank=2, alpha=3)], ids=["LoRA", "DoRA"])
def test_convolutions_load_in_peft_with_equal_results(dimensions, variant, tmp_path):
    kernel = random_array(*range(2, 2 + dimensions), 4, 5, seed=0)
    x = random_array(2, *(5,) * dimensions, 4, seed=1)
    spatial = "DHW"[:dimensions]

    def apply(params, x):
        numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
        return jax.lax.conv_general_dilated(x, params["kernel"], (1,) * dimensions, "VALID", dimension_numbers=numbers)

    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            make = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
            self.layer = make(4, 5, kernel.shape[:-2], bias=False)
            axes = (dimensions + 1, dimensions, *range(dimensions))
            self.layer.weight.data = torch.from_numpy(kernel.transpose(axes).copy())

        def forward(self, x):
            return self.layer(x)

    params, mapping = {"kernel": kernel}, {"kernel": peft.conv("layer")}
    spec = {"kernel": dataclasses.replace(variant, axes="i" * (dimensions + 1) + "o")}
    adapter = randomized(lj.init(jax.random.key(0), params, spec))
    peft.export(tmp_path, adapter, mapping, base=params)
    model = load_in_peft(Conv(), tmp_path)
    expected = np.moveaxis(np.asarray(lj.lora(apply)(params, adapter, x)), -1, 1)
    near(torch_logits(model, np.moveaxis(x, -1, 1).copy()), expected)


@pytest.mark.parametrize("make", [lj.LoRA, lj.RSLoRA, lj.DoRA])
def test_a_module_that_fuses_leaves_loads_in_peft(make, tmp_path):
    spec = make(rank=2, alpha=3)
    names = ["query", "key", "value"] if make is lj.DoRA else ["query", "value"]  # PEFT has magnitudes of all outputs
    params = {name: random_array(6, 4, seed=at) for at, name in enumerate(("query", "key", "value"))}
    mapping = {name: peft.linear(peft.Part("qkv", of=(4 * at, 12))) for at, name in enumerate(params)}

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(6, 12, bias=False)
            self.qkv.weight.data = torch.from_numpy(np.concatenate(list(params.values()), axis=1).T.copy())

        def forward(self, x):
            return torch.tanh(self.qkv(x))

    def apply(params, x):
        return jnp.tanh(jnp.concatenate([x @ params[name] for name in ("query", "key", "value")], axis=-1))

    x = random_array(3, 6, seed=9)
    adapter = randomized(lj.init(jax.random.key(0), params, dict.fromkeys(names, spec)))
    if make is not lj.DoRA:
        other = randomized(lj.init(jax.random.key(0), params, {"value": dataclasses.replace(spec, rank=1, alpha=5)}))
        adapter |= other
    peft.export(tmp_path, adapter, mapping, base=params)
    expected = lj.lora(apply)(params, adapter, x)
    near(torch_logits(load_in_peft(Fused(), tmp_path), x), expected)
    near(lj.lora(apply)(params, peft.load(tmp_path, mapping, params), x), expected)


VERA = lj.VeRA(rank=5, seed=3)


def test_vera_loads_in_peft_with_equal_logits(tmp_path):
    spec = {name: dataclasses.replace(VERA, axes=AXES.get(name)) for name in ("out", "down", "head")}
    adapter = randomized(lj.init(jax.random.key(0), PARAMS, spec | {"norm": lj.Full()}))
    peft.export(tmp_path, adapter, MAPPING, base=PARAMS)
    expected = lj.lora(net)(PARAMS, adapter, TOKENS)
    near(torch_logits(load_in_peft(Net(), tmp_path)), expected)
    back = peft.load(tmp_path, MAPPING, PARAMS)
    assert back["down"].variant == VERA
    near(lj.lora(net)(PARAMS, back, TOKENS), expected)


def test_vera_made_by_peft_loads_here_as_lora_with_equal_logits(tmp_path):
    config = torch_peft.VeraConfig(r=5, target_modules=LINEAR, modules_to_save=["norm"])
    model = torch_peft.get_peft_model(Net(), config)
    random = np.random.default_rng(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.from_numpy(0.5 * random.standard_normal(parameter.shape).astype(np.float32))
    model.save_pretrained(tmp_path)
    adapter = peft.load(tmp_path, MAPPING, PARAMS)
    near(lj.lora(net)(PARAMS, adapter, TOKENS), torch_logits(model))
    assert np.abs(torch_logits(model) - torch_logits(Net())).max() > 0.05


# Presets


SIZES = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = {"vocab_size": 31, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 16}
WORD_IDS = np.random.default_rng(2).integers(3, 31, (4, 5))


def llama_pair(scanned):
    """The example's Llama and that of `transformers`, with the same weights."""
    sizes = smollm2.Sizes(vocabulary=31, d_model=16, layers=2, heads=4, kv_heads=2, d_mlp=24, theta=1e4)
    model = smollm2.Llama(sizes, scanned=scanned, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    config = transformers.LlamaConfig(
        **WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=sizes.epsilon,
        tie_word_embeddings=True,
    )
    other = transformers.LlamaForCausalLM(config)
    state = {"model.embed_tokens.weight": model.embed.embedding, "model.norm.weight": model.norm.scale}
    names = {
        "attention/query/kernel": "self_attn.q_proj",
        "attention/key/kernel": "self_attn.k_proj",
        "attention/value/kernel": "self_attn.v_proj",
        "attention/out/kernel": "self_attn.o_proj",
        "mlp/gate/kernel": "mlp.gate_proj",
        "mlp/up/kernel": "mlp.up_proj",
        "mlp/down/kernel": "mlp.down_proj",
        "attention_norm/scale": "input_layernorm",
        "mlp_norm/scale": "post_attention_layernorm",
    }
    for path, name in names.items():
        for i in range(2):
            layer, *rest = (model.layers if scanned else model.layers[i]), *path.split("/")
            for key in rest:
                layer = getattr(layer, key)
            array = np.asarray(layer[...])
            state[f"model.layers.{i}.{name}.weight"] = (array[i] if scanned else array).T
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
    other.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    return lambda params, ids: nnx.merge(graph, params)(ids), params, other


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("table", [None, lj.LoRA(rank=2, alpha=5), lj.Rows(ids=(4, 9)), lj.Full()], ids=str)
def test_the_llama_of_the_example_loads_in_peft(scanned, table, tmp_path):
    apply, params, model = llama_pair(scanned)
    near(torch_logits(model, WORD_IDS), apply(params, WORD_IDS))
    variant = lj.LoRA(rank=3, alpha=6)
    spec = {lj.targets.all_linear: variant}
    if table is not None:
        spec[lj.targets.embeddings] = table
    adapted, adapter = lj.adapt(apply, params, spec, WORD_IDS, key=jax.random.key(0))
    adapter = randomized(adapter)
    peft.export(tmp_path, adapter, peft.presets.smollm2(), base=params, task_type="CAUSAL_LM")
    model = load_in_peft(model, tmp_path)
    expected = adapted(params, adapter, WORD_IDS)
    near(torch_logits(model, WORD_IDS), expected)
    back = peft.load(tmp_path, peft.presets.smollm2(), params)
    near(adapted(params, back, WORD_IDS), expected)


def flax_tree(model):
    """The parameters of a torch model under the names and in the shapes of its Flax model in `transformers` 4."""
    flat = {}
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy().copy()
        *path, last = name.split(".")
        if last == "weight" and array.ndim == 2 and any(word in path[-1] for word in ("embed", "wte", "wpe")):
            last = "embedding"
        elif last == "weight" and array.ndim == 1:
            last = "scale"
        elif last == "weight":
            last, array = "kernel", array.transpose(*range(2, array.ndim), 1, 0)
        flat["/".join([*path, last])] = array
    return flat


OLD_VIT = {
    "attention/q_proj": "attention/attention/query",
    "attention/k_proj": "attention/attention/key",
    "attention/v_proj": "attention/attention/value",
    "attention/o_proj": "attention/output/dense",
    "mlp/fc1": "intermediate/dense",
    "mlp/fc2": "output/dense",
    "vit/layers": "vit/encoder/layer",
}


def old_name(path):
    for new, old in OLD_VIT.items():
        path = path.replace(new, old)
    return path


IMAGES, SOUND = random_array(2, 3, 8, 8, seed=3), random_array(4, 4, 12, seed=4)
MORE = {
    "clip": {"pixel_values": torch.from_numpy(IMAGES)},
    "whisper": {"decoder_input_ids": torch.from_numpy(WORD_IDS)},
}


def preset_case(name):
    if name == "bert":
        model = transformers.BertForMaskedLM(transformers.BertConfig(**WORDS, **SIZES))
        return model, flax_tree(model), peft.presets.bert(), WORD_IDS, "**/word_embeddings/embedding"
    if name == "roberta":
        model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**WORDS, **SIZES))
        return model, flax_tree(model), peft.presets.roberta(head=None), WORD_IDS, None
    if name == "gpt2":
        config = transformers.GPT2Config(n_positions=8, n_embd=12, n_layer=2, n_head=2, vocab_size=31)
        model = transformers.GPT2LMHeadModel(config)
        return model, flax_tree(model), peft.presets.gpt2(), WORD_IDS, "**/wte/embedding"
    if name == "clip":
        images = {"image_size": 8, "patch_size": 4}
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=WORDS | SIZES, vision_config=images | SIZES))
        return model, flax_tree(model), peft.presets.clip(), WORD_IDS, "**/token_embedding/embedding"
    if name == "whisper":
        sizes = {f"{part}_{key}": 2 for part in ("encoder", "decoder") for key in ("layers", "attention_heads")}
        sizes |= {"num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 8, "d_model": 12}
        config = transformers.WhisperConfig(decoder_start_token_id=1, **sizes, **WORDS)
        model = transformers.WhisperForConditionalGeneration(config)
        return model, flax_tree(model), peft.presets.whisper(), SOUND, "**/embed_tokens/embedding"
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(num_labels=3, image_size=8, patch_size=4, **SIZES)
    )
    tree = {old_name(path): array for path, array in flax_tree(model).items()}
    return model, tree, peft.presets.vit(), IMAGES, None


@pytest.mark.parametrize("name", ["clip", "whisper"])
def test_a_preset_names_the_modules_of_the_torch_model(name):
    model, tree, mapping, *_ = preset_case(name)
    rows, named = compiled(mapping), set()
    for path, array in tree.items():
        if (found := find(path, rows)) is not None:
            named |= {tensor_of(site) for site in sites(path, array.shape, found)}
    assert named == {parameter for parameter, _ in model.named_parameters()}


def with_values(model, tree):
    """The torch model with the values of a Flax tree: the inverse of `flax_tree`."""
    state, paths = {}, set()
    for name, parameter in model.named_parameters():
        path = next(path for path in flax_tree_names(name, parameter) if path in tree)
        paths.add(path)
        array = np.asarray(tree[path])
        if path.endswith("kernel"):
            array = np.moveaxis(array, (-1, -2), (0, 1))
        state[name] = torch.from_numpy(array.copy())
    assert paths == set(tree)
    model.load_state_dict(state, strict=False)
    return model


def flax_tree_names(name, parameter):
    class One(nn.Module):
        def named_parameters(self):
            return [(name, parameter)]

    return [name for path in flax_tree(One()) for name in (path, old_name(path))]


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "vit", "clip", "whisper"])
@pytest.mark.parametrize("make", [lj.LoRA, lj.DoRA])
def test_a_preset_of_hugging_face_loads_in_peft(name, make, tmp_path):
    check_preset(name, make, lj.LoRA(rank=2, alpha=4) if make is lj.LoRA else None, tmp_path)


@pytest.mark.parametrize("table", [lj.Full(), lj.Rows(ids=(4, 9))], ids=str)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_tied_table_of_a_preset_loads_in_peft(name, table, tmp_path):
    check_preset(name, lj.LoRA, table, tmp_path)


def check_preset(name, make, variant, tmp_path):
    """The logits of PEFT with the file are those of the torch model with the merged kernels."""
    torch.manual_seed(0)
    model, params, mapping, x, table = preset_case(name)
    axes = {"axes": "oi"} if name == "gpt2" else {}
    spec = {"**/{projection,patch_embedding}/kernel": make(rank=2, alpha=3, axes="iiio")}
    spec = {"vit": spec, "clip": spec, "whisper": {"**/conv*/kernel": None}}.get(name, {})  # Whisper reads strides
    spec |= {"classifier/**": lj.Full()} if name == "vit" else {}
    spec |= {"**/kernel": make(rank=2, alpha=4, **axes)}
    spec |= {table: variant} if table and variant else {}
    adapter = randomized(lj.init(jax.random.key(0), params, spec))
    merged = lj.merge(params, adapter)
    peft.export(tmp_path, adapter, mapping, base=params)
    more = MORE.get(name, {})
    got = torch_logits(load_in_peft(model, tmp_path), x, **more)
    near(got, torch_logits(with_values(preset_case(name)[0], merged), x, **more))
    back = peft.load(tmp_path, mapping, params)
    assert set(back) == set(adapter)
    for path, part in adapter.items():
        for one, other in zip(jax.tree.leaves(back[path]), jax.tree.leaves(part), strict=True):
            near(one, other, 1e-6)
