"""Unmodified models of `transformers` for Flax, with random weights and small configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import pytest

from .model import LORA, Model, Spec, framework

hf = framework("transformers")
if not hasattr(hf, "FlaxPreTrainedModel"):
    pytest.skip("needs transformers<5, which has Flax models", allow_module_level=True)

EVERY_KERNEL = {"**/kernel": LORA}
WORDS = {"vocab_size": 31, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
IMAGES = {"image_size": 8, "patch_size": 4}


def random_params(model: Any, key: jax.Array) -> Any:
    """Weights of the model's initialization."""
    return jax.jit(model.init_weights, static_argnums=1)(key, model.input_shape)


def sentences(key: jax.Array) -> jax.Array:
    return jax.random.randint(key, (8, 5), 3, 31)


def images(key: jax.Array, size: int = 8) -> jax.Array:
    return jax.random.normal(key, (8, 3, size, size))


def language_model(model: Any, key: jax.Array, spec: Spec) -> Model:
    return Model(
        lambda params, ids: model(ids, params=params).logits, random_params(model, key), (sentences(key),), spec
    )


def gpt2(key: jax.Array) -> Model:
    """Kernels are (out, in); query, key and value are fused; the embedding is the head."""
    config = hf.GPT2Config(n_positions=8, n_embd=12, n_layer=1, n_head=2, **WORDS)
    return language_model(
        hf.FlaxGPT2LMHeadModel(config, _do_init=False), key, EVERY_KERNEL | {"**/wte/embedding": LORA}
    )


def llama(key: jax.Array) -> Model:
    """Grouped queries: two heads share one key and value."""
    config = hf.LlamaConfig(num_key_value_heads=1, **WORDS, **SIZES | {"hidden_size": 16})
    return language_model(hf.FlaxLlamaForCausalLM(config, _do_init=False), key, EVERY_KERNEL)


def bert(key: jax.Array) -> Model:
    """In training, with dropout; the embedding is also the decoder's kernel."""
    model = hf.FlaxBertForMaskedLM(hf.BertConfig(**WORDS, **SIZES), _do_init=False)

    def apply(params: Any, ids: jax.Array, key: jax.Array) -> jax.Array:
        return model(ids, params=params, train=True, dropout_rng=key).logits

    spec = EVERY_KERNEL | {"**/word_embeddings/embedding": LORA}
    return Model(apply, random_params(model, key), (sentences(key), key), spec)


def roberta(key: jax.Array) -> Model:
    model = hf.FlaxRobertaForSequenceClassification(hf.RobertaConfig(**WORDS, **SIZES), _do_init=False)
    return language_model(model, key, EVERY_KERNEL)


def vit(key: jax.Array) -> Model:
    model = hf.FlaxViTForImageClassification(hf.ViTConfig(num_labels=3, **IMAGES, **SIZES), _do_init=False)
    return Model(
        lambda params, x: model(x, params=params).logits, random_params(model, key), (images(key),), EVERY_KERNEL
    )


def whisper(key: jax.Array) -> Model:
    """Sound in, text out; the encoder begins with convolutions."""
    sizes = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
    config = hf.WhisperConfig(
        d_model=12,
        num_mel_bins=4,
        max_source_positions=6,
        max_target_positions=8,
        decoder_start_token_id=1,
        **{f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in sizes.items()},
        **WORDS,
    )
    model = hf.FlaxWhisperForConditionalGeneration(config, input_shape=(1, 4, 12), _do_init=False)

    def apply(params: Any, sound: jax.Array, ids: jax.Array) -> jax.Array:
        return model(sound, decoder_input_ids=ids, params=params).logits

    sound = jax.random.normal(key, (8, 4, 12))
    return Model(apply, random_params(model, key), (sound, sentences(key)), EVERY_KERNEL)


def clip(key: jax.Array) -> Model:
    """A text and an image encoder; the similarities are scaled by a parameter."""
    config = hf.CLIPConfig(text_config=WORDS | SIZES, vision_config=IMAGES | SIZES, projection_dim=8)
    model = hf.FlaxCLIPModel(config, input_shape=((1, 5), (1, 8, 8, 3)), _do_init=False)

    def apply(params: Any, ids: jax.Array, images: jax.Array) -> jax.Array:
        return model(ids, images, params=params).logits_per_image

    return Model(apply, random_params(model, key), (sentences(key), images(key)), EVERY_KERNEL)


def resnet(key: jax.Array) -> Model:
    """In training: the running statistics are part of the result."""
    config = hf.ResNetConfig(embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    model = hf.FlaxResNetForImageClassification(config, input_shape=(1, 16, 16, 3), _do_init=False)

    def apply(params: Any, x: jax.Array) -> Any:
        out, stats = model(x, params=params, train=True)
        return out.logits, stats

    return Model(apply, random_params(model, key), (images(key, 16),), EVERY_KERNEL)


MODELS: dict[str, Callable[[jax.Array], Model]] = {
    make.__name__: make for make in (gpt2, llama, bert, roberta, vit, whisper, clip, resnet)
}
