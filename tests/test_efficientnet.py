"""The example of a convolutional network: its logits against torch's, the reader of torch's files, and the methods."""

import pickle
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from helpers import trained
from sklearn.datasets import load_sample_images

import efficientnet
import efficientnet_lite
import lora_jax as lj
from efficientnet_lite import Stage

pytestmark = pytest.mark.sweep

REFERENCE = Path(__file__).parent / "data" / "efficientnet_reference.npz"  # by oracle/make_efficientnet_reference.py
PALACE, DAISY = 698, 985  # classes of ImageNet

STAGES = (Stage(1, 3, 1, expand=1, channels=8), Stage(2, 5, 2, expand=2, channels=12))
TINY = efficientnet_lite.EfficientNetLite0(efficientnet.CLASSES, STAGES, stem=8, features=16)
IMAGES = jax.random.normal(jax.random.key(0), (6, 16, 16, 3))


@pytest.fixture(scope="module")
def variables():
    return TINY.init(jax.random.key(1), IMAGES)


@pytest.fixture(scope="module")
def published():
    return efficientnet_lite.load()


def test_logits_equal_recorded_ones_of_torch(published):
    with np.load(REFERENCE) as reference:
        expected = reference["logits"]
    photos = np.stack([efficientnet_lite.center_square(photo, 224) for photo in load_sample_images().images])
    logits = jax.jit(efficientnet_lite.EfficientNetLite0().apply)(published, efficientnet_lite.normalize(photos))
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    assert logits.argmax(-1).tolist() == [PALACE, DAISY]


def test_every_parameter_is_loaded(published):
    assert sum(leaf.size for leaf in jax.tree.leaves(published["params"])) == 4_652_008
    assert {leaf.dtype for leaf in jax.tree.leaves(published)} == {jnp.dtype("float32")}


def test_the_first_stages_have_the_published_weights_and_features(published):
    model, weights = efficientnet.first_stages(3)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    features = model.apply(weights, images, method="embed")
    whole = efficientnet_lite.EfficientNetLite0()
    _, state = whole.apply(published, images, capture_intermediates=lambda module, _: module.name == "block_4")
    np.testing.assert_array_equal(features, state["intermediates"]["block_4"]["__call__"][0].mean((1, 2)))
    assert features.shape == (2, 40) and "top" not in weights["params"]
    logits = model.apply(efficientnet.with_head(weights, 40), images)
    assert logits.shape == (2, efficientnet.CLASSES)


def test_the_specs_select_the_convolutions_of_each_kind():
    model, weights = efficientnet.first_stages(efficientnet.FULL.stages)
    variables = jax.tree.map(jnp.zeros_like, efficientnet.with_head(weights, 80))
    kernels = lj.kernels(model.apply, variables, jnp.zeros((1, 32, 32, 3)))
    found = {name: lj.spec(kernels, dict(spec)) for name, spec in efficientnet.SPECS.items()}
    low_rank = {name: [path for path, v in spec.items() if isinstance(v, lj.LoRA)] for name, spec in found.items()}
    pointwise, everything = low_rank["LoRA, pointwise"], low_rank["LoRA, all convolutions"]
    shapes = flatten_dict(jax.tree.map(jnp.shape, variables, is_leaf=lambda x: isinstance(x, jax.Array)), sep="/")
    assert len(pointwise) == 15 and all(shapes[path][:2] == (1, 1) for path in pointwise)
    others = set(everything) - set(pointwise)
    assert len(others) == 9 and sum(shapes[path][2] == 1 for path in others) == 8  # the stem has three inputs
    assert not low_rank["full fine-tuning"] and not any("batch_stats" in path for path in found["full fine-tuning"])


# The format of torch.save before torch 1.6, written by hand.
def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integers(*values):
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


def write(
    path, *, shape=(2, 3), strides=(1, 2), offset=1, size=7, stored=7, function="torch._utils\n_rebuild_tensor_v2"
):
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + integers(size)[1:-1] + b"NtQ"
    )
    place = integers(offset)[1:-1] + integers(*shape) + integers(*strides)
    tensor = b"c" + function.encode() + b"\n(" + storage + place + b"\x89NtR"
    tensors = b"\x80\x02}(" + text("weight") + tensor + b"u."
    numbers = np.arange(stored, dtype="<f4").tobytes()
    machine, names = (pickle.dumps(value, protocol=2) for value in ({"little_endian": True}, ["0"]))
    path.write_bytes(efficientnet_lite._START + machine + tensors + names + struct.pack("<q", stored) + numbers)
    return path


def test_a_transposed_view_of_a_storage_is_read(tmp_path):
    found = efficientnet_lite.read_torch(write(tmp_path / "a.pth"))
    assert found.keys() == {"weight"} and found["weight"].tolist() == [[1, 3, 5], [2, 4, 6]]


def test_a_file_that_names_another_function_is_refused(tmp_path):
    with pytest.raises(pickle.UnpicklingError, match=r"Expected a file of tensors; it refers to os\.system"):
        efficientnet_lite.read_torch(write(tmp_path / "a.pth", function="os\nsystem"))


@pytest.mark.parametrize("options", [{"offset": 2}, {"strides": (1, 3)}, {"shape": (3, 3)}, {"strides": (-2, 2)}])
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match="Expected 'weight' to be a part of its storage of 7 numbers"):
        efficientnet_lite.read_torch(write(tmp_path / "a.pth", **options))


def test_a_storage_of_another_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected 7 numbers of the storage '0'; the file has 6"):
        efficientnet_lite.read_torch(write(tmp_path / "a.pth", stored=6))


def test_another_format_is_refused(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"PK\x03\x04 a zip")
    with pytest.raises(ValueError, match=r"to be in the format that torch had before version 1\.6"):
        efficientnet_lite.read_torch(tmp_path / "a.pth")


def test_missing_unexpected_and_misshapen_tensors_are_listed(variables):
    tensors = {"_conv_stem.weight": np.zeros((8, 3, 3, 4)), "_bn0.weight": np.zeros(8), "other": np.zeros(1)}
    with pytest.raises(ValueError) as error:
        efficientnet_lite.rename_tensors(tensors, variables)
    message = str(error.value)
    assert "missing: '_blocks.1._expand_conv.weight', for 'params/block_1/expand/conv/kernel'" in message
    assert "unexpected: 'other'" in message and "missing: '_bn0.weight'" not in message
    # (out, in, height, width) in the file
    assert "shape: '_conv_stem.weight' is (3, 4, 3, 8); expected (3, 3, 3, 8)" in message


@pytest.mark.parametrize("name", efficientnet.SPECS)
def test_the_merged_model_equals_the_adapted_one(variables, name):
    kernels = lj.kernels(TINY.apply, variables, IMAGES)
    adapter = lj.init(jax.random.key(2), variables, dict(efficientnet.SPECS[name]), kernels=kernels)
    adapter = trained(jax.random.key(3), adapter)
    adapted = jax.jit(lj.lora(TINY.apply))(variables, adapter, IMAGES)
    merged = jax.jit(TINY.apply)(lj.merge(variables, adapter), IMAGES)
    np.testing.assert_allclose(adapted, merged, rtol=1e-4, atol=1e-4)
    assert np.abs(adapted - TINY.apply(variables, IMAGES)).max() > 1e-2


def test_steps_lower_the_loss(variables):
    kernels = lj.kernels(TINY.apply, variables, IMAGES)
    spec = dict(efficientnet.SPECS["LoRA, all convolutions"])
    adapter = lj.init(jax.random.key(2), variables, spec, kernels=kernels)
    tx = optax.adam(1.0)
    step, state, losses = efficientnet.make_step(lj.lora(TINY.apply), tx), tx.init(adapter), []
    for _ in range(20):
        adapter, state, loss = step(adapter, state, variables, IMAGES, jnp.arange(6), 0.01)
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2


def test_training_test_and_held_out_images_are_disjoint_and_balanced():
    digits = efficientnet.read()
    numbered = digits._replace(images=np.arange(5_000))
    parts = efficientnet.split(numbered, labeled=20, tested=100, seed=0)
    for part, count in zip(parts, (20, 100, 50), strict=True):
        assert np.bincount(part.labels).tolist() == [count] * 10
        assert (digits.labels[part.images] == part.labels).all()
    assert len(set(np.concatenate([part.images for part in parts]).tolist())) == 1_700
    again = efficientnet.split(numbered, labeled=20, tested=100, seed=1)
    same = [bool((one.images == other.images).all()) for one, other in zip(parts, again, strict=True)]
    assert same == [False, True, True]


def test_an_enlarged_image_has_three_equal_channels_in_the_range_of_the_model():
    pixels = np.zeros((1, 28, 28), np.uint8)
    pixels[:, 14:] = 255
    images = efficientnet.enlarge(pixels, 56)
    assert images.shape == (1, 56, 56, 3) and (images == images[..., :1]).all()
    np.testing.assert_allclose([images.min(), images.max()], [-127 / 128, 1.0], rtol=1e-5)


def test_a_run_worse_than_expected_is_an_error(tmp_path):
    scale = efficientnet.FULL._replace(expected=0.03)
    result = efficientnet.Result(90, 100, [1.0], 1.0, 0.0)
    better = {efficientnet.PROBE: [result] * 2, "LoRA, all convolutions": [result, result._replace(right=97)]}
    efficientnet.check(better, scale, tmp_path)
    with pytest.raises(RuntimeError, match=r"at least 0\.930, 0\.03 more .*; got \{'LoRA, all convolutions': 0\.9\}"):
        efficientnet.check(better | {"LoRA, all convolutions": [result]}, scale, tmp_path)
    with pytest.raises(RuntimeError, match=r"equal those of the adapted ones .* got a difference of 1\.0e\+00"):
        efficientnet.check(better | {"other": [result, result._replace(difference=1.0)]}, scale, tmp_path)
