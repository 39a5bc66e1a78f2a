"""The decoder of the example: scan, remat, cache, `lora` on it, and the loader and tokenizer of GGUF files."""

import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import GRADIENT, assert_close, dense, trained

import lora_jax as lj
import smollm2
from smollm2 import Llama, Sizes

pytestmark = pytest.mark.sweep

TINY = Sizes(vocabulary=61, d_model=32, layers=2, heads=4, kv_heads=2, d_mlp=64, theta=100.0)
SPEC = {
    "**/{query,value,out}/kernel": lj.LoRA(rank=2, alpha=4),
    "**/mlp/*/kernel": lj.LoRA(rank=3, alpha=3),
    "embed/embedding": lj.LoRA(rank=2, alpha=2),
}
FORMS = pytest.mark.parametrize(
    ("scanned", "remat"), [(True, False), (True, True), (False, False), (False, True)], ids=str
)

IDS = jnp.array(np.random.default_rng(0).integers(0, TINY.vocabulary, (3, 9)), jnp.int32)
LENGTHS = jnp.array([9, 4, 1])


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A file of a tiny model: random weights of 8 bits, and a tokenizer of bytes and two merges."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write(path, tiny_tensors())
    return path


@pytest.fixture(scope="module")
def models(gguf_file):
    """The same weights in each form, by `(scanned, remat)`."""
    return {
        (scanned, remat): smollm2.load(gguf_file, scanned=scanned, remat=remat)
        for scanned in (True, False)
        for remat in (True, False)
    }


def tiny_tensors():
    """The tensors of `TINY` in llama.cpp's layout."""
    rng = np.random.default_rng(0)
    d_kv = TINY.kv_heads * TINY.head_dim
    shapes = {
        "attn_norm": (32,),
        "attn_q": (32, 32),
        "attn_k": (d_kv, 32),
        "attn_v": (d_kv, 32),
        "attn_output": (32, 32),
        "ffn_norm": (32,),
        "ffn_gate": (64, 32),
        "ffn_up": (64, 32),
        "ffn_down": (32, 64),
    }
    shapes = {f"blk.{i}.{name}.weight": shape for i in range(TINY.layers) for name, shape in shapes.items()}
    shapes |= {"token_embd.weight": (61, 32), "output_norm.weight": (32,)}
    return {name: (rng.normal(size=shape) / 3).astype(np.float32) for name, shape in shapes.items()}


def write(path, tensors, architecture="llama", pre="smollm"):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(TINY.vocabulary)
    writer.add_embedding_length(TINY.d_model)
    writer.add_block_count(TINY.layers)
    writer.add_head_count(TINY.heads)
    writer.add_head_count_kv(TINY.kv_heads)
    writer.add_feed_forward_length(TINY.d_mlp)
    writer.add_rope_freq_base(TINY.theta)
    writer.add_layer_norm_rms_eps(TINY.epsilon)
    tokens = ["<|im_end|>", *"abcdefghijklmnopqrstuvwxyz0123456789'Ġ", "Ġa", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges(["Ġ a", "a b"])
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType.F32 if tensor.ndim == 1 else gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits_of(model, ids=IDS, at=None):
    return jax.jit(lj.nnx.functional(model).apply)(*lj.nnx.functional(model)[1:], ids, at)[0]


@pytest.fixture(scope="module")
def logits(models):
    return logits_of(models[True, False])


@FORMS
def test_scanned_unrolled_and_rematerialized_models_are_equal(models, logits, scanned, remat):
    assert_close(logits_of(models[scanned, remat]), logits)


def test_later_tokens_change_no_logits(models, logits):
    changed = logits_of(models[True, False], IDS.at[:, 5:].add(1) % TINY.vocabulary)
    assert_close(changed[:, :5], logits[:, :5])
    assert np.abs(changed[:, 5:] - logits[:, 5:]).max() > 0.1


def test_logits_of_chosen_positions_are_those_of_all_positions(models, logits):
    at = jnp.array([[8, 0], [3, 3], [0, 1]])
    assert_close(logits_of(models[True, False], at=at), jnp.take_along_axis(logits, at[..., None], 1))


@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "unrolled"])
def test_decoding_with_a_cache_equals_the_whole_sequence(models, logits, scanned):
    apply, params, rest = lj.nnx.functional(models[scanned, False], method="decode")
    decode = jax.jit(lambda *args: apply(params, rest, *args)[0])
    cache = smollm2.empty_cache(TINY, batch=3, slots=12)
    first, cache = decode(IDS[:, :4], cache)
    parts = [first]
    for i in range(4, 9):
        part, cache = decode(IDS[:, i : i + 1], cache)
        parts.append(part)
    assert_close(jnp.concatenate(parts, 1), logits)
    assert cache.lengths.tolist() == [9, 9, 9]


@functools.cache
def generator(adapted=False, **options):
    """A jitted `(params, stop, key[, adapter]) -> ids`, of up to 5 tokens after `IDS`; `TINY`, scanned."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: Llama(TINY, rngs=nnx.Rngs(0))))
    options = {"new_tokens": 5} | options

    def generate(params, stop, key):
        def decode(*args):
            return nnx.merge(graph, params, copy=True).decode(*args)

        cache = smollm2.empty_cache(TINY, batch=3, slots=13)
        return smollm2.generate(decode, IDS, LENGTHS, cache, stop=stop, key=key, **options)

    return jax.jit(lj.lora(generate) if adapted else generate)


NEVER = TINY.vocabulary  # an id that no token has


def test_greedy_generation_takes_the_most_likely_token_of_each_row(models):
    apply, params, rest = lj.nnx.functional(models[True, False])
    ids, lengths, rows = np.zeros((3, 14), np.int32), np.array(LENGTHS), np.arange(3)
    ids[:, :9] = IDS
    predict = jax.jit(lambda ids: apply(params, rest, ids)[0].argmax(-1))
    for step in range(5):
        ids[rows, lengths + step] = np.asarray(predict(ids))[rows, lengths + step - 1]
    expected = np.stack([ids[i, n : n + 5] for i, n in enumerate(lengths)])
    assert np.array_equal(generator()(params, NEVER, None), expected)
    stop = int(expected[0, 2])
    for row, every in zip(generator()(params, stop, None), expected.tolist(), strict=True):
        kept = every[: every.index(stop)] if stop in every else every
        assert row.tolist() == kept + [stop] * (5 - len(kept))


def test_sampling_at_a_low_temperature_is_greedy_and_needs_a_key(models, key):
    params = nnx.state(models[True, False])
    greedy = generator()(params, NEVER, None)
    assert np.array_equal(generator(temperature=1e-4)(params, NEVER, key), greedy)
    with pytest.raises(ValueError, match=r"Expected a key to sample with temperature 1\.0; got None"):
        generator(temperature=1.0)(params, NEVER, None)


def test_sampled_tokens_have_the_probabilities_of_the_logits(key):
    logits = jnp.log(jnp.array([0.7, 0.2, 0.1]))
    rows = 2000

    def decode(ids, cache, at):
        return jnp.broadcast_to(2 * logits, (rows, 1, 3)), cache

    cache = smollm2.Cache(jnp.zeros((1, rows, 2, 1, 1)), jnp.zeros((1, rows, 2, 1, 1)), jnp.zeros(rows, jnp.int32))
    ids, lengths = jnp.zeros((rows, 1), jnp.int32), jnp.ones(rows, jnp.int32)
    options = {"new_tokens": 2, "stop": 3, "temperature": 2.0, "key": key}
    sampled = np.asarray(smollm2.generate(decode, ids, lengths, cache, **options))
    for column in sampled.T:
        np.testing.assert_allclose(np.bincount(column, minlength=3) / rows, [0.7, 0.2, 0.1], atol=0.05)
    assert not np.array_equal(*sampled.T)


def test_a_cache_with_too_few_slots_is_an_error(models):
    with pytest.raises(ValueError, match="at least 28 slots for prompts of 9 tokens and 20 new ones; got 13"):
        generator(new_tokens=20)(nnx.state(models[True, False]), NEVER, None)


@pytest.mark.parametrize(("scanned", "remat"), [(True, True), (False, False)], ids=str)
def test_an_adapted_model_is_the_model_with_merged_parameters(models, key, scanned, remat):
    apply, params, rest = lj.nnx.functional(models[scanned, remat])
    adapted, adapter = lj.adapt(apply, params, SPEC, rest, IDS, key=key)
    adapter = trained(key, adapter)
    assert len(adapter) == 7 if scanned else 1 + 6 * TINY.layers

    def loss_and_gradient(apply):
        return jax.jit(jax.value_and_grad(lambda adapter: jnp.mean(apply(params, adapter, rest, IDS)[0] ** 2)))(adapter)

    assert_close(loss_and_gradient(adapted), loss_and_gradient(dense(apply)), GRADIENT)


def test_an_adapted_model_generates_as_the_merged_model(models, key):
    apply, params, rest = lj.nnx.functional(models[True, False])
    adapter = trained(key, lj.init(key, params, SPEC, kernels=lj.kernels(apply, params, rest, IDS)))
    expected = generator()(lj.merge(params, adapter), NEVER, None)
    assert np.array_equal(generator(adapted=True)(params, adapter, NEVER, None), expected)
    assert not np.array_equal(generator()(params, NEVER, None), expected)


def test_dtypes_of_parameters_and_computation_are_options(gguf_file, logits):
    model = smollm2.load(gguf_file, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}
    got = logits_of(model)
    assert got.dtype == jnp.float32
    assert_close(got, logits, dtype="bfloat16")


def test_a_random_model_has_the_published_sizes():
    model = nnx.eval_shape(lambda: Llama(Sizes(), rngs=nnx.Rngs(0)))
    state = nnx.to_pure_dict(nnx.state(model))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 134_515_008
    assert state["layers"]["mlp"]["down"]["kernel"].shape == (30, 1536, 576)
    assert state["layers"]["attention"]["key"]["kernel"].shape == (30, 576, 192)


@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "unrolled"])
def test_kernels_are_transposed_and_the_pairs_of_the_rotation_are_split(models, scanned):
    tensors = {name: dequantized(tensor) for name, tensor in tiny_tensors().items()}
    layers = nnx.to_pure_dict(nnx.state(models[scanned, False]))["layers"]
    layer = jax.tree.map(lambda leaf: leaf[1], layers) if scanned else layers[1]
    stored = tensors["blk.1.attn_k.weight"]  # (out, in)
    half = TINY.head_dim // 2
    kernel = np.asarray(layer["attention"]["key"]["kernel"]).reshape(32, TINY.kv_heads, 2, half)
    for head in range(TINY.kv_heads):
        for pair in range(half):
            for part in range(2):
                row = stored[head * TINY.head_dim + 2 * pair + part]
                assert np.array_equal(kernel[:, head, part, pair], row)
    assert np.array_equal(layer["attention"]["value"]["kernel"], tensors["blk.1.attn_v.weight"].T)
    assert np.array_equal(layer["mlp"]["down"]["kernel"], tensors["blk.1.ffn_down.weight"].T)


def dequantized(tensor):
    kind = gguf.GGMLQuantizationType.Q8_0
    return tensor if tensor.ndim == 1 else gguf.quants.dequantize(gguf.quants.quantize(tensor, kind), kind)


def test_loading_lists_every_missing_extra_and_misshapen_tensor(tmp_path):
    tensors = tiny_tensors()
    del tensors["output_norm.weight"]
    tensors["output.weight"] = np.zeros((61, 32), np.float32)
    tensors["blk.1.ffn_up.weight"] = np.zeros((32, 64), np.float32)
    write(tmp_path / "other.gguf", tensors)
    for scanned in (True, False):
        with pytest.raises(ValueError, match=r"other\.gguf does not contain the weights of `Llama`") as error:
            smollm2.load(tmp_path / "other.gguf", scanned=scanned)
        assert str(error.value).splitlines()[1:] == [
            "Expected 20 tensors; got:",
            "  missing: 'output_norm.weight'",
            "  unexpected: 'output.weight' of shape (61, 32)",
            "  shape: 'blk.1.ffn_up.weight' is (32, 64); expected (64, 32)",
        ]


def test_a_file_of_another_kind_is_an_error(tmp_path):
    write(tmp_path / "other.gguf", {}, architecture="gpt2", pre="gpt-4o")
    with pytest.raises(ValueError, match=r"Expected 'llama' as 'general\.architecture'; got 'gpt2'"):
        smollm2.load(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"Expected a tokenizer of the kind .*; got \('gpt2', 'gpt-4o'\)"):
        smollm2.load_tokenizer(tmp_path / "other.gguf")


def test_the_tokenizer_merges_within_words_and_splits_digits(gguf_file):
    tokenizer = smollm2.load_tokenizer(gguf_file)
    assert tokenizer.encode("ab abc 12<|im_end|>").tokens == ["ab", "Ġa", "b", "c", "Ġ", "1", "2", "<|im_end|>"]


@pytest.mark.parametrize(
    "text", ["What is LoRA?", "  two spaces,\n\ttab", "naïve café — 日本語 🙂", "In 1969: 3.14%", "it's I'LL 've x=y+1"]
)
def test_texts_survive_the_published_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_special_tokens_of_a_chat_are_one_token_each(tokenizer):
    ids = tokenizer.encode(smollm2.chat("Why?")).ids
    assert ids[:4] == [1, 9690, 198, 2683]  # <|im_start|> system ⏎ You
    assert [ids.count(1), ids.count(smollm2.END)] == [3, 2]
    assert tokenizer.decode(ids, skip_special_tokens=False) == smollm2.chat("Why?")
