"""Small models that `transformers` has, or had, for both frameworks, and weights of torch as a JAX tree."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from lora_jax._core.paths import flatten, unflatten
from lora_jax.peft._layout import outputs_from_torch
from lora_jax.peft._names import from_torch
from lora_jax.peft._sites import compiled, find, sites, without_own_heads

_WORDS = {"vocab_size": 31, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_TEXT = _WORDS | _SIZES | {"max_position_embeddings": 16}
_IMAGE = _SIZES | {"image_size": 8, "patch_size": 4}
_PARTS = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in (("layers", 1), ("ffn_dim", 16))}
_SOUND = {"d_model": 12, "num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 8}

# The configuration and its values, the model, and the modules that have an adapter.
MODELS: dict[str, tuple[str, dict[str, Any], str, list[str]]] = {
    "bert": ("BertConfig", _TEXT, "BertForMaskedLM", ["query", "key", "value", "dense"]),
    "roberta": ("RobertaConfig", _TEXT, "RobertaForSequenceClassification", ["query", "value", "dense", "out_proj"]),
    "gpt2": (
        "GPT2Config",
        _WORDS | {"n_positions": 8, "n_embd": 12, "n_layer": 1, "n_head": 2},
        "GPT2LMHeadModel",
        ["c_attn", "c_proj", "c_fc"],
    ),
    "vit": (
        "ViTConfig",
        _IMAGE | {"num_labels": 3},
        "ViTForImageClassification",
        ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "projection", "classifier"],
    ),
    "clip": (
        "CLIPConfig",
        {"text_config": _TEXT, "vision_config": _IMAGE, "projection_dim": 8},
        "CLIPModel",
        ["q_proj", "k_proj", "out_proj", "fc1", "fc2", "patch_embedding", "visual_projection", "text_projection"],
    ),
    "bart": (
        "BartConfig",
        _WORDS
        | _PARTS
        | {"d_model": 12, "max_position_embeddings": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        | {"decoder_start_token_id": 1, "forced_eos_token_id": None},
        "BartForConditionalGeneration",
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    ),
    "whisper": (
        "WhisperConfig",
        _WORDS
        | _SOUND
        | _PARTS
        | {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
        | {"decoder_start_token_id": 1},
        "WhisperForConditionalGeneration",
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],  # Whisper reads the strides of its convolutions
    ),
}


def config(hf: Any, name: str) -> Any:
    """The configuration of a model, for the installed version of `transformers`."""
    kind, values, *_ = MODELS[name]
    return getattr(hf, kind)(**values)


def inputs(name: str) -> list[Any]:
    """Words, an image, or sound and words."""
    rng = np.random.default_rng(0)
    ids, images, sound = rng.integers(3, 31, (2, 5)), rng.standard_normal((2, 3, 8, 8)), rng.standard_normal((2, 4, 12))
    arrays = {"vit": [images], "clip": [ids, images], "whisper": [sound, ids]}.get(name, [ids])
    return [array.astype(np.int64 if array.dtype == ids.dtype else np.float32) for array in arrays]


def with_torch_values(params: Any, mapping: Any, state: dict[str, Any]) -> Any:
    """The tree with the values of a torch model, moved through a mapping; leaves without a row have torch's names."""
    leaves, treedef = flatten(params)
    rows, found = without_own_heads(compiled(mapping), leaves), {}
    for path, leaf in leaves.items():
        if (row := find(path, rows)) is None:
            name = re.sub(r"\.embedding$", ".weight", path.replace("/", "."))
            found[path] = np.asarray(state[name], np.float32)
            assert found[path].shape == leaf.shape, path
            continue
        places = sites(path, leaf.shape, row)
        assert not isinstance(places, str), places
        kind, layout = "vector" if row.row.kind == "vector" else "kernel", places[0].layout
        result = layout.to_matrix(kind, np.zeros(leaf.shape, np.float32))
        for site in places:
            tensor = np.asarray(state[f"{site.module}.{row.row.parameter}".removeprefix(".")], np.float32)
            matrix = outputs_from_torch(from_torch(f"saved.{row.row.parameter}", tensor, layout), site.part)
            result[(*site.index, ..., site.outputs)] = matrix
        found[path] = layout.from_matrix(kind, result)
    return unflatten(treedef, found)
