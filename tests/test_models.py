"""Unmodified models of `transformers` for Flax obey the laws."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GRADIENT, assert_close, dense, sweep, sweep_except, trained
from law import adapted, normal
from transforms import law, under
from zoo.hugging_face import MODELS, WORDS, hf, sentences
from zoo.model import Model

import lora_jax as lj
import lora_jax._transform.kinds


@functools.cache
def make(name: str) -> tuple[Model, Any]:
    key = jax.random.key(0)
    model = MODELS[name](key)
    kernels = lj.kernels(model.apply, model.params, *model.args)
    return model, jax.jit(lambda key, params: lj.init(key, params, model.spec, kernels=kernels))(key, model.params)


@pytest.mark.parametrize("name", sweep_except(["bert", "gpt2", "llama", "whisper"], MODELS))
def test_the_adapted_model_and_gradients_match_merged_kernels(name: str, key: jax.Array) -> None:
    model, adapter = make(name)
    lj.explain(model.apply, model.params, adapter, *model.args, strict=True)
    start, ((gradient, out), (expected_gradient, expected)) = law(model, adapter, trained(key, adapter), compiled=False)
    assert_close(start[0][1], start[1][1])  # merging a fresh adapter gives the kernels of the base
    assert_close(out, expected)
    assert_close(gradient, expected_gradient, GRADIENT)
    for path, part in gradient.items():
        assert all(float(np.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(part)), path


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("gpt2", "scan"),
        ("llama", "vmap"),
        ("bert", "remat"),
        ("roberta", "jvp"),
        sweep("vit", "scan"),
        sweep("whisper", "jvp"),
        sweep("clip", "remat"),
        sweep("resnet", "vmap"),
    ],
)
def test_a_transformation_of_the_adapted_model_matches_the_merged_model(
    name: str, transform: str, key: jax.Array
) -> None:
    model, adapter = make(name)
    assert_close(*under(transform, model, trained(key, adapter)))


def test_generation_with_an_adapter_matches_the_merged_model(key: jax.Array) -> None:
    config = hf.GPT2Config(n_positions=8, n_embd=12, n_layer=1, n_head=2, **WORDS)
    model = hf.FlaxGPT2LMHeadModel(config, _do_init=False)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), model.params_shape_tree)
    adapter = adapted(params, {"transformer/wte/embedding": "io", "transformer/h/0/attn/c_attn/kernel": "oi"})

    def generate(params: Any, start: jax.Array) -> jax.Array:
        return model.generate(start, params=params, max_length=8).sequences

    start = sentences(key)[:, :3]
    written = jax.jit(lj.lora(generate))(params, adapter, start)
    chex.assert_trees_all_equal(written, jax.jit(dense(generate))(params, adapter, start))
    assert not jnp.array_equal(written, jax.jit(generate)(params, start))


KINDS = {
    "gpt2": {
        "attention": ["transformer/h/0/attn/c_attn/kernel", "transformer/h/0/attn/c_proj/kernel"],
        "mlp": ["transformer/h/0/mlp/c_fc/kernel", "transformer/h/0/mlp/c_proj/kernel"],
        "embedding": ["transformer/wpe/embedding", "transformer/wte/embedding"],
        "norm": [f"transformer/{at}/{name}" for at in ("h/0/ln_1", "h/0/ln_2", "ln_f") for name in ("bias", "scale")],
        "bias": [f"transformer/h/0/{at}/bias" for at in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")],
    },
    "vit": {
        "attention": [
            f"vit/encoder/layer/0/attention/{at}/kernel"
            for at in ("attention/key", "attention/query", "attention/value", "output/dense")
        ],
        "mlp": ["vit/encoder/layer/0/intermediate/dense/kernel", "vit/encoder/layer/0/output/dense/kernel"],
        "head": ["classifier/kernel"],
        "convolution": ["vit/embeddings/patch_embeddings/projection/kernel"],
        "norm": [
            f"vit/{norm}/{name}"
            for norm in ("encoder/layer/0/layernorm_after", "encoder/layer/0/layernorm_before", "layernorm")
            for name in ("bias", "scale")
        ],
        "bias": [
            "classifier/bias",
            "vit/embeddings/patch_embeddings/projection/bias",
            *(
                f"vit/encoder/layer/0/{at}/bias"
                for at in (
                    "attention/attention/key",
                    "attention/attention/query",
                    "attention/attention/value",
                    "attention/output/dense",
                    "intermediate/dense",
                    "output/dense",
                )
            ),
        ],
        None: ["vit/embeddings/cls_token", "vit/embeddings/position_embeddings"],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_leaves_do_not_depend_on_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for names in ("ATTENTION_NAMES", "HEAD_NAMES"):
        monkeypatch.setattr(lora_jax._transform.kinds, names, frozenset())
    model, _ = make(name)
    found: dict[str | None, list[str]] = {}
    for path, kernel in lj.kernels(model.apply, model.params, *model.args).items():
        found.setdefault(kernel.kind, []).append(path)
    assert found == KINDS[name]


@pytest.mark.parametrize("name", ["llama", "bert", "roberta", "whisper", "clip"])
@pytest.mark.sweep
def test_attention_matches_the_names_of_the_leaves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make(name)
    named = {
        path
        for path in lj.kernels(model.apply, model.params, *model.args)
        if path.endswith("/kernel") and {"attention", "self_attn", "encoder_attn"} & set(path.split("/"))
    }
    monkeypatch.setattr(lora_jax._transform.kinds, "ATTENTION_NAMES", frozenset())
    found = lj.kernels(model.apply, model.params, *model.args)
    assert {path for path, kernel in found.items() if kernel.kind == "attention"} == named
