"""Quantized bases: the formats against NumPy, the law on models that nobody changed, and what a step keeps."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from evaluate import without_compiling
from helpers import FORWARD, GRADIENT, assert_close, assert_few_ulp, bits, sweep, trained
from jax.sharding import NamedSharding, PartitionSpec
from law import normal, total
from uses import USES

import lora_jax as lj
from lora_jax import quant
from lora_jax._core.paths import flatten
from lora_jax.quant._double import MAP
from lora_jax.quant._nf4 import CODEBOOK

NF4, INT8, FLOAT8 = quant.NF4(), quant.Int8(), quant.Float8()
FORMATS = {"NF4": NF4, "NF4, single": quant.NF4(double=False), "int8": INT8, "fp8": FLOAT8}


# The formats


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    return np.abs(values[..., None].astype(np.float64) - table).argmin(-1)


def nf4_by_hand(matrix: np.ndarray, block: int, *, double: bool) -> np.ndarray:
    """Quantizes and dequantizes a matrix (out, in) as in the paper's appendix, on flat blocks."""
    blocks = matrix.reshape(-1, block)
    scales = np.abs(blocks).max(1)
    codes = nearest(blocks / scales[:, None], CODEBOOK)
    if double:
        offset = scales.mean()
        centered = scales - offset
        for start in range(0, scales.size, 256):
            part = centered[start : start + 256]
            largest = np.abs(part).max()
            scales[start : start + 256] = MAP[nearest(part / largest, MAP)] * largest + offset
    return (CODEBOOK[codes] * scales[:, None]).reshape(matrix.shape)


# How a kernel becomes PyTorch's (out, in).
MATRICES = {
    "io": ((128, 24), lambda w: w.T),
    "oi": ((24, 128), lambda w: w),
    "ioo": ((128, 3, 8), lambda w: w.reshape(128, 24).T),
    "iio": ((4, 32, 24), lambda w: w.reshape(128, 24).T),  # a block is two heads
    "iio, wide": ((2, 64, 24), lambda w: w.reshape(128, 24).T),
}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("case", MATRICES)
def test_nf4_matches_the_paper(case: str, double: bool) -> None:
    shape, as_matrix = MATRICES[case]
    w = np.asarray(normal(*shape))
    leaf = quant.NF4(double=double).quantize(jnp.asarray(w), case.split(",")[0])
    assert leaf.shape == w.shape and leaf.dtype == jnp.float32
    assert_few_ulp(as_matrix(np.asarray(leaf.dequantize())), nf4_by_hand(as_matrix(w), 64, double=double))


def test_the_dynamic_map_is_symmetric_but_for_its_ends() -> None:
    assert MAP.size == 256 and MAP[-1] == 1 and MAP[127] == 0
    np.testing.assert_array_equal(MAP[:127], -MAP[128:-1][::-1])


@pytest.mark.parametrize(
    ("name", "error", "bits_per_weight"),
    [("NF4", 0.0920, 4.13), ("NF4, single", 0.0919, 4.5), ("int8", 0.0079, 8.1), ("fp8", 0.0265, 8.1)],
)
def test_error_and_bits_on_a_gaussian(name: str, error: float, bits_per_weight: float) -> None:
    w = normal(1024, 256)
    leaf = quant.quantize({"w": w}, {"w": FORMATS[name]})["w"]
    assert leaf.nbytes * 8 / leaf.size <= bits_per_weight
    got = float(jnp.linalg.norm(leaf.dequantize() - w) / jnp.linalg.norm(w))
    assert got == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_zeros_stay_zero_and_the_largest_is_exact(name: str, dtype: str) -> None:
    w = jnp.zeros((128, 4), dtype).at[5, 1].set(3).at[70, 2].set(-0.5)
    leaf = quant.NF4(double=False) if name == "NF4" else FORMATS[name]
    got = quant.dequantize(quant.quantize({"w": w}, {"w": leaf}))["w"]
    assert got.dtype == w.dtype
    assert_few_ulp(got, w)


def test_batch_axes_are_quantized_separately() -> None:
    w = normal(3, 2, 128, 6)
    spec = {"w": quant.NF4(axes="bbio")}
    stacked = quant.quantize({"w": w}, spec)["w"]
    for layer in range(3):
        for expert in range(2):
            single = quant.quantize({"w": w[layer, expert]}, {"w": NF4})["w"]
            assert_few_ulp(jax.tree.map(lambda x: x[layer, expert], stacked).dequantize(), single.dequantize())  # noqa: B023


# Leaves of a tree


@pytest.mark.parametrize("name", FORMATS)
def test_a_leaf_is_a_pytree_with_one_path(name: str, tmp_path: Any) -> None:
    params = {"dense": {"kernel": normal(128, 6), "bias": normal(6)}}
    small = quant.quantize(params, {"**/kernel": FORMATS[name]})
    assert list(flatten(small)[0]) == ["dense/bias", "dense/kernel"]
    shapes = jax.eval_shape(functools.partial(quant.quantize, spec={"**/kernel": FORMATS[name]}), params)
    assert jax.tree.structure(shapes) == jax.tree.structure(small)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(shapes)] == [(x.shape, x.dtype) for x in jax.tree.leaves(small)]
    abstract = quant.quantize(jax.eval_shape(lambda: params), {"**/kernel": FORMATS[name]})
    assert jax.tree.structure(abstract) == jax.tree.structure(small)
    assert shapes["dense"]["kernel"].shape == (128, 6)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "base", small)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "base", shapes)
    assert bits(restored) == bits(small)


def test_leaves_are_quantized_one_at_a_time_and_deleted() -> None:
    params = {"one": normal(64, 4), "two": normal(64, 4), "norm": normal(4)}
    kept = quant.quantize(params, {"one": NF4})
    assert not params["one"].is_deleted() and kept["two"] is params["two"]
    quant.quantize(params, {"{one,two}": NF4}, donate=True)
    assert params["one"].is_deleted() and params["two"].is_deleted() and not params["norm"].is_deleted()


def test_a_tied_array_is_deleted_once_no_leaf_holds_it() -> None:
    tied = normal(64, 4)
    small = quant.quantize({"embedding": tied, "head": tied}, {"head": NF4}, donate=True)
    assert small["embedding"] is tied and not tied.is_deleted()
    quant.quantize({"embedding": tied, "head": tied}, {"*": NF4}, donate=True)
    assert tied.is_deleted()


def test_numpy_leaves_and_a_second_call() -> None:
    params = {"one": np.asarray(normal(64, 4)), "two": np.asarray(normal(64, 8), np.float16)}
    once = quant.quantize(params, {"one": INT8})
    twice = quant.quantize(once, {"two": INT8})
    assert twice["one"] is once["one"]
    assert twice["two"].dtype == jnp.float16
    with pytest.raises(lj.SpecError, match="are already quantized"):
        quant.quantize(twice, {"*": INT8})


# Models


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(32, name="down")(nn.gelu(nn.Dense(64, name="up")(x))), None


class Decoder(nn.Module):
    """A decoder with a tied head and layers that are scanned with remat, or unrolled."""

    scanned: bool
    layers: int = 2

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        table = nn.Embed(40, 32, name="embed")
        x = table(tokens)
        if self.scanned:
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": self.layers}
            x = nn.scan(nn.remat(Block), **axes)(name="layers")(x, None)[0]
        else:
            for layer in range(self.layers):
                x = Block(name=f"layer_{layer}")(x, None)[0]
        return table.attend(x)


@functools.cache
def decoder(*, scanned: bool) -> tuple[Any, Any, jax.Array, Any]:
    tokens = jnp.arange(12).reshape(2, 6)
    net = Decoder(scanned)
    params = jax.jit(net.init)(jax.random.key(0), tokens)["params"]
    apply = lambda params, tokens: net.apply({"params": params}, tokens)  # noqa: E731
    return apply, params, tokens, lj.kernels(apply, params, tokens)


SMALL_FORMATS = {"NF4": quant.NF4(block=16), "int8": INT8, "fp8": FLOAT8}


@pytest.mark.parametrize(
    ("name", "scanned", "variant"),
    [
        ("NF4", False, lj.LoRA),
        ("NF4", True, lj.LoRA),
        ("NF4", True, lj.DoRA),
        sweep("NF4", False, lj.VeRA),
        sweep("int8", True, lj.LoRA),
        sweep("fp8", True, lj.LoRA),
    ],
)
def test_a_model_on_a_quantized_base_matches_merged_kernels(name: str, scanned: bool, variant: Any, key: Any) -> None:
    apply, params, tokens, kernels = decoder(scanned=scanned)
    small = quant.quantize(params, {"**/{kernel,embedding}": SMALL_FORMATS[name]}, kernels=kernels)
    options = {"rank": 2, "seed": 0} if variant is lj.VeRA else {"rank": 2, "alpha": 3}
    adapter = trained(key, lj.init(key, small, {"**/{up,query,out}/kernel": variant(**options)}, kernels=kernels), 0.1)

    def gradient(run: Any, adapter: Any) -> Any:
        return jax.value_and_grad(lambda adapter: total(run(adapter)))(adapter)

    def both(adapter: Any, small: Any) -> Any:
        base = quant.dequantize(small)
        adapted = lambda adapter: lj.lora(apply)(small, adapter, tokens)  # noqa: E731
        merged = lambda adapter: apply(lj.merge(base, adapter), tokens)  # noqa: E731
        return gradient(adapted, adapter), gradient(merged, adapter)

    (got, got_gradient), (expected, expected_gradient) = without_compiling(both)(adapter, small)
    assert_close(got, expected, FORWARD)
    assert_close(got_gradient, expected_gradient, GRADIENT)


def residuals(apply: Any, params: Any, adapter: Any, *args: Any) -> list[Any]:
    """The arrays that the forward pass keeps for the gradient of the adapter."""

    def backward(params: Any, adapter: Any, args: Any) -> Any:
        return jax.vjp(lambda adapter: total(lj.lora(apply)(params, adapter, *args)), adapter)[1]

    return jax.tree.leaves(jax.eval_shape(backward, params, adapter, args))


def floats_of_size(arrays: Any, shape: tuple[int, ...]) -> list[Any]:
    wanted = sorted(size for size in shape if size > 1)
    return [
        x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating) and sorted(s for s in x.shape if s > 1) == wanted
    ]


@pytest.mark.parametrize("use", USES)
def test_the_backward_pass_keeps_no_dense_kernel(use: str) -> None:
    case = USES[use]
    axes = case.axes or case.roles
    small = quant.quantize(case.params, {"w": quant.Int8(axes=axes)})
    adapter = lj.init(jax.random.key(0), small, {"w": lj.LoRA(rank=2, alpha=3, axes=axes)})
    kept = floats_of_size(residuals(case.apply, small, adapter, *case.arrays), case.kernel)
    activations = [x for x in case.arrays if floats_of_size([x], case.kernel)]  # of the same shape by chance
    assert len(kept) <= len(activations)


@pytest.mark.parametrize("scanned", [False, True])
def test_the_backward_pass_of_a_decoder_keeps_codes(scanned: bool, key: Any) -> None:
    apply, params, tokens, kernels = decoder(scanned=scanned)
    small = quant.quantize(params, {"**/{kernel,embedding}": quant.NF4(block=16)}, kernels=kernels)
    adapter = lj.init(key, small, {"**/kernel": lj.LoRA(rank=2, alpha=3)}, kernels=kernels)
    kept = residuals(apply, small, adapter, tokens)
    for leaf in jax.tree.leaves(small, is_leaf=lambda x: isinstance(x, quant.QuantizedLeaf)):
        if isinstance(leaf, quant.QuantizedLeaf):
            assert not floats_of_size(kept, leaf.shape)
    assert [x for x in kept if x.dtype == jnp.uint8]


def temporary(function: Any, *args: Any) -> int:
    analysis = jax.jit(function).lower(*args).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def test_a_scanned_step_holds_one_dense_layer_at_a_time() -> None:
    """The temporary memory of the compiled step on NF4 grows by activations only, not by kernels."""

    def layer(x: Any, w: Any) -> Any:
        return jnp.tanh(x @ w), None

    def step(count: int, format_: Any) -> int:
        run = lambda p, x: jax.lax.scan(jax.checkpoint(layer), x, p["w"])[0]  # noqa: E731
        params = {"w": jnp.zeros((count, 256, 256))}
        if format_ is not None:
            params = quant.quantize(params, {"w": format_})
        adapter = lj.init(jax.random.key(0), params, {"w": lj.LoRA(rank=2, alpha=2, axes="bio")})
        loss = lambda adapter, params, x: lj.lora(run)(params, adapter, x).sum()  # noqa: E731
        return temporary(jax.grad(loss), adapter, params, jnp.zeros((4, 256)))

    kernel = 256 * 256 * 4
    assert step(16, quant.NF4(axes="bio")) - step(4, quant.NF4(axes="bio")) < kernel
    assert step(16, quant.NF4(axes="bio")) < 6 * kernel


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="XLA of JAX 0.10 removes barriers before it schedules")
def test_an_unrolled_step_holds_few_dense_layers_at_a_time() -> None:
    def step(count: int) -> int:
        run = lambda p, x: functools.reduce(lambda x, name: jnp.tanh(x @ p[name]), sorted(p), x)  # noqa: E731
        params = quant.quantize({f"w{n:02}": jnp.zeros((256, 256)) for n in range(count)}, {"*": quant.NF4()})
        adapter = lj.init(jax.random.key(0), params, {"*": lj.LoRA(rank=2, alpha=2)})
        loss = lambda adapter, params, x: lj.lora(run)(params, adapter, x).sum()  # noqa: E731
        return temporary(jax.grad(loss), adapter, params, jnp.zeros((4, 256)))

    kernel = 256 * 256 * 4
    assert step(12) - step(4) < 2 * kernel


def test_a_lookup_dequantizes_only_its_rows() -> None:
    ids = jnp.array([[3, 0], [499, -1]])
    for apply in (lambda p, ids: p["t"][ids], lambda p, ids: jnp.take(p["t"], ids, axis=0, mode="clip")):
        for format_ in (quant.NF4(axes="oi"), quant.NF4(double=False, axes="oi"), quant.Int8(axes="oi")):
            small = quant.quantize({"t": normal(500, 128)}, {"t": format_})
            adapter = lj.init(jax.random.key(0), small, {"t": lj.LoRA(rank=2, alpha=3)})
            jaxpr = jax.make_jaxpr(lj.lora(apply))(small, adapter, ids)
            shapes = [var.aval.shape for var in all_results(jaxpr.jaxpr) if var.aval.size >= 500 * 64]
            assert not shapes
            assert_few_ulp(lj.lora(apply)(small, adapter, ids), apply(quant.dequantize(small), ids))


def all_results(jaxpr: Any) -> Any:
    for eqn in jaxpr.eqns:
        yield from eqn.outvars
        for sub in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                yield from all_results(getattr(sub, "jaxpr", sub))


def test_a_lookup_beyond_the_end_is_filled() -> None:
    small = quant.quantize({"t": normal(10, 64)}, {"t": quant.NF4(axes="oi")})
    apply = lambda p, ids: jnp.take(p["t"], ids, axis=0, mode="fill", fill_value=7)  # noqa: E731
    adapter = lj.init(jax.random.key(0), small, {"t": lj.LoRA(rank=2, alpha=3)})
    got = lj.lora(apply)(small, adapter, jnp.array([1, 10, 30]))
    assert_few_ulp(got[0], quant.dequantize(small)["t"][1])
    assert np.all(np.asarray(got[1:]) == 7)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8])
def test_more_bytes_may_be_looked_up_than_their_dtype_can_count(dtype: Any) -> None:
    small = quant.quantize({"t": normal(200, 64)}, {"t": quant.NF4(axes="oi")})
    adapter = lj.init(jax.random.key(0), small, {"t": lj.LoRA(rank=2, alpha=3)})
    for mode in ("clip", "fill"):
        apply = lambda p, ids, mode=mode: jnp.take(p["t"], ids, axis=0, mode=mode)  # noqa: E731
        ids = jnp.tile(jnp.array([0, 3, 127], dtype), 200)
        assert_few_ulp(lj.lora(apply)(small, adapter, ids), apply(quant.dequantize(small), ids))


def test_a_second_call_compiles_nothing(caplog: pytest.LogCaptureFixture, key: Any) -> None:
    apply, params, tokens, kernels = decoder(scanned=True)
    small = quant.quantize(params, {"**/kernel": quant.NF4(block=16)}, kernels=kernels)
    adapter = lj.init(key, small, {"**/query/kernel": lj.LoRA(rank=2, alpha=3)}, kernels=kernels)
    run = jax.jit(lj.lora(apply))
    run(small, adapter, tokens)
    other = quant.quantize(jax.tree.map(lambda x: 2 * x, params), {"**/kernel": quant.NF4(block=16)}, kernels=kernels)
    with jax.log_compiles():
        run(other, adapter, tokens)
    assert not [record for record in caplog.records if "Compiling" in record.message]


# Meshes


@pytest.mark.parametrize("spec", [PartitionSpec("x", None), PartitionSpec(None, "x"), PartitionSpec("x", "y")])
@pytest.mark.parametrize("name", FORMATS)
def test_a_sharded_kernel_is_quantized_where_it_is(name: str, spec: PartitionSpec) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    w = normal(512, 8)
    placed = jax.device_put(w, NamedSharding(mesh, spec))
    leaf = quant.quantize({"w": placed}, {"w": FORMATS[name]})["w"]
    assert leaf.codes.sharding.spec == spec and leaf.sharding.spec == spec
    assert_few_ulp(leaf.dequantize(), quant.quantize({"w": w}, {"w": FORMATS[name]})["w"].dequantize())
    places = quant.shardings({"w": leaf}, {"w": placed.sharding})["w"]
    assert jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), leaf, places).codes


# Errors


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "not finite": ({"w": jnp.full((64, 4), jnp.nan)}, {"w": NF4}, "NaN or infinity"),
    "blocks do not divide": (
        {"w": jnp.ones((60, 4))},
        {"w": NF4},
        "multiple of block=64; there are 60.\n  Give these leaves another block",
    ),
    "integers": ({"w": jnp.ones((64, 4), jnp.int32)}, {"w": NF4}, "not floating-point"),
    "a vector": ({"bias": jnp.ones(64)}, {"bias": NF4}, "it is a vector"),
    "unknown axes": ({"w": jnp.ones((64, 4, 4))}, {"w": INT8}, "is not known"),
    "no inputs": ({"w": jnp.ones((64, 4))}, {"w": quant.Int8(axes="oo")}, "needs input and output axes"),
    "a variant": ({"w": jnp.ones((64, 4))}, {"w": lj.LoRA(rank=1, alpha=1)}, "a format such as NF4"),
    "no match": ({"w": jnp.ones((64, 4))}, {"v": NF4}, "matches none"),
    "no spec": ({"w": jnp.ones((64, 4))}, NF4, "a mapping such as"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_an_error_and_loses_nothing(case: str) -> None:
    params, spec, message = BAD[case]
    with pytest.raises(lj.SpecError, match=message):
        quant.quantize(params, spec, donate=True)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(("block", "message"), [(0, "at least 2"), (63, "even"), (2.5, "integer"), (True, "integer")])
def test_a_bad_block_is_an_error(block: Any, message: str) -> None:
    with pytest.raises(lj.SpecError, match=message):
        quant.NF4(block=block)


def test_under_jit_a_block_that_is_not_finite_is_nan() -> None:
    w = jnp.ones((128, 4)).at[3, 1].set(jnp.inf)
    got = jax.jit(lambda w: quant.dequantize(quant.quantize({"w": w}, {"w": quant.NF4(double=False)}))["w"])(w)
    assert np.all(np.isnan(np.asarray(got)[:64, 1])) and np.all(np.isfinite(np.asarray(got)[64:]))
    assert np.all(np.isfinite(np.asarray(got)[:, 0]))
