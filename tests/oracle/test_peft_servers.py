"""Loads exports in diffusers and in mlx-lm, and runs vLLM's checks on them; `make test-oracle`."""

import importlib.util
import logging
import sys
import types

import diffusers
import jax.numpy as jnp
import mlx.core as mlx
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.utils import load_adapters
from peft import get_peft_model_state_dict

import lora_jax as lj
from lora_jax import peft


def random_array(*shape, seed):
    return (np.random.default_rng(seed).standard_normal(shape) / 3).astype(np.float32)


def adapter_of(params, variant):
    """An adapter of all kernels with random arrays; magnitudes are near the norms of the kernels."""
    adapter = {}
    for at, (path, leaf) in enumerate(params.items()):
        own = variant(path, leaf)
        shapes = own.shapes(leaf.shape, own.axes)
        arrays = {name: random_array(*shape, seed=10 * at + i) for i, (name, shape) in enumerate(shapes.items())}
        if "magnitude" in arrays:
            norms = np.sqrt((np.asarray(leaf) ** 2).sum(tuple(range(leaf.ndim - 1))))
            arrays["magnitude"] = norms * (1 + arrays["magnitude"])
        adapter[path] = lj.Adapter(own, own.axes, **{name: jnp.asarray(array) for name, array in arrays.items()})
    return adapter


def near(got, expected, tolerance=1e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


def axes_of(path, leaf):
    return "i" * (leaf.ndim - 1) + "o"


def unequal(path, leaf):
    at = sum(map(ord, path))
    make = lj.RSLoRA if at % 2 else lj.LoRA
    return make(rank=1 + at % 3, alpha=2 + at % 5, axes=axes_of(path, leaf))


def one_alpha(path, leaf):
    """Unequal ranks. diffusers 0.42 does not find the modules of unequal α in a file of kohya."""
    return lj.LoRA(rank=1 + sum(map(ord, path)) % 3, alpha=3, axes=axes_of(path, leaf))


def dora(path, leaf):
    return lj.DoRA(rank=1 + sum(map(ord, path)) % 3, alpha=3, axes=axes_of(path, leaf))


def bits(adapter):
    return {
        path: (str(part.variant), *(np.asarray(x).tobytes() for x in part.arrays.values()))
        for path, part in adapter.items()
    }


# diffusers

PIPELINE = diffusers.loaders.StableDiffusionLoraLoaderMixin
KINDS, ADAPTED = (
    (torch.nn.Linear, torch.nn.Conv2d),
    ("conv_in", "time_embedding", "down_blocks.0", "up_blocks.1.resnets"),
)


def unet():
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
    return diffusers.UNet2DConditionModel(
        **sizes,
        in_channels=3,
        out_channels=3,
        cross_attention_dim=6,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def run(model):
    x, context = (torch.from_numpy(random_array(*shape, seed=9)) for shape in ((2, 3, 8, 8), (2, 5, 6)))
    with torch.no_grad():
        return model(x, 7, encoder_hidden_states=context).sample.numpy()


def ours(model, adapted=ADAPTED):
    """The kernels of a torch model with our axes, and the mapping."""
    params, mapping = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, KINDS) and name.startswith(adapted):
            weight = module.weight.detach().numpy()
            is_conv = weight.ndim == 4
            params[name.replace(".", "/")] = jnp.asarray(weight.transpose(2, 3, 1, 0) if is_conv else weight.T)
            mapping[name.replace(".", "/")] = peft.conv(name) if is_conv else peft.linear(name)
    return params, mapping


def with_kernels(model, params):
    """The model with dense kernels in place of its own."""
    weights = {}
    for path, kernel in params.items():
        kernel = np.asarray(kernel)
        weights[path.replace("/", ".") + ".weight"] = torch.from_numpy(
            (kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T).copy()
        )
    model.load_state_dict(weights, strict=False)
    return model


@pytest.mark.parametrize("variant", [unequal, dora])
def test_diffusers_loads_an_export_and_saves_it(variant, tmp_path, caplog):
    model = unet()
    params, mapping = ours(model)
    adapter = adapter_of(params, variant)
    expected = run(with_kernels(unet(), lj.merge(params, adapter)))
    assert np.abs(expected - run(model)).max() > 0.05
    peft.export(tmp_path / "diffusers", adapter, mapping, base=params, for_server="diffusers", component="unet")
    diffusers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        model.load_lora_adapter(tmp_path / "diffusers", prefix="unet", use_safetensors=True)
    assert not caplog.records
    near(run(model), expected)
    without = unet()
    tensors = safetensors.torch.load_file(tmp_path / "diffusers" / "pytorch_lora_weights.safetensors")
    without.load_lora_adapter(tensors, prefix="unet")  # without the metadata
    near(run(without), expected)
    # what diffusers saves is read back
    layers, metadata = (
        get_peft_model_state_dict(model, adapter_name="default_0"),
        model.peft_config["default_0"].to_dict(),
    )
    PIPELINE.save_lora_weights(tmp_path / "saved", unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    peft.convert(tmp_path / "saved", tmp_path / "peft", to="peft")
    back = lj.merge(params, peft.load(tmp_path / "peft", mapping, params))
    near(run(with_kernels(unet(), back)), expected)


def test_diffusers_loads_a_file_of_kohya(tmp_path, caplog):
    model = unet()
    params, mapping = ours(model)
    adapter = adapter_of(params, one_alpha)
    expected = run(with_kernels(unet(), lj.merge(params, adapter)))
    peft.export(tmp_path, adapter, mapping, base=params)
    file = peft.convert(tmp_path, tmp_path / "lora.safetensors", to="kohya", component="unet")
    with caplog.at_level(logging.WARNING):
        state, alphas = PIPELINE.lora_state_dict(file)
        model.load_lora_adapter(state, network_alphas=alphas, prefix="unet")
    assert not caplog.records
    near(run(model), expected)
    names = [name for name, _ in model.named_modules()]
    peft.convert(file, tmp_path / "back", to="peft", modules=names)
    assert bits(peft.load(tmp_path / "back", mapping, params)) == bits(peft.load(tmp_path, mapping, params))


def test_diffusers_loads_an_export_into_a_text_encoder(tmp_path, caplog):
    sizes = {"hidden_size": 12, "intermediate_size": 10, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.CLIPTextConfig(
        vocab_size=11, max_position_embeddings=8, **sizes, eos_token_id=10, bos_token_id=9
    )

    def encoder():
        torch.manual_seed(0)
        return transformers.CLIPTextModel(config).eval()

    def run(model):
        with torch.no_grad():
            return model(torch.arange(12).reshape(2, 6) % 11).last_hidden_state.numpy()

    params, mapping = ours(encoder(), ("",))
    adapter = adapter_of(params, unequal)
    expected = run(with_kernels(encoder(), lj.merge(params, adapter)))
    peft.export(tmp_path, adapter, mapping, base=params, for_server="diffusers", component="text_encoder")
    model = encoder()
    with caplog.at_level(logging.WARNING):
        state, alphas, metadata = PIPELINE.lora_state_dict(tmp_path, use_safetensors=True, return_lora_metadata=True)
        PIPELINE.load_lora_into_text_encoder(state, alphas, model, metadata=metadata)
    assert not caplog.records
    near(run(model), expected)


# mlx-lm


def llama(tied):
    mlx.random.seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 24, "vocab_size": 11}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied, "rms_norm_eps": 1e-5}
    return Model(ModelArgs(model_type="llama", **sizes, **heads))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", [unequal, dora])
def test_mlx_lm_loads_an_export(variant, tied, tmp_path):
    model, table = llama(tied), "model/embed_tokens"
    params, mapping = {}, {}
    for name, weight in tree_flatten(model.parameters()):
        path = name.removesuffix(".weight").replace(".", "/")
        if "layers.1" not in name and "norm" not in name and (path != table or variant is not dora):
            params[path] = jnp.asarray(np.array(weight)) if path == table else jnp.asarray(np.array(weight).T)
            mapping[path] = peft.linear(name.removesuffix(".weight"))
    mapping[table] = peft.embedding("model.embed_tokens", head="lm_head" if tied else None)
    adapter = adapter_of(params, variant)
    peft.export(tmp_path, adapter, mapping, base=params, for_server="mlx-lm")
    loaded = load_adapters(llama(tied), tmp_path)
    loaded.eval()
    tokens = mlx.array(np.arange(10).reshape(2, 5))
    before = np.array(model(tokens))
    merged = {path.replace("/", ".") + ".weight": kernel for path, kernel in lj.merge(params, adapter).items()}
    dense = {name: np.array(kernel) if "embed" in name else np.array(kernel).T for name, kernel in merged.items()}
    model.load_weights([(name, mlx.array(kernel)) for name, kernel in dense.items()], strict=False)
    expected = np.array(model(tokens))
    near(np.array(loaded(tokens)), expected)
    assert np.abs(expected - before).max() > 0.05


# vLLM: only its checks of the configuration, in one file that needs neither a GPU nor the rest of vLLM


@pytest.fixture
def helper(monkeypatch):
    found = importlib.util.find_spec("vllm")
    if found is None:
        pytest.skip("vLLM is not installed; it is too large for this environment (about 0.5 GB)")
    (folder, *_) = found.submodule_search_locations

    class Silent:
        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    for name, contents in {
        "vllm": {},
        "vllm.config": {},
        "vllm.config.lora": {"LoRAConfig": object},
        "vllm.logger": {"init_logger": lambda name: Silent()},
    }.items():
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("peft_helper", f"{folder}/lora/peft_helper.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "peft_helper", module)
    spec.loader.exec_module(module)
    return module.PEFTHelper


PARAMS = {f"{i}/{name}": jnp.asarray(random_array(6, 6, seed=i)) for i in range(2) for name in ("q", "up")}
PARAMS |= {"score/kernel": jnp.asarray(random_array(6, 3, seed=5)), "score/bias": jnp.zeros(3)}
MAPPING = peft.layer("score", "score") | {"{i}/{name}": peft.linear("model.layers.{i}.{name}")}
LINEAR = [path for path in PARAMS if "score" not in path]


def exported(variants, path, server):
    shapes = {name: variant.shapes(PARAMS[name].shape, "io") for name, variant in variants.items()}
    adapter = {
        name: lj.Adapter(
            variant,
            "io" if variant.needs_axes else "",
            **{array: jnp.asarray(random_array(*shape, seed=3)) for array, shape in shapes[name].items()},
        )
        for name, variant in variants.items()
    }
    peft.export(path, adapter, MAPPING, base=PARAMS, for_server=server)


ACCEPTED = {
    "LoRA": {path: lj.LoRA(rank=4, alpha=8) for path in LINEAR},
    "rsLoRA": {path: lj.RSLoRA(rank=4, alpha=8) for path in LINEAR},
    "unequal": {path: lj.LoRA(rank=1 + at, alpha=2 * at + 1) for at, path in enumerate(LINEAR)},
    "rsLoRA, unequal": {path: lj.RSLoRA(rank=1 + at, alpha=2 * at + 1) for at, path in enumerate(LINEAR)},
    "a classifier": {LINEAR[0]: lj.LoRA(rank=4, alpha=8), "score/kernel": lj.Full(), "score/bias": lj.Full()},
}
REFUSED = {
    "DoRA": {path: lj.DoRA(rank=4, alpha=8) for path in LINEAR},
    "aLoRA": {path: lj.ALoRA(rank=4, alpha=8, invocation=(3,)) for path in LINEAR},
    "a bias of B": {"score/kernel": lj.LoRA(rank=2, alpha=4), "score/bias": lj.LoRABias(scale=2)},
    "a bias": {"score/kernel": lj.LoRA(rank=2, alpha=4), "score/bias": lj.Full()},
    "full": {LINEAR[0]: lj.Full()},
}


@pytest.mark.parametrize("variants", ACCEPTED.values(), ids=ACCEPTED)
def test_vllm_reads_an_export_with_the_ranks_and_scales_of_its_leaves(variants, helper, tmp_path):
    exported(variants, tmp_path, "vllm")
    read = helper.from_local_dir(str(tmp_path), max_position_embeddings=None)
    read.validate_legal(types.SimpleNamespace(max_lora_rank=16))
    for path, variant in variants.items():
        if not isinstance(variant, lj.Full):
            rank, scale = read.get_rank_and_scaling(f"model.layers.{path.replace('/', '.')}")
            assert rank == variant.rank and scale == pytest.approx(variant.scale)


@pytest.mark.parametrize("variants", REFUSED.values(), ids=REFUSED)
def test_vllm_refuses_what_an_export_for_it_refuses(variants, helper, tmp_path):
    with pytest.raises(lj.AdapterError):
        exported(variants, tmp_path, "vllm")
    exported(variants, tmp_path, None)
    with pytest.raises(ValueError, match=r"vLLM|not supported"):
        read = helper.from_local_dir(str(tmp_path), max_position_embeddings=None)
        read.validate_legal(types.SimpleNamespace(max_lora_rank=16))
