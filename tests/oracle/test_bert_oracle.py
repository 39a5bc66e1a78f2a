"""Compares the encoder of the example with `transformers`' BertModel on the same weights; `make test-oracle`."""

import jax
import make_minilm_reference as reference
import numpy as np
import pytest

import minilm


@pytest.fixture(scope="module")
def bert():
    return reference.bert_model()


@pytest.fixture(scope="module")
def encode():
    params = minilm.load_encoder()
    return jax.jit(lambda ids, mask: minilm.Encoder().apply({"params": params}, ids, mask))


def test_hidden_states_of_sentences_equal_transformers(bert, encode):
    ids, mask = reference.tokens_of(reference.SENTENCES)
    difference = np.abs(encode(ids, mask) - reference.hidden_states(bert, ids, mask))
    assert difference[mask].max() <= 1e-4


def test_hidden_states_of_random_tokens_at_full_length_equal_transformers(bert, encode):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 30_522, (2, 512), dtype=np.int32)
    mask = np.arange(512)[None] < np.array([[512], [200]])
    difference = np.abs(encode(ids, mask) - reference.hidden_states(bert, ids, mask))
    assert difference[mask].max() <= 1e-4


def test_the_recorded_reference_matches_current_transformers(bert):
    with np.load(reference.REFERENCE) as recorded:
        ids, mask, hidden = recorded["ids"], recorded["mask"], recorded["hidden"]
    assert np.array_equal(ids, reference.tokens_of(reference.SENTENCES)[0])
    today = reference.hidden_states(bert, ids, mask)[..., :: reference.STRIDE]
    assert np.abs(hidden - today)[mask].max() <= 1e-5
