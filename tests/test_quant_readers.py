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
