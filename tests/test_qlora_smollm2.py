"""The QLoRA example: its base, steps, evaluation and measurements, on a tiny decoder."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, trained

import lora_jax as lj
import qlora_smollm2 as qlora
import smollm2
import trec
import trec_text

pytestmark = pytest.mark.sweep

TINY = smollm2.Sizes(vocabulary=61, d_model=64, layers=3, heads=2, kv_heads=1, d_mlp=128)
LINEAR = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128  # weights of the linear layers of a layer


@pytest.fixture(scope="module")
def decoder():
    return smollm2.Llama(TINY, remat=True, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def model(decoder):
    return qlora.functions(decoder)


@pytest.fixture(scope="module")
def kernels(model):
    return qlora.find_kernels(model)


@pytest.fixture(scope="module")
def bases(model, kernels):
    """The base of each method; the parameters of `model` are not deleted."""
    return {method: qlora.stored(jax.tree.map(jnp.copy, model.params), kernels, method) for method in qlora.METHODS}


@pytest.fixture(scope="module")
def texts():
    """Chats of random tokens with answers of 1 to 3 tokens and the end."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(5, 12, 40)
    ids = [[*rng.integers(3, 61, n + 1 + i % 3).tolist(), smollm2.END] for i, n in enumerate(prompts)]
    return trec_text.Texts(trec.Tokens(ids, np.zeros(40, np.int32)), prompts, lengths=(16,), answer_tokens=4)


def leaves_of(tree):
    return jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, lj.quant.QuantizedLeaf))


def test_the_base_has_linear_layers_in_nf4_and_the_rest_in_bfloat16(bases):
    leaves = leaves_of(bases["qlora"])
    assert sum(isinstance(leaf, lj.quant.NF4Leaf) for leaf in leaves) == 7
    assert {leaf.dtype for leaf in leaves if isinstance(leaf, jax.Array)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in leaves_of(bases["lora"])} == {jnp.dtype("bfloat16")}


def test_bytes_and_bits_are_those_of_the_arrays(bases):
    sizes = qlora.describe(bases["qlora"])
    rest = 61 * 64 + 7 * 64
    packed = LINEAR // 2 + LINEAR // 64 + 7 * (4 + 4)  # codes, codes of scales, and each kernel's scale and offset
    assert sizes == {
        "weights": 3 * LINEAR + rest,
        "quantized_weights": 3 * LINEAR,
        "bits_per_quantized_weight": 8 * packed / LINEAR,
        "bytes": 3 * packed + 2 * rest,
        "quantized_bytes": 3 * packed,
        "bytes_in_bfloat16": 2 * (3 * LINEAR + rest),
    }


def test_the_first_layers_are_the_model_whose_other_layers_do_nothing(decoder):
    few = qlora.functions(qlora.first_layers(decoder, 2))
    graph, state = nnx.split(decoder)
    same = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    for kernel in (same.layers.attention.out.kernel, same.layers.mlp.down.kernel):
        kernel[...] = kernel[...].at[2].set(0)
    many = qlora.functions(same)
    ids = np.arange(12).reshape(2, 6)
    assert_close(jax.jit(few.logits)(few.params, ids), jax.jit(many.logits)(many.params, ids))
    assert few.sizes.layers == 2


@pytest.fixture(scope="module")
def batch(texts):
    batch = next(trec_text.training_batches(texts, qlora.BATCH, np.random.default_rng(0)))
    return batch.ids, batch.at, batch.targets, batch.mask


def test_training_starts_at_the_loss_of_the_base_and_lowers_it(model, kernels, bases, batch):
    ids, at, targets, mask = batch
    dense = lj.quant.dequantize(bases["qlora"])
    expected = jax.jit(lambda params: trec_text.cross_entropy(model.logits(params, ids, at), targets, mask))(dense)
    step, adapter, opt_state, base = qlora.step_of("qlora", model, kernels, bases["qlora"], steps=20)
    losses = []
    for _ in range(6):
        adapter, opt_state, loss = step(adapter, opt_state, base, *batch)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(float(expected), rel=1e-5)
    assert losses[-1] < losses[0]
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(opt_state) if leaf.ndim} == {"pinned_host"}


def test_the_score_is_that_of_the_merged_decoder(model, kernels, bases, texts, key):
    base, prompts = bases["qlora"], texts.prompts.tolist()
    adapter = trained(key, lj.init(key, base, qlora.SPEC, kernels=kernels), 0.1)
    merged = lj.merge(lj.quant.dequantize(base), adapter)
    log_likelihood = jax.jit(lambda ids: jax.nn.log_softmax(model.logits(merged, ids)))
    # The expected answers of the first ten are what the merged decoder generates.
    rows = [row[:n] if i < 10 else row for i, (row, n) in enumerate(zip(texts.tokens.ids, prompts, strict=True))]
    for _ in range(texts.answer_tokens):
        padded, _ = qlora.pad([row + [0] * (16 - len(row)) for row in rows])
        likely = np.asarray(log_likelihood(padded)).argmax(-1)
        for i in range(10):
            if rows[i][-1] != smollm2.END:
                rows[i] = [*rows[i], int(likely[i, len(rows[i]) - 1])]
    changed = texts._replace(tokens=trec.Tokens(rows, texts.tokens.labels))
    score = qlora.make_evaluate(model, changed)("test", base, adapter)

    padded, _ = qlora.pad([row + [0] * (16 - len(row)) for row in rows])
    values = np.asarray(log_likelihood(padded))
    answers = [range(n, len(row)) for row, n in zip(rows, prompts, strict=True)]
    each = [values[i, at - 1, rows[i][at]] for i, places in enumerate(answers) for at in places]
    assert score.perplexity == pytest.approx(np.exp(-np.mean(each)), rel=1e-3)
    likely = values.argmax(-1)
    right = [all(likely[i, at - 1] == rows[i][at] for at in places) for i, places in enumerate(answers)]
    assert 0.25 <= score.exact_match == np.mean(right) < 1


def test_the_last_chats_of_a_batch_are_rehearsed(texts):
    wide = texts._replace(lengths=(16, 20))
    chats = next(
        trec_text.ordered_batches(wide._replace(tokens=trec.Tokens(texts.tokens.ids[:6], np.zeros(6, int))), 6)
    )
    longer = texts._replace(lengths=(18,))
    batches = itertools.islice(qlora.batches_with(chats, longer), 4)  # more than an epoch
    for batch in batches:
        assert batch.ids.shape == (qlora.BATCH, 18)
        assert len(batch.rows) == qlora.BATCH - qlora.REHEARSED
        for row, index in enumerate(batch.rows):
            assert batch.ids[row].tolist()[: len(texts.tokens.ids[index])] == texts.tokens.ids[index]
        for row in range(len(batch.rows), qlora.BATCH):
            same = [i for i in range(6) if chats.ids[i].tolist() == batch.ids[row, :16].tolist()]
            assert len(same) == 1
            for name in ("at", "targets", "mask"):
                assert np.array_equal(getattr(batch, name)[row], getattr(chats, name)[same[0]])


def test_prompts_are_padded_at_the_end_and_tokens_counted_up_to_the_end_of_a_message():
    ids, lengths = qlora.pad([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, smollm2.END, smollm2.END]]
    assert lengths.tolist() == [3, 1]
    assert qlora.count_tokens(ids) == 3 + 2


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_measured_step_has_at_least_what_it_trains_and_its_base(method, bases):
    result = qlora.measure(method, TINY)
    base = sum(leaf.nbytes for leaf in leaves_of(bases[method]))
    assert result["compiler"] > (3 * base if method == "full" else base)  # full fine-tuning has two moments, too
    assert min(result["resident"], result["resident_before"]) > 50e6
    assert result["seconds"] > 0


def test_the_peak_of_the_resident_set_starts_anew():
    np.ones(2**24)  # 134 MB
    qlora.restart_peak()
    before = qlora.resident("VmHWM")
    assert before == pytest.approx(qlora.resident("VmRSS"), rel=0.05)
    np.ones(2**24)
    assert qlora.resident("VmHWM") - before > 100e6


def test_few_questions_are_too_long_and_the_others_fit(tokenizer):
    data = trec.read()
    task = trec_text.coarse(data.names)
    chosen, texts = qlora.tokenize(data.test, task, tokenizer)
    assert 0.93 < len(chosen.texts) / len(data.test.texts) < 1
    assert max(map(len, texts.tokens.ids)) <= qlora.LENGTHS[-1]
    assert texts.answer_tokens == qlora.ANSWER_TOKENS
    few, _ = qlora.tokenize(data.test, task, tokenizer, 20)
    assert few.texts == chosen.texts[:20]
    assert np.array_equal(few.labels, chosen.labels[:20])
