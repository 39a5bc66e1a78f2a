"""Trees with the names and shapes of Bonsai's models, from torch models. Bonsai is not on the package index.

The names, transposes and shapes are those of `bonsai/models/*/params.py` of https://github.com/jax-ml/bonsai.
"""

import numpy as np
import torch
import transformers
from tunix_models import SIZES, WORDS, randomized_torch, torch_model

from lora_jax import peft

HEADS = {"q_proj": (16, 4, 6), "k_proj": (16, 2, 6), "v_proj": (16, 2, 6), "o_proj": (4, 6, 16)}


def bonsai_case(name):
    """The mapping, the tree and the torch model."""
    model = gemma3() if name == "gemma3" else torch_model(name, 2, tied=name == "llama3")
    tree = {bonsai_path(name, parameter): to_bonsai(name, parameter, tensor) for parameter, tensor in tensors(model)}
    return getattr(peft.presets, f"bonsai_{name}")(), tree, model


def gemma3():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    ropes = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}
    config = transformers.Gemma3Config(
        text_config=WORDS | SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": ropes},
        vision_config=sizes | {"image_size": 8, "patch_size": 4, "vision_use_head": False},
        mm_tokens_per_image=1,
        image_token_id=30,
    )
    return randomized_torch(transformers.Gemma3ForConditionalGeneration(config))


def tensors(model):
    """The parameters of a torch model that Bonsai has; `named_parameters` has tied ones once."""
    return [(name, tensor) for name, tensor in model.named_parameters() if "mm_input_projection" not in name]


def bonsai_path(name, parameter):
    path = parameter.removeprefix("model.").replace(".", "/")
    if name == "gemma3":
        path = path.replace("language_model/embed_tokens/weight", "embed_tokens/weight/embedding")
    else:
        path = path.replace("embed_tokens/weight", "embedder/embedding")
        path = "final_norm/weight" if path == "norm/weight" else path
    path = path.replace("self_attn", "attn") if name == "qwen3" else path
    path = path.replace("position_embedding/weight", "position_embedding/embedding")
    return path.replace("/weight", "/scale" if "norm" in path else "/kernel") if path.endswith("/weight") else path


def to_bonsai(name, parameter, tensor):
    array = tensor.detach().numpy()
    if "embed_tokens" in parameter or "position_embedding" in parameter or array.ndim == 1:
        return array.copy()
    array = array.transpose(*range(2, array.ndim), 1, 0)
    heads = HEADS.get(parameter.split(".")[-2]) if name == "qwen3" else None
    return (array if heads is None else array.reshape(heads)).copy()


def with_bonsai_values(name, tree):
    """The torch model with the values of a tree: the inverse of `to_bonsai`."""
    model = bonsai_case(name)[-1]
    for parameter, tensor in tensors(model):
        array = np.asarray(tree[bonsai_path(name, parameter)])
        if tensor.ndim > 1 and "embed" not in parameter.split(".")[-2].replace("patch_embedding", ""):
            array = array.reshape((*array.shape[:-2], *tensor.shape[1::-1]) if tensor.ndim > 2 else tensor.shape[::-1])
            array = np.moveaxis(array, (-1, -2), (0, 1))
        tensor.data = torch.from_numpy(array.copy())
    return model
