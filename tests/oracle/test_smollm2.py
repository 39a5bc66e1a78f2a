"""Compares the decoder and the tokenizer of the example with `transformers` on the same file; `make test-oracle`.

`transformers` reads the GGUF file by itself, so its layout of the query and key kernels is independent of `smollm2`'s.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import smollm2

PROMPTS = (
    "The",
    "Why is the sky blue?",
    smollm2.chat("What is the capital of France?"),
    "In 1969, three astronauts travelled to the Moon; two of them walked on it. " * 8,
)
MESSAGES = [{"role": "user", "content": "How many legs do 12 spiders have?"}]


@pytest.fixture(scope="module")
def path():
    return smollm2.installed_file(smollm2.DISTRIBUTION, smollm2.WEIGHTS)


@pytest.fixture(scope="module")
def tokenizer():
    return smollm2.load_tokenizer()


@pytest.fixture(scope="module")
def llama(path):
    options = {"gguf_file": path.name, "dtype": torch.float32}
    model = transformers.LlamaForCausalLM.from_pretrained(path.parent, **options).eval()
    assert not model.config.attention_bias and model.config.tie_word_embeddings
    return model


@pytest.fixture(scope="module")
def model():
    return smollm2.load()


def expected_logits(llama, ids):
    with torch.no_grad():
        return llama(torch.tensor([ids])).logits[0].numpy()


def test_logits_equal_transformers(llama, model, tokenizer):
    apply = nnx.jit(lambda model, ids: model(ids))
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        logits = apply(model, jnp.array([ids]))[0]
        assert np.abs(logits - expected_logits(llama, ids)).max() <= 1e-3


def test_cached_logits_of_a_padded_batch_equal_transformers(llama, model, tokenizer):
    rows = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    lengths = np.array([len(row) - 1 for row in rows])  # without the last token, which is decoded with the cache
    ids = np.zeros((len(rows), lengths.max()), np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens) - 1] = tokens[:-1]
    cache = smollm2.empty_cache(model.sizes, len(rows), ids.shape[1] + 1)
    decode = nnx.jit(lambda model, *args: model.decode(*args))
    first, cache = decode(model, ids, cache, np.maximum(lengths - 1, 0)[:, None])
    last = np.array([tokens[-1:] for tokens in rows])
    second, _ = decode(model, last, cache._replace(lengths=jnp.array(lengths)), np.zeros_like(last))
    for i, tokens in enumerate(rows):
        expected = expected_logits(llama, tokens)
        assert np.abs(second[i, 0] - expected[-1]).max() <= 1e-3
        if len(tokens) > 1:
            assert np.abs(first[i, 0] - expected[-2]).max() <= 1e-3


def test_greedy_decoding_equals_transformers(llama, model, tokenizer):
    prompts = [smollm2.chat("What is the capital of France?"), smollm2.chat("Name three colours.")]
    for prompt, text in zip(prompts, smollm2.complete(model, tokenizer, prompts, new_tokens=24), strict=True):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        generated = llama.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=smollm2.END)
        assert text == tokenizer.decode(generated[0, ids.shape[1] :].tolist())


def test_the_chat_format_is_the_template_in_the_file(path):
    template = smollm2.read_field(smollm2.gguf.GGUFReader(path), "tokenizer.chat_template")
    from jinja2 import Template

    text = Template(template).render(messages=MESSAGES, add_generation_prompt=True)
    assert smollm2.chat(MESSAGES[0]["content"]) == text
    system = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    text = Template(template).render(messages=system, add_generation_prompt=True)
    assert smollm2.chat(MESSAGES[0]["content"], system="Be brief.") == text


def test_bfloat16_logits_are_close_to_float32(model, tokenizer):
    rounded = smollm2.load(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    ids = jnp.array([tokenizer.encode(PROMPTS[1]).ids])
    exact, logits = model(ids), rounded(ids)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(rounded))} == {jnp.dtype("bfloat16")}
    assert np.abs(exact - logits).max() <= 0.05 * np.abs(exact).max()
