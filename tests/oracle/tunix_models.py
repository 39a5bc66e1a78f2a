"""Small models of Tunix and of `transformers` with the same weights."""

import functools
import importlib.util
import sys
import types
import warnings

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from torch_pairs import with_torch_values

import lora_jax as lj
from lora_jax import peft

WORDS = {"vocab_size": 31, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 16}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 6, "rms_norm_eps": 1e-6}
WORD_IDS = np.random.default_rng(2).integers(3, 31, (4, 5))


def tunix_model(name):
    """A module of Tunix's models. `import tunix` would import its trainers, which need many more packages."""
    if "tunix" not in sys.modules:
        package = types.ModuleType("tunix")
        package.__path__ = list(importlib.util.find_spec("tunix").submodule_search_locations)
        sys.modules["tunix"] = package
    return importlib.import_module(f"tunix.models.{name}.model")


def as_tunix(function):
    """Ignores that Tunix uses names which JAX and Flax have deprecated."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return function(*args, **kwargs)

    return wrapped


ROPE = {"rope_type": "default", "rope_theta": 1_000_000}  # Tunix's Llama and Qwen have no other
LOCAL = ROPE | {"rope_theta": 10_000}
GEMMA = {"query_pre_attn_scalar": 6, "sliding_window": 4, "hidden_activation": "gelu_pytorch_tanh"}


@as_tunix
def tunix_case(name, kv_heads=2, tied=True):
    """The mapping, the function and parameters of Tunix's model, and the torch model, with equal random weights."""
    heads = {"num_heads": 4, "num_kv_heads": kv_heads, "head_dim": 6}
    module = tunix_model("gemma" if name == "gemma1" else name)
    net, config = MODELS[name](module, {"num_layers": 2, "embed_dim": 16, "hidden_dim": 24, **heads}, tied)
    other = torch_model(name, kv_heads, tied)
    call, params, rest = lj.nnx.functional(net(config, rngs=nnx.Rngs(0)))
    mapping = getattr(peft.presets, PRESETS[name])()
    return mapping, apply_of(call, rest), with_torch_values(params, mapping, other.state_dict()), other


def llama3(module, sizes, tied):
    config = module.ModelConfig(vocab_size=31, norm_eps=1e-6, rope_theta=1_000_000, weight_tying=tied, **sizes)
    return module.Llama3, config


def qwen(module, sizes, tied):
    net = module.Qwen2 if module.__name__.split(".")[-2] == "qwen2" else module.Qwen3
    options = {"vocab_size": 31, "norm_eps": 1e-6, "rope_theta": 1_000_000, "use_tied_embedding": tied}
    return net, module.ModelConfig(**options, **sizes)


def gemma(module, sizes, tied):
    options = {"final_logit_softcap": 30.0, "attn_logits_soft_cap": 50.0, "sliding_window_size": 4}
    options |= {"use_post_attn_norm": True, "use_post_ffw_norm": True}
    kinds = (module.AttentionType.LOCAL_SLIDING, module.AttentionType.GLOBAL)
    return module.Gemma, module.ModelConfig(num_embed=31, attention_types=kinds, **options, **sizes)


def gemma1(module, sizes, tied):
    options = {"final_logit_softcap": None, "use_post_attn_norm": False, "use_post_ffw_norm": False}
    kinds = (module.AttentionType.GLOBAL,) * 2
    return module.Gemma, module.ModelConfig(num_embed=31, attention_types=kinds, **options, **sizes)


def gemma3(module, sizes, tied):
    return module.Gemma3, module.ModelConfig(num_embed=31, sliding_window_size=4, param_dtype=jnp.float32, **sizes)


MODELS = {"llama3": llama3, "qwen2": qwen, "qwen3": qwen, "gemma1": gemma1, "gemma": gemma, "gemma3": gemma3}
PRESETS = {"llama3": "tunix_llama3", "qwen2": "tunix_llama3", "qwen3": "tunix_qwen3"}
PRESETS |= {"gemma1": "tunix_gemma1", "gemma": "tunix_gemma2", "gemma3": "tunix_gemma3"}
TORCH = {
    "llama3": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma1": "Gemma",
    "gemma": "Gemma2",
    "gemma3": "Gemma3",
}


def torch_model(name, kv_heads, tied):
    options = WORDS | SIZES | {"num_attention_heads": 4, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    if name == "gemma":
        options |= GEMMA | {"rope_parameters": LOCAL}
    elif name == "gemma1":
        options |= {"rope_parameters": LOCAL}
    elif name == "gemma3":
        ropes = {kind: LOCAL for kind in ("sliding_attention", "full_attention")}
        options |= GEMMA | {"rope_parameters": ropes, "layer_types": ["sliding_attention"] * 2}
    else:
        options |= {"rope_parameters": ROPE}
    config = "Gemma3TextConfig" if name == "gemma3" else f"{TORCH[name]}Config"
    config = getattr(transformers, config)(attn_implementation="eager", **options)
    return randomized_torch(getattr(transformers, f"{TORCH[name]}ForCausalLM")(config))


def randomized_torch(model):
    """The model with the same random values each time, also of the scales of norms."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.2 if parameter.ndim > 1 else 0.1
            mean = 1 if parameter.ndim == 1 and not type(model).__name__.startswith("Gemma") else 0
            parameter.copy_(mean + size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def apply_of(call, rest):
    """The module as `apply(params, ids)`, with a causal mask and without a cache."""

    @as_tunix
    def apply(params, ids):
        length = ids.shape[1]
        positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (ids.shape[0], length, length))
        (logits, _), _ = call(params, rest, jnp.asarray(ids), positions, None, mask)
        return logits

    return apply
