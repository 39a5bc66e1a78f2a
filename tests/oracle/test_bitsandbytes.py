"""Compares NF4 with bitsandbytes: codes, scales, dequantized kernels and saved layers; `make test-oracle`."""

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.numpy import load_file
from safetensors.torch import save_file

import lora_jax as lj
from lora_jax.quant import NF4, from_bitsandbytes
from lora_jax.quant._double import BLOCK, MAP
from lora_jax.quant._nf4 import CODEBOOK

SHAPES = [(3, 128), (100, 384), (576, 640), (1000, 256)]  # PyTorch's (out, in)
DTYPES = [torch.float32, torch.bfloat16]
CASES = [(shape, dtype, block) for shape in SHAPES for dtype in DTYPES for block in (64, 128)]


def numpy(tensor):
    wide = tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
    return wide.numpy()


def weight(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_jax(w):
    return jnp.asarray(numpy(w).T, jnp.bfloat16 if w.dtype == torch.bfloat16 else jnp.float32)


def quantized(w, block=64, double=False):
    """The kernel in NF4, by lora_jax and by bitsandbytes."""
    leaf = lj.quant.quantize({"w": in_jax(w)}, {"w": NF4(block=block, double=double)})["w"]
    return leaf, bnb.quantize_4bit(w, blocksize=block, quant_type="nf4", compress_statistics=double)


def flat(array):
    """An array of blocks (in, out) in PyTorch's order."""
    return np.asarray(array).T.reshape(-1)


def tensors(packed, state, name="layer"):
    return {f"{name}.weight": packed} | {f"{name}.weight.{key}": x for key, x in state.as_dict(packed=True).items()}


def test_tables_are_equal_bit_for_bit():
    _, state = bnb.quantize_4bit(weight((8, 64)), quant_type="nf4", compress_statistics=True)
    assert numpy(state.code).tobytes() == CODEBOOK.tobytes()
    assert numpy(state.state2.code).tobytes() == MAP.tobytes()
    assert state.state2.blocksize == BLOCK


@pytest.mark.parametrize(("shape", "dtype", "block"), CASES)
def test_codes_and_scales_are_equal(shape, dtype, block):
    w = weight(shape, dtype)
    w[0] = 0  # blocks without a scale
    leaf, (packed, state) = quantized(w, block)
    np.testing.assert_array_equal(flat(leaf.codes), numpy(packed).reshape(-1))
    np.testing.assert_array_equal(flat(leaf.scales), numpy(state.absmax))


def test_codes_near_the_bounds_of_two_values_are_equal():
    bounds = (CODEBOOK[:-1] + CODEBOOK[1:]) / 2
    near = [np.nextafter(bounds, np.float32(side)) for side in (-2, 2)]
    row = np.concatenate([[1], bounds, *near, np.zeros(18)]).astype(np.float32)
    leaf, (packed, _) = quantized(torch.from_numpy(np.stack([row, -row])), 64)
    np.testing.assert_array_equal(flat(leaf.codes), numpy(packed).reshape(-1))


@pytest.mark.parametrize(("shape", "dtype", "block"), CASES)
def test_quantized_scales_are_at_least_as_near(shape, dtype, block):
    """The CPU kernel of bitsandbytes looks an 8-bit code up in a table of finite resolution: not always the nearest."""
    leaf, (packed, state) = quantized(weight(shape, dtype), block, double=True)
    np.testing.assert_array_equal(flat(leaf.codes), numpy(packed).reshape(-1))
    np.testing.assert_allclose(leaf.scales.offset, numpy(state.offset), rtol=2e-7)
    np.testing.assert_allclose(leaf.scales.largest, numpy(state.state2.absmax), rtol=2e-6)

    scales = numpy(bnb.quantize_4bit(weight(shape, dtype), blocksize=block, quant_type="nf4")[1].absmax)
    largest = np.repeat(numpy(state.state2.absmax), BLOCK)[: scales.size]
    scaled = (scales - numpy(state.offset)) / largest
    ours, theirs = flat(leaf.scales.codes).astype(int), numpy(state.absmax).astype(int)
    error, their_error = abs(MAP[ours] - scaled), abs(MAP[theirs] - scaled)
    assert np.all(error <= their_error + 1e-7)
    assert abs(ours - theirs).max() <= 1
    assert np.mean(ours != theirs) < 0.01


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("shape", "dtype", "block"), CASES[::3])
def test_a_kernel_that_is_read_dequantizes_to_the_same_values(shape, dtype, block, double):
    _, (packed, state) = quantized(weight(shape, dtype), block, double)
    leaf = from_bitsandbytes(tensors(packed, state), "layer")
    expected = numpy(bnb.dequantize_4bit(packed, state)).T
    assert leaf.dtype == (jnp.bfloat16 if dtype == torch.bfloat16 else jnp.float32)
    np.testing.assert_array_equal(leaf.dequantize().astype(jnp.float32), expected)
    # Compiled, the sum with the offset of quantized scales is rounded once, and not twice.
    compiled = jax.jit(lambda leaf: leaf.dequantize())(leaf).astype(jnp.float32)
    np.testing.assert_array_max_ulp(np.asarray(compiled), expected, 2 if double else 0)


@pytest.mark.parametrize("double", [False, True])
def test_a_kernel_that_is_read_is_the_one_that_quantize_makes(double):
    leaf, (packed, state) = quantized(weight((100, 384), torch.bfloat16), double=double)
    read = from_bitsandbytes(tensors(packed, state), "layer")
    assert jax.tree.structure(read) == jax.tree.structure(leaf)
    for one, other in zip(jax.tree.leaves(read), jax.tree.leaves(leaf), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=2e-6)


@pytest.mark.parametrize(("double", "error", "bits"), [(False, 0.0919, 4.5), (True, 0.0920, 4.127)])
def test_error_and_bits_per_weight_of_a_gaussian(double, error, bits):
    w = weight((1024, 1024))
    leaf, (packed, state) = quantized(w, double=double)
    for dense in (np.asarray(leaf.dequantize()).T, numpy(bnb.dequantize_4bit(packed, state))):
        relative = np.linalg.norm(dense - numpy(w)) / np.linalg.norm(numpy(w))
        assert abs(relative - error) < 2e-4
    assert abs(8 * leaf.nbytes / leaf.size - bits) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [False, True])
def test_a_saved_layer_has_the_same_outputs(double, dtype, tmp_path):
    layer = Linear4bit(192, 24, compute_dtype=torch.float32, compress_statistics=double, quant_type="nf4")
    layer.weight.data = weight((24, 192)).to(dtype)
    layer.bias.data = weight((24,), seed=1)
    layer = layer.to("cpu")  # quantizes
    save_file({f"model.up.{key}": tensor for key, tensor in layer.state_dict().items()}, tmp_path / "model.safetensors")

    saved = load_file(tmp_path / "model.safetensors")
    assert from_bitsandbytes(saved, "model.up").dtype == getattr(jnp, str(dtype).removeprefix("torch."))
    # `Linear4bit` dequantizes to its `compute_dtype`.
    kernel = from_bitsandbytes(saved, "model.up", dtype=jnp.float32)
    params = {"kernel": kernel, "bias": np.asarray(saved["model.up.bias"], np.float32)}
    adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    adapted = lj.lora(lambda p, x: x @ p["kernel"] + p["bias"])
    x = weight((5, 192), seed=2)
    np.testing.assert_allclose(adapted(params, adapter, numpy(x)), numpy(layer(x).detach()), rtol=0, atol=2e-5)


def test_a_saved_layer_in_fp4_is_refused():
    packed, state = bnb.quantize_4bit(weight((8, 64)), quant_type="fp4")
    with pytest.raises(lj.CheckpointError, match="is in FP4, which is not supported"):
        from_bitsandbytes(tensors(packed, state), "layer")
