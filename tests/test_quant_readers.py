"""Kernels that other libraries have quantized: the arrays of Qwix, and checkpoints of bitsandbytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluate import without_compiling
from flax import nnx
from helpers import FORWARD, GRADIENT, assert_close, bits
from hypothesis import given
from hypothesis import strategies as st
from law import normal, total

import lora_jax as lj
from lora_jax.quant import NF4, DoubleScales, NF4Leaf, ScaledLeaf, dequantize, from_bitsandbytes, from_qwix
from lora_jax.quant._double import MAP
from lora_jax.quant._nf4 import CODEBOOK


def assert_law(apply: Callable[..., Any], params: Any, pattern: str, *args: Any, axes: str | None = None) -> None:
    """Compares result and gradient on stored kernels with merged kernels of the dequantized tree."""
    adapter = lj.init(jax.random.key(0), params, {pattern: lj.LoRA(rank=2, alpha=3, axes=axes)})
    leaves, treedef = jax.tree.flatten(adapter)
    adapter = treedef.unflatten([normal(*leaf.shape, seed=at, size=0.2) for at, leaf in enumerate(leaves)])

    def both(adapter: Any, params: Any) -> Any:
        def gradient(run: Callable[[Any], Any]) -> Any:
            return jax.grad(lambda adapter: (total(out := run(adapter)), out), has_aux=True)(adapter)

        return (
            gradient(lambda adapter: lj.lora(apply)(params, adapter, *args)),
            gradient(lambda adapter: apply(lj.merge(dense, adapter), *args)),
        )

    dense = dequantize(params)
    (got, out), (expected_gradient, expected) = without_compiling(both)(adapter, params)
    assert_close(out, expected, FORWARD)
    assert_close(got, expected_gradient, GRADIENT)


# Qwix


@flax.struct.dataclass
class QArray:
    """Has the attributes of Qwix's class."""

    qvalue: Any
    scale: Any
    zero_point: Any = None
    qtype: Any = flax.struct.field(pytree_node=False, default=None)


@flax.struct.dataclass
class WithAux:
    """Has the attributes of the class that Qwix's `PtqProvider` puts around a `QArray`."""

    array: Any
    how: Any = flax.struct.field(pytree_node=False, default=None)


# The logical type, and the dtype and range of its codes.
FORMATS = {
    "nf4": ("nf4", jnp.uint4, 0, 16),
    "int3": ("int3", jnp.int4, -4, 4),
    "int4": (jnp.int4, jnp.int4, -8, 8),
    "int8": ("int8", jnp.int8, -128, 128),
    "mxfp8": ("mxfp8", jnp.float8_e4m3fn, -100, 100),
    "mxfp4": ("mxfp4", jnp.float4_e2m1fn, -6, 7),
    "fp8": (np.dtype(jnp.float8_e5m2), jnp.float8_e5m2, -100, 100),
}


def qarray(
    kind: str = "int4",
    shape: tuple[int, ...] = (8, 6),
    tiles: tuple[int, ...] = (2, 6),
    dtype: Any = jnp.float32,
    zero_points: bool = False,
) -> QArray:
    qtype, stored, low, high = FORMATS[kind]
    random = np.random.default_rng(0)
    codes = jnp.asarray(random.integers(low, high, shape).astype(stored))
    zero_point = jnp.asarray(random.integers(low, high, tiles).astype(stored)) if zero_points else None
    return QArray(codes, abs(normal(*tiles)).astype(dtype), zero_point, qtype)


def values(array: QArray) -> np.ndarray:
    """The array that a `QArray` represents, in the steps of Qwix."""
    dtype = array.scale.dtype
    spread = lambda x: np.kron(  # noqa: E731
        np.asarray(x, np.float64), np.ones(np.array(array.qvalue.shape) // np.array(x.shape))
    )
    codes = np.asarray(array.qvalue)
    wide = CODEBOOK[codes.astype(int)] if array.qtype == "nf4" else codes
    steps = wide.astype(dtype).astype(np.float64)
    if array.zero_point is not None:
        steps -= spread(array.zero_point)
    return (steps * spread(array.scale)).astype(dtype)


TILES = [(2, 6), (1, 1), (8, 6), (4, 3)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", FORMATS)
def test_an_array_of_qwix_keeps_its_values_bit_for_bit(kind: str, dtype: Any) -> None:
    arrays = [qarray(kind, tiles=tiles, dtype=dtype) for tiles in TILES]
    if kind in ("int4", "int8"):
        arrays += [qarray(kind, tiles=tiles, dtype=dtype, zero_points=True) for tiles in TILES]
    leaves = from_qwix(arrays)
    for array, got in zip(arrays, dequantize(leaves), strict=True):
        assert bits(got)[0][1:] == bits(values(array))[0][1:]


def test_an_array_of_qwix_is_not_copied() -> None:
    array = qarray(zero_points=True)
    leaf = from_qwix({"w": array})["w"]
    assert (leaf.codes is array.qvalue, leaf.scales is array.scale, leaf.zero_point is array.zero_point) == (True,) * 3


def test_scales_of_eight_bits_represent_bfloat16() -> None:
    array = QArray(jnp.ones((4, 2), jnp.float4_e2m1fn), jnp.full((2, 2), 4, jnp.float8_e8m0fnu), qtype="mxfp4")
    leaf = from_qwix(array)
    assert leaf.dtype == jnp.bfloat16
    np.testing.assert_array_equal(leaf.dequantize(), jnp.full((4, 2), 4, jnp.bfloat16))


def leaf_of(tree: Any) -> Any:
    """The only leaf of a tree, with its path."""
    ((keys, leaf),) = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, ScaledLeaf))[0]
    return jax.tree_util.keystr(keys, simple=True, separator="/"), leaf


ARRAY = qarray("nf4")
CONTAINERS: dict[str, Any] = {
    "bare": ARRAY,
    "with how it was quantized": WithAux(ARRAY),
    "boxed codes and scales": WithAux(jax.tree.map(lambda x: nn.Partitioned(x, ("a", "b")), ARRAY)),
    "NNX variables": WithAux(jax.tree.map(nnx.Param, ARRAY)),
    "an NNX variable": nnx.Param(ARRAY),
    "the state of an NNX model": nnx.State(
        {"array": {"qvalue": nnx.Param(ARRAY.qvalue), "scale": nnx.Param(ARRAY.scale)}}
    ),
    "a pure dict": {"array": {"qvalue": ARRAY.qvalue, "scale": ARRAY.scale}},
    "a dict of arrays": {"qvalue": ARRAY.qvalue, "scale": ARRAY.scale, "zero_point": None},
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_container_of_an_array_of_qwix_becomes_one_leaf(container: str) -> None:
    params = from_qwix({"layer": {"kernel": CONTAINERS[container], "bias": jnp.ones(6)}})
    path, leaf = leaf_of({"layer": {"kernel": params["layer"]["kernel"]}})
    assert isinstance(leaf, ScaledLeaf)
    assert path.removesuffix("/value") == "layer/kernel"
    np.testing.assert_array_equal(leaf.dequantize(), values(ARRAY))
    assert list(lj.init(jax.random.key(0), params, {"**/kernel": lj.LoRA(rank=1, alpha=1)})) == ["layer/kernel"]


def test_the_box_of_the_codes_is_the_box_of_the_leaf() -> None:
    params = from_qwix({"kernel": CONTAINERS["boxed codes and scales"]})
    assert isinstance(params["kernel"], nn.Partitioned)
    assert params["kernel"].names == ("a", "b")
    assert isinstance(from_qwix({"kernel": CONTAINERS["NNX variables"]})["kernel"], nnx.Param)


def test_uint4_without_a_type_is_nf4_unless_it_has_zero_points() -> None:
    codes, scale = jnp.asarray([[3], [9]], jnp.uint4), jnp.ones((1, 1))
    found = from_qwix([{"qvalue": codes, "scale": scale}, {"qvalue": codes, "scale": scale, "zero_point": codes[:1]}])
    assert [leaf.dequantize().ravel().tolist() for leaf in found] == [[CODEBOOK[3], CODEBOOK[9]], [0, 6]]


def test_shapes_of_arrays_of_qwix_become_leaves_of_shapes() -> None:
    shapes = jax.eval_shape(lambda: qarray())
    leaf = from_qwix({"w": shapes})["w"]
    assert (leaf.shape, leaf.codes) == ((8, 6), shapes.qvalue)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "int4", "mxfp4"])
def test_an_adapted_array_of_qwix_matches_merged_kernels(kind: str, zero_points: bool) -> None:
    params = from_qwix({"w": WithAux(qarray(kind, zero_points=zero_points and kind != "nf4"))})
    assert_law(lambda p, x: jnp.tanh(x @ p["w"]), params, "w", normal(3, 8))


@pytest.mark.parametrize("tiles", [(3, 2, 6), (1, 2, 6), (3, 1, 1)])
def test_a_scanned_stack_of_qwix_matches_merged_kernels(tiles: tuple[int, ...]) -> None:
    params = from_qwix({"w": qarray("int8", (3, 6, 6), tiles)})
    apply = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w / 100), None), x, p["w"])[0]  # noqa: E731
    assert_law(apply, params, "w", normal(5, 6), axes="bio")
    assert params["w"].sliceable == (tiles[0] == 3)


def test_a_stack_with_zero_points_that_layers_share_is_not_sliced() -> None:
    array = qarray("int8", (3, 6, 6), (3, 1, 1)).replace(zero_point=jnp.ones((1, 1, 1), jnp.int8))
    assert not from_qwix(array).sliceable


def test_a_tree_without_arrays_of_qwix_is_refused() -> None:
    with pytest.raises(lj.CheckpointError, match="none of its 2 leaves has `qvalue` and `scale`") as raised:
        from_qwix({"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)})
    assert "use lora_jax.quant.quantize" in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"qtype": "fp3"}, r"'a/kernel': qtype 'fp3' is unknown; known are int2, .*, and dtypes of at most 8 bits"),
        ({"qtype": jnp.float32}, "qtype .*float32.* is unknown"),
        ({"qtype": object()}, "is unknown"),
        ({"qvalue": jnp.ones((8, 6))}, "qvalue of dtype float32 does not fit qtype 'int4'"),
        ({"qvalue": jnp.ones((8, 6), jnp.float8_e4m3fn), "qtype": "nf4"}, "float8_e4m3fn does not fit qtype 'nf4'"),
        ({"qvalue": None}, "qvalue is not an array, but NoneType"),
        ({"scale": "x"}, "scale is not an array, but str"),
        ({"scale": jnp.ones((2, 6), jnp.int8)}, "scale has dtype int8, and is not floating-point"),
        ({"scale": jnp.ones((3, 6))}, r"scale of shape \(3, 6\) does not divide \(8, 6\)"),
        ({"scale": jnp.ones((0, 6))}, r"scale of shape \(0, 6\) does not divide \(8, 6\)"),
        ({"scale": jnp.ones(6)}, r"scale of shape \(6,\) does not divide \(8, 6\)"),
        ({"zero_point": jnp.ones((8, 4), jnp.int4)}, r"zero_point of shape \(8, 4\) does not divide \(8, 6\)"),
    ],
)
def test_an_array_that_qwix_does_not_make_is_refused(changed: dict[str, Any], message: str) -> None:
    wrong = qarray().replace(qtype="int4").replace(**changed)
    with pytest.raises(lj.CheckpointError, match=message) as raised:
        from_qwix({"a": {"kernel": wrong}, "b": qarray()})
    assert "1 of 2 are not" in str(raised.value)


# Qwix itself, where it is installed


def formats_of_qwix() -> list[tuple[Any, int | None, str]]:
    plain = [
        (qtype, tile, "absmax") for qtype in ("nf4", "int3", "int4", jnp.int8, jnp.float8_e4m3fn) for tile in (None, 16)
    ]
    blocks = [("mxfp8", 32, "absmax"), ("mxfp4", 32, "absmax"), ("nvfp4", 16, "absmax")]
    return [*plain, *blocks, ("int4", 16, "minmax"), ("int8", None, "minmax")]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_values_are_those_of_qwix_bit_for_bit(dtype: Any) -> None:
    qwix = pytest.importorskip("qwix")
    w = normal(64, 6).astype(dtype)
    for qtype, tile, method in formats_of_qwix():
        tiles = {} if tile is None else {0: tile}
        array = qwix.quantize(w, qtype, channelwise_axes=[1], tiled_axes=tiles, calibration_method=method)
        assert bits(dequantize(from_qwix(array))) == bits(qwix.dequantize(array)), qtype


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return x + jnp.tanh(nn.Dense(32, name="mix")(x)), None


class Net(nn.Module):
    """A layer with partition names, and layers that are scanned."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("inputs", "outputs"))
        x = nn.Dense(32, name="up", kernel_init=init)(x)
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
        return nn.scan(Block, **axes)(name="layers")(x, None)[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Qwix uses old names of Flax
@pytest.mark.parametrize("qtype", ["nf4", "int8"])
def test_parameters_of_a_linen_model_that_qwix_has_quantized(qtype: str) -> None:
    qwix = pytest.importorskip("qwix")
    net, x = Net(), normal(3, 64)
    provider = qwix.PtqProvider([qwix.QuantizationRule(weight_qtype=qtype, tile_size=16)])
    quantized = qwix.quantize_model(net, provider)
    stored = quantized.init(jax.random.key(0), x)["params"]
    params = from_qwix(stored)
    apply = lambda params, x: net.apply({"params": params}, x)  # noqa: E731
    spec = {"up/kernel": lj.LoRA(rank=2, alpha=4), "layers/mix/kernel": lj.LoRA(rank=2, alpha=4, axes="bio")}
    adapter = lj.init(jax.random.key(0), params, spec)
    expected = quantized.apply({"params": stored}, x)
    assert_close(lj.lora(apply)(params, adapter, x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Qwix uses old names of Flax
def test_state_of_an_nnx_model_that_qwix_has_quantized() -> None:
    qwix = pytest.importorskip("qwix")
    net, x = nnx.Linear(64, 6, rngs=nnx.Rngs(0)), normal(3, 64)
    provider = qwix.PtqProvider([qwix.QuantizationRule(weight_qtype="nf4", tile_size=32)])
    quantized = qwix.quantize_model(net, provider, x)
    apply, _, rest = lj.nnx.functional(net)
    params = from_qwix(nnx.state(quantized, nnx.Param))
    adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    assert_close(lj.lora(apply)(params, adapter, rest, x)[0], quantized(x))


# bitsandbytes

OUT, IN, BLOCK = 12, 256, 64


def checkpoint(name: str = "up", *, nested: bool = False, seed: int = 0, **changed: Any) -> dict[str, Any]:
    """The tensors of a kernel (OUT, IN) as bitsandbytes stores them. `changed` replaces fields of its state."""
    random, blocks = np.random.default_rng(seed), OUT * IN // BLOCK
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "float32", "shape": [OUT, IN]}
    absmax = random.uniform(0.5, 2, blocks).astype(np.float32)
    tensors = {"": random.integers(0, 256, (OUT * IN // 2, 1), np.uint8), ".absmax": absmax, ".quant_map": CODEBOOK}
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 1.25}
        largest = np.full(-(-blocks // 256), 0.75, np.float32)
        tensors |= {
            ".absmax": random.integers(0, 256, blocks, np.uint8),
            ".nested_absmax": largest,
            ".nested_quant_map": MAP,
        }
    tensors[".quant_state.bitsandbytes__nf4"] = as_json(state | changed)
    return {f"{name}.weight{key}": tensor for key, tensor in tensors.items()}


STATE = "up.weight.quant_state.bitsandbytes__nf4"


def as_json(state: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


def kernel(tensors: dict[str, Any]) -> np.ndarray:
    """The dequantized kernel (OUT, IN)."""
    packed, scales = tensors["up.weight"].ravel(), tensors["up.weight.absmax"]
    if "up.weight.nested_absmax" in tensors:
        scales = MAP[scales] * tensors["up.weight.nested_absmax"][0] + np.float32(1.25)
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1, BLOCK)
    return (CODEBOOK[codes] * scales[:, None]).reshape(OUT, IN)


ARRANGED = {
    "io": ("io", None, (IN, OUT)),
    "oi": ("oi", None, (OUT, IN)),
    "ioo": ("ioo", (IN, 3, 4), (IN, 3, 4)),
    "iio, blocks in one axis": ("iio", (2, 128, OUT), (2, 128, OUT)),
    "iio, blocks across axes": ("iio", (8, 32, OUT), (8, 32, OUT)),
    "oiio": ("oiio", [3, 16, 16, 4], (3, 16, 16, 4)),
    "ioi": ("ioi", (2, OUT, 128), (2, OUT, 128)),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("arranged", ARRANGED)
def test_a_kernel_of_bitsandbytes_is_arranged_by_its_axes(arranged: str, nested: bool) -> None:
    axes, shape, expected_shape = ARRANGED[arranged]
    tensors = checkpoint(nested=nested)
    leaf = from_bitsandbytes(tensors, "up", axes=axes, shape=shape)
    assert (type(leaf), leaf.shape, leaf.dtype) == (NF4Leaf, expected_shape, jnp.float32)
    order = sorted(range(len(axes)), key=lambda axis: (axes[axis] == "i", axis))
    dense = kernel(tensors).reshape([expected_shape[axis] for axis in order]).transpose(np.argsort(order))
    np.testing.assert_allclose(leaf.dequantize(), dense, rtol=3e-7)
    assert isinstance(leaf.scales, DoubleScales) == nested


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(IN, OUT), (IN, 3, 4), (2, 128, OUT), (8, 32, OUT)])
def test_a_kernel_of_bitsandbytes_has_the_layout_of_quantize(shape: tuple[int, ...], nested: bool) -> None:
    axes = "iio" if shape[-1] == OUT and len(shape) == 3 else "ioo"[: len(shape)]
    tensors = checkpoint(nested=nested)
    leaf = from_bitsandbytes(tensors, "up", axes=axes, shape=shape)
    expected = jax.eval_shape(lambda: NF4(block=BLOCK, double=nested).quantize(jnp.zeros(shape), axes))
    assert [x.shape for x in jax.tree.leaves(leaf)] == [x.shape for x in jax.tree.leaves(expected)]
    assert (leaf.axis, leaf.inputs, leaf.dtype) == (expected.axis, expected.inputs, expected.dtype)
    assert sum(x.nbytes for x in jax.tree.leaves(leaf)) < 5 / 8 * IN * OUT


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_that_of_the_kernel_which_was_quantized(name: str) -> None:
    tensors = checkpoint(dtype=name)
    assert from_bitsandbytes(tensors, "up").dtype == jnp.dtype(name)
    assert from_bitsandbytes(tensors, "up", dtype=jnp.bfloat16).dequantize().dtype == jnp.bfloat16


def test_tensors_can_be_arrays_of_jax_with_other_shapes() -> None:
    tensors = checkpoint(nested=True)
    flat = {key: jnp.asarray(tensor).reshape(1, -1) for key, tensor in tensors.items()} | {"other": jnp.ones(3)}
    assert bits(from_bitsandbytes(flat, "up")) == bits(from_bitsandbytes(tensors, "up"))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(IN, OUT), (8, 32, OUT)])
def test_an_adapted_kernel_of_bitsandbytes_matches_merged_kernels(shape: tuple[int, ...], nested: bool) -> None:
    axes = "i" * (len(shape) - 1) + "o"
    params = {"w": from_bitsandbytes(checkpoint(nested=nested), "up", shape=shape, axes=axes)}
    apply = lambda p, x: jnp.tanh(jnp.tensordot(x, p["w"], len(shape) - 1) / 16)  # noqa: E731
    assert_law(apply, params, "w", normal(3, *shape[:-1]), axes=axes)


@pytest.mark.parametrize("nested", [False, True])
def test_stacked_kernels_of_bitsandbytes_match_merged_kernels(nested: bool) -> None:
    leaves = [from_bitsandbytes(checkpoint(nested=nested, seed=seed), "up") for seed in range(3)]
    params = {"w": jax.tree.map(lambda *arrays: jnp.stack(arrays), *leaves)}
    for got, leaf in zip(params["w"].dequantize(), leaves, strict=True):
        np.testing.assert_array_equal(got, leaf.dequantize())
    assert params["w"].sliceable

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tile(jnp.tanh(x @ w / 16), (1, IN // OUT + 1))[:, :IN], None), x, p["w"])[
            0
        ]

    assert_law(apply, params, "w", normal(3, IN), axes="bio")


def without(tensors: dict[str, Any], *endings: str) -> dict[str, Any]:
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(endings)}


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "no tensor": (lambda: checkpoint("down"), r"missing are:\n  up.weight\n(.*\n)*  The nearest names:\n  down.weight"),
    "not quantized": (
        lambda: {"up.weight": np.ones((OUT, IN), np.float32)},
        r"missing are:\n  up.weight.absmax\n  up.weight.quant_map\n.*\n  There are:\n  up.weight\n.*without `.weight`",
    ),
    "no scales": (
        lambda: without(checkpoint(), "absmax"),
        r"missing are:\n  up.weight.absmax\n  There are:\n  up.weight",
    ),
    "no second scales": (
        lambda: without(checkpoint(nested=True), ".nested_absmax"),
        r"are:\n  up.weight.nested_absmax",
    ),
    "no second table": (
        lambda: without(checkpoint(nested=True), ".nested_quant_map"),
        "are:\n  up.weight.nested_quant_m",
    ),
    "FP4": (
        lambda: {key.replace("nf4", "fp4"): tensor for key, tensor in checkpoint().items()},
        "Expected 'up.weight' in NF4; it is in FP4, which is not supported",
    ),
    "FP4 inside": (lambda: checkpoint(quant_type="fp4"), "an object with `quant_type` 'nf4'; got {"),
    "not JSON": (
        lambda: checkpoint() | {STATE: np.arange(9, dtype=np.uint8)},
        "Expected JSON in 'up.weight.quant_state",
    ),
    "not UTF-8": (lambda: checkpoint() | {STATE: np.full(9, 255, np.uint8)}, "Expected JSON in 'up.weight.quant_state"),
    "deep JSON": (
        lambda: checkpoint() | {STATE: np.frombuffer(b"[" * 200_000 + b"]" * 200_000, np.uint8)},
        "Expected JSON in|an object with",
    ),
    "a long number": (
        lambda: checkpoint() | {STATE: np.frombuffer(b"1" * 5000, np.uint8)},
        "Expected JSON in 'up.weight.quant_state",
    ),
    "not an object": (lambda: checkpoint() | {STATE: as_json([1])}, r"`quant_type` 'nf4'; got \[1\]"),
    "state of another dtype": (
        lambda: checkpoint() | {STATE: np.ones(9, np.float32)},
        r"Expected 'up.weight.quant_state.bitsandbytes__nf4' to be a uint8 tensor; got float32 of shape \(9,\)",
    ),
    "no fields": (
        lambda: checkpoint() | {STATE: as_json({"quant_type": "nf4"})},
        "fields 'blocksize', 'shape', 'dtype'; got",
    ),
    "no second fields": (
        lambda: checkpoint(nested=True) | {STATE: checkpoint()[STATE]},
        "the fields 'nested_blocksize', 'nested_offset'; got",
    ),
    "an odd block": (lambda: checkpoint(blocksize=63), "an even `blocksize`; got 63"),
    "a block of true": (lambda: checkpoint(blocksize=True), "an even `blocksize`; got True"),
    "a block without size": (lambda: checkpoint(blocksize=0), "an even `blocksize`; got 0"),
    "blocks across outputs": (
        lambda: checkpoint(blocksize=512),
        "blocks that divide the inputs of 'up.weight'; there are 256 inputs, in blocks of 512",
    ),
    "a vector": (lambda: checkpoint(shape=[IN]), r"a `shape` of two sizes, outputs and inputs; got \[256\]"),
    "a shape of text": (lambda: checkpoint(shape="ab"), "a `shape` of two sizes, outputs and inputs; got 'ab'"),
    "a huge shape": (lambda: checkpoint(shape=[10**4000, 64]), "a `shape` of two sizes, outputs and inputs; got"),
    "another shape": (
        lambda: checkpoint(shape=[OUT, 128]),
        r"'up.weight' to be a uint8 tensor of 768 elements; got uint8 of",
    ),
    "float8": (
        lambda: checkpoint(dtype="float8_e4m3fn"),
        "a `dtype` out of float32, bfloat16, float16; got 'float8_e4m3fn'",
    ),
    "a dtype of numbers": (lambda: checkpoint(dtype=[1]), r"a `dtype` out of .*; got \[1\]"),
    "other blocks of scales": (
        lambda: checkpoint(nested=True, nested_blocksize=128),
        "blocks of 256; got `nested_blocksize` 128",
    ),
    "an infinite offset": (
        lambda: checkpoint(nested=True, nested_offset=float("inf")),
        "a finite `nested_offset`; got inf",
    ),
    "a huge offset": (lambda: checkpoint(nested=True, nested_offset=10**400), "a finite `nested_offset`; got 1000"),
    "an offset of text": (lambda: checkpoint(nested=True, nested_offset="1"), "a finite `nested_offset`; got '1'"),
    "other values": (
        lambda: checkpoint() | {"up.weight.quant_map": CODEBOOK + np.float32(0.01)},
        "'up.weight.quant_map' the 16 values of bitsandbytes; they differ by up to 0.01",
    ),
    "other values of scales": (
        lambda: checkpoint(nested=True) | {"up.weight.nested_quant_map": MAP[::-1].copy()},
        "'up.weight.nested_quant_map' the 256 values of bitsandbytes; they differ by up to 2",
    ),
    "truncated weights": (
        lambda: checkpoint() | {"up.weight": np.ones((700, 1), np.uint8)},
        r"'up.weight' to be a uint8 tensor of 1536 elements; got uint8 of shape \(700, 1\).\n  The checkpoint may be",
    ),
    "weights in another dtype": (
        lambda: checkpoint() | {"up.weight": np.ones((768, 1), np.float16)},
        r"got float16 of shape .*\n  Packed weights of another dtype \(`bnb_4bit_quant_storage`\) must be",
    ),
    "truncated scales": (
        lambda: checkpoint() | {"up.weight.absmax": np.ones(40, np.float32)},
        "'up.weight.absmax' to be a float32 tensor of 48 elements; got float32",
    ),
    "scales that are not quantized": (
        lambda: checkpoint(nested=True) | {"up.weight.absmax": np.ones(48, np.float32)},
        "'up.weight.absmax' to be a uint8 tensor of 48 elements; got float32",
    ),
    "too many second scales": (
        lambda: checkpoint(nested=True) | {"up.weight.nested_absmax": np.ones(2, np.float32)},
        "'up.weight.nested_absmax' to be a float32 tensor of 1 elements",
    ),
    "a scale that is not finite": (
        lambda: checkpoint() | {"up.weight.absmax": np.full(48, np.nan, np.float32)},
        "Expected finite scales in 'up.weight.absmax'",
    ),
    "text": (
        lambda: checkpoint() | {"up.weight": "text"},
        "'up.weight' to be a uint8 tensor of 1536 elements; got <U4",
    ),
    "a ragged list": (lambda: checkpoint() | {"up.weight": [[1], [1, 2]]}, "'up.weight' to be convertible to NumPy"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_kernel_that_bitsandbytes_does_not_store_is_refused(what: str) -> None:
    tensors, message = REFUSED[what]
    with pytest.raises(lj.CheckpointError, match=message):
        from_bitsandbytes(tensors(), "up")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axes": "bio"}, "`axes` of `i` and `o`, both of them, such as 'io' or 'ioo'; got 'bio'"),
        ({"axes": "ii"}, "got 'ii'"),
        ({"axes": None}, "got None"),
        ({"axes": "ioo"}, "a `shape` for axes 'ioo' with 256 inputs and 12 outputs, as 'up' has; got None"),
        ({"axes": "ioo", "shape": (IN, 3, 5)}, r"got \(256, 3, 5\)"),
        ({"axes": "ioo", "shape": (IN, OUT)}, r"got \(256, 12\)"),
        ({"shape": (OUT, IN)}, r"got \(12, 256\)"),
        ({"shape": "io"}, "Expected a list of integers for `shape`"),
        (
            {"axes": "ioi", "shape": (64, OUT, 4)},
            r"Cannot arrange 'up' as \(64, 12, 4\) with axes 'ioi': expected its inputs to be a multiple of block=64; "
            r"there are 4",
        ),
        ({"dtype": jnp.int8}, "Expected a floating-point `dtype`"),
        ({"dtype": "wide"}, "Expected a floating-point `dtype`; got 'wide'"),
    ],
)
def test_an_arrangement_that_does_not_fit_the_kernel_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(lj.SpecError, match=message):
        from_bitsandbytes(checkpoint(), "up", **arguments)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([64, "nf4", "float16"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
FIELDS = ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"]
ANY_TENSOR = st.builds(
    lambda dtype, shape: np.ones(shape, dtype),
    st.sampled_from([np.uint8, np.float32, np.float16, np.int64, np.bool_, np.complex64]),
    st.lists(st.integers(0, 48), max_size=2),
)


@given(st.booleans(), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=2), st.data())
def test_a_damaged_checkpoint_is_read_or_refused(nested: bool, fields: dict[str, Any], data: st.DataObject) -> None:
    tensors = checkpoint(nested=nested, **fields)
    for key in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2)):
        tensors[key] = data.draw(ANY_TENSOR | st.binary(max_size=9).map(lambda raw: np.frombuffer(raw, np.uint8)))
    try:
        leaf = from_bitsandbytes(tensors, "up")
    except lj.CheckpointError:
        return
    assert np.all(np.isfinite(leaf.dequantize()))
