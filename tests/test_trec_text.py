"""TREC as chats: prompts, answers, loss masks, batches and exact match."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smollm2
import trec
import trec_text

pytestmark = pytest.mark.sweep

TINY = smollm2.Sizes(d_model=16, layers=1, heads=2, kv_heads=1, d_mlp=16)


@pytest.fixture(scope="module")
def data():
    return trec.read()


@pytest.fixture(scope="module", params=[trec_text.coarse, trec_text.fine], ids=["coarse", "fine"])
def task(request, data):
    return request.param(data.names)


@pytest.fixture(scope="module")
def texts(data, task, tokenizer):
    return trec_text.tokenize(data.test, task, tokenizer)


def test_the_coarse_task_has_6_answers_and_the_fine_task_50(data):
    assert len(set(trec_text.coarse(data.names).answers)) == 6
    fine = trec_text.fine(data.names)
    assert len(set(fine.answers)) == 50
    assert fine.answers[data.names.index("HUM:ind")] == "human: individual"
    details = {name.split(":")[1] for name in data.names}
    assert set(trec_text.FINE) <= details


def test_a_chat_is_the_instruction_the_question_and_the_answer(data, task, tokenizer, texts):
    for row in (0, 17, 499):
        ids, prompt = texts.tokens.ids[row], texts.prompts[row]
        question, label = data.test.texts[row], data.test.labels[row]
        assert tokenizer.decode(ids[:prompt], skip_special_tokens=False) == smollm2.chat(question, system=task.system)
        assert tokenizer.decode(ids[prompt:], skip_special_tokens=False) == f"{task.answers[label]}<|im_end|>"


def test_prompt_and_answer_are_tokenized_as_one_text_is(task, tokenizer):
    prompt = smollm2.chat("Why ?", system=task.system)
    for answer in task.answers:
        together = tokenizer.encode(f"{prompt}{answer}<|im_end|>").ids
        assert together == tokenizer.encode(prompt).ids + tokenizer.encode(f"{answer}<|im_end|>").ids


def test_every_question_of_both_sets_fits_the_longest_batch(data, task, tokenizer, texts):
    train = trec_text.tokenize(data.train, task, tokenizer)
    assert max(map(len, train.tokens.ids + texts.tokens.ids)) <= task.lengths[-1]


def test_ordered_batches_have_every_question_once(texts, task):
    batches = list(trec_text.ordered_batches(texts, 32))
    assert sorted(np.concatenate([batch.rows for batch in batches])) == list(range(500))
    assert {batch.ids.shape for batch in batches} <= {(32, length) for length in task.lengths}
    for batch in batches:
        assert not batch.mask[len(batch.rows) :].any()
        assert batch.mask[: len(batch.rows), :2].all()


def test_training_batches_are_full_and_as_many_as_stated(texts):
    batches = list(trec_text.training_batches(texts, 16, np.random.default_rng(0)))
    assert len(batches) == trec_text.batches_per_epoch(texts, 16)
    assert {len(batch.rows) for batch in batches} == {16}


def test_targets_are_the_tokens_after_the_positions_and_the_mask_ends_with_the_answer(texts):
    for batch in trec_text.ordered_batches(texts, 32):
        for i, row in enumerate(batch.rows):
            mask, ids, prompt = batch.mask[i], texts.tokens.ids[row], texts.prompts[row]
            assert batch.targets[i][mask].tolist() == ids[prompt:]
            assert np.array_equal(batch.ids[i][batch.at[i][mask] + 1], batch.targets[i][mask])
            assert batch.targets[i][mask][-1] == smollm2.END
            assert batch.at[i, 0] == prompt - 1


def test_prompts_of_a_batch_have_no_answers(texts):
    batch = list(trec_text.ordered_batches(texts, 32))[-1]
    ids, lengths = trec_text.without_answers(batch)
    for i, row in enumerate(batch.rows):
        prompt = texts.tokens.ids[row][: texts.prompts[row]]
        assert ids[i, : lengths[i]].tolist() == prompt
        assert set(ids[i, lengths[i] :]) == {smollm2.END}
    assert len(batch.rows) < 32
    assert (lengths[len(batch.rows) :] == 1).all()


def test_the_loss_is_the_mean_over_the_tokens_of_the_answers():
    rng = np.random.default_rng(0)
    logits = jnp.array(rng.normal(size=(2, 3, 7)), jnp.float32)
    targets, mask = jnp.array([[1, 2, 6], [0, 3, 6]]), jnp.array([[True, True, True], [True, False, False]])
    each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    expected = (each[0].sum() + each[1, 0]) / 4
    np.testing.assert_allclose(trec_text.cross_entropy(logits, targets, mask), expected, rtol=1e-6)


def test_exact_matches_count_every_token_of_the_answer_and_no_other(texts):
    batch = list(trec_text.ordered_batches(texts, 32))[-1]
    questions = len(batch.rows)
    assert trec_text.exact_matches(np.where(batch.mask, batch.targets, -1), batch).tolist() == [True] * questions
    for i in range(batch.mask.shape[1]):
        wrong = batch.targets + (np.arange(batch.mask.shape[1]) == i)
        assert np.array_equal(trec_text.exact_matches(wrong, batch), ~batch.mask[:questions, i])


def test_the_most_likely_tokens_match_where_greedy_decoding_does(data, tokenizer):
    """Half of the answers are replaced by what the model generates, so that there is something to match."""
    texts = trec_text.tokenize(data.test, trec_text.fine(data.names), tokenizer)
    model = smollm2.Llama(TINY, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    batch = next(trec_text.ordered_batches(texts, 8))
    prompts, lengths = trec_text.without_answers(batch)
    width = batch.targets.shape[1]

    @jax.jit
    def generate(state):
        def decode(*args):
            return nnx.merge(graph, state, copy=True).decode(*args)

        cache = smollm2.empty_cache(TINY, 8, prompts.shape[1] + width)
        return smollm2.generate(decode, jnp.array(prompts), jnp.array(lengths), cache, new_tokens=width)

    generated = np.asarray(generate(state))
    ids, targets, rows = batch.ids.copy(), batch.targets.copy(), np.arange(4)[:, None]
    targets[:4] = generated[:4]
    ids[rows, np.minimum(batch.at[:4] + 1, ids.shape[1] - 1)] = generated[:4]
    batch = batch._replace(ids=ids, targets=targets)
    likely = np.asarray(jax.jit(lambda state: nnx.merge(graph, state)(ids, batch.at))(state).argmax(-1))
    matches = trec_text.exact_matches(generated, batch)
    assert matches[:4].all() and not matches[4:].all()
    assert np.array_equal(trec_text.exact_matches(likely, batch), matches)
