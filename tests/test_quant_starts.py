"""Initializations on quantized bases: LoftQ and QPiSSA reduce the error, and the others work or say why not."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, sweep_except
from law import normal

import lora_jax as lj
from lora_jax import quant, starts

# Shape, axes of the factors, and axes of the format of each kernel. As matrices, most are (16, 8), to compile once.
KERNELS: dict[str, tuple[tuple[int, ...], str, str]] = {
    "dense": ((16, 8), "io", "io"),
    "query": ((16, 2, 4), "ioo", "ioo"),
    "out": ((2, 8, 8), "iio", "iio"),
    "experts": ((2, 3, 16, 8), "bbio", "bbio"),
    "embedding": ((8, 16), "io", "oi"),
}
FORMATS: dict[str, Callable[[str], Any]] = {
    "NF4": lambda axes: quant.NF4(block=16, double=axes == "io", axes=axes),
    "Int8": lambda axes: quant.Int8(axes=axes),
    "Float8": lambda axes: quant.Float8(axes=axes),
}
PARAMS = {path: normal(*shape, seed=at) for at, (path, (shape, *_)) in enumerate(KERNELS.items())}
METHODS = {"loftq": starts.loftq, "qpissa": starts.qpissa}


def formats(name: str) -> Any:
    return {path: FORMATS[name](axes) for path, (_, _, axes) in KERNELS.items()}


def adapter(alpha: float = 3, variant: Any = lj.LoRA) -> Any:
    spec = {path: variant(rank=2, alpha=alpha, axes=axes) for path, (_, axes, _) in KERNELS.items()}
    return lj.init(jax.random.key(0), PARAMS, spec)


@functools.cache
def started(method: str, form: str, iterations: int = 1, alpha: float = 3, variant: Any = lj.LoRA) -> Any:
    paths = KERNELS if iterations == 1 and alpha == 3 else ("dense", "experts")  # compiling takes most of the time
    chosen = {path: format_ for path, format_ in formats(form).items() if path in paths}
    part = {path: part for path, part in adapter(alpha, variant).items() if path in paths}
    return METHODS[method](PARAMS, part, chosen, iterations=iterations)


def error(got: Any, path: str) -> float:
    return float(jnp.linalg.norm((PARAMS[path] - got[path]).ravel()))


def errors(start: Any) -> dict[str, float]:
    """‖W - Q - s·A·B‖ of each kernel."""
    merged = lj.merge(quant.dequantize(start.params), start.adapter)
    return {path: error(merged, path) for path in start.adapter}


@functools.cache
def plain_errors(form: str) -> dict[str, float]:
    dense = quant.dequantize(quant.quantize(PARAMS, formats(form)))
    return {path: error(dense, path) for path in KERNELS}


@pytest.mark.parametrize("form", sweep_except(["NF4"], FORMATS))
@pytest.mark.parametrize("method", METHODS)
def test_the_error_is_smaller_than_that_of_quantizing(method: str, form: str) -> None:
    found = errors(started(method, form))
    assert all(found[path] < 0.95 * plain for path, plain in plain_errors(form).items()), found


@pytest.mark.parametrize("method", METHODS)
def test_more_iterations_reduce_the_error(method: str) -> None:
    one, four = errors(started(method, "NF4")), errors(started(method, "NF4", 4))
    assert all(error < 0.95 * one[path] for path, error in four.items()), (one, four)


@pytest.mark.parametrize("method", METHODS)
def test_the_result_does_not_depend_on_alpha(method: str) -> None:
    expected = started(method, "NF4", 2)  # a scale of 1.5; that of the other is 48/√2
    other = started(method, "NF4", 2, 48, lj.RSLoRA)
    assert errors(other) == pytest.approx({path: errors(expected)[path] for path in other.adapter}, rel=1e-3)
    parts = [start.adapter["dense"] for start in (expected, other)]
    ratio = [float(jnp.linalg.norm(part.a) / jnp.linalg.norm(part.b)) for part in parts]
    assert ratio == pytest.approx([1, 1], rel=1e-4)  # split by square roots


@pytest.mark.parametrize("method", METHODS)
def test_quantized_leaves_are_those_of_quantize(method: str) -> None:
    start = started(method, "NF4")
    plain = quant.quantize(PARAMS, formats("NF4"))
    assert jax.tree.structure(start.params) == jax.tree.structure(plain)
    equal = {path: np.array_equal(start.params[path].codes, plain[path].codes) for path in KERNELS}
    assert set(equal.values()) == {method == "loftq"}
    assert {path: part.variant for path, part in start.adapter.items()} == {
        path: part.variant for path, part in adapter().items()
    }


# The algorithms in NumPy


def nf4(w: np.ndarray) -> np.ndarray:
    """Rounds (in, out) to NF4 in blocks of 16 inputs, and back."""
    values = np.asarray(quant._nf4.CODEBOOK)
    blocks = w.astype(np.float32).reshape(-1, 16, w.shape[1])
    scales = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs(blocks[..., None] / scales[..., None] - values).argmin(-1)
    return (values[nearest] * scales).reshape(w.shape)


def int8(w: np.ndarray) -> np.ndarray:
    scales = np.abs(w.astype(np.float32)).max(0) / 127
    return np.round(w / scales) * scales


def truncated(w: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def alternated(w: np.ndarray, rounded: Any, rank: int, iterations: int, first: str) -> tuple[np.ndarray, np.ndarray]:
    base, update = np.zeros_like(w), np.zeros_like(w)
    for _ in range(iterations):
        if first == "qpissa":
            update = truncated(w - base, rank)
        base = rounded(w - update)
        if first == "loftq":
            update = truncated(w - base, rank)
    return base, update


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize(("form", "rounded"), [(quant.NF4(block=16, double=False), nf4), (quant.Int8(), int8)])
@pytest.mark.parametrize("method", METHODS)
def test_base_and_update_match_the_algorithm_in_numpy(method: str, form: Any, rounded: Any, iterations: int) -> None:
    params = {"w": PARAMS["dense"]}
    start = METHODS[method](params, {"w": adapter()["dense"]}, {"w": form}, iterations=iterations)
    base, update = alternated(np.asarray(params["w"]), rounded, 2, iterations, method)
    got_base, part = np.asarray(start.params["w"].dequantize()), start.adapter["w"]
    got_update = part.variant.scale * np.asarray(part.a) @ np.asarray(part.b)
    if iterations == 1:
        np.testing.assert_allclose(got_base, base, rtol=0, atol=1e-5)
        np.testing.assert_allclose(got_update, update, rtol=0, atol=1e-5)
    else:  # an element that is almost between two values may be rounded to the other one, from where the paths differ
        w = np.asarray(params["w"])
        expected = np.linalg.norm(w - base - update)
        assert np.linalg.norm(w - got_base - got_update) == pytest.approx(expected, rel=0.03)


# Which leaves


def test_leaves_without_factors_or_formats() -> None:
    params = {path: PARAMS[path] for path in ("dense", "query", "out")} | {"bias": jnp.ones(4)}
    spec = {"dense": lj.LoRA(rank=2, alpha=3), "query": lj.LoRA(rank=2, alpha=3, axes="ioo"), "bias": lj.Full()}
    initial = lj.init(jax.random.key(0), params, spec)
    for method in METHODS.values():
        base, new = method(params, initial, {"dense": quant.Int8(), "out": quant.Int8(axes="iio")})
        assert isinstance(base["dense"], quant.QuantizedLeaf) and isinstance(base["out"], quant.QuantizedLeaf)
        assert base["query"] is params["query"] and base["bias"] is params["bias"]
        assert new["query"] is initial["query"] and new["bias"] is initial["bias"]
        plain = quant.quantize(params, {"out": quant.Int8(axes="iio")})
        assert np.array_equal(base["out"].codes, plain["out"].codes)


def test_axes_of_formats_come_from_the_traced_model() -> None:
    apply = lambda p, x: jnp.tanh(jnp.einsum("td,dhk->thk", x, p["query"]))  # noqa: E731
    params, x = {"query": PARAMS["query"]}, jnp.ones((3, 16))
    kernels = lj.kernels(apply, params, x)
    initial = lj.init(jax.random.key(0), params, {"query": lj.LoRA(rank=2, alpha=4)}, kernels=kernels)
    base, new = starts.loftq(params, initial, {lj.targets.output_head: quant.NF4(block=16)}, kernels=kernels)
    assert base["query"].format == quant.NF4(block=16, axes="ioo")
    plain = quant.quantize(params, {"query": quant.NF4(block=16, axes="ioo")})
    got, expected = (quant.dequantize(tree)["query"] for tree in (base, plain))
    np.testing.assert_array_equal(got, expected)
    assert new["query"].b.any()


def test_the_randomized_decomposition_is_almost_as_good() -> None:
    exact = errors(started("loftq", "NF4"))
    part, form = {"dense": adapter()["dense"]}, {"dense": formats("NF4")["dense"]}
    start = starts.loftq(PARAMS, part, form, niter=4, key=jax.random.key(1))
    assert errors(start)["dense"] == pytest.approx(exact["dense"], rel=0.02)


def test_numpy_bfloat16_and_jit() -> None:
    part, form = {"w": adapter()["dense"]}, {"w": quant.NF4(block=16)}
    array = np.asarray(PARAMS["dense"])
    eager = starts.loftq({"w": array}, part, form)
    jitted = jax.jit(lambda params, part: starts.loftq(params, part, form))({"w": array}, part)
    assert np.array_equal(eager.params["w"].codes, jitted.params["w"].codes)
    half = starts.qpissa({"w": PARAMS["dense"].astype(jnp.bfloat16)}, part, form)
    assert half.params["w"].dtype == jnp.bfloat16 and half.adapter["w"].a.dtype == jnp.float32
    shapes = jax.eval_shape(lambda params: starts.qpissa(params, part, form), {"w": PARAMS["dense"]})
    assert shapes.params["w"].shape == (16, 8)


def test_magnitudes_of_dora_stay() -> None:
    params = {"w": PARAMS["dense"]}
    initial = lj.init(jax.random.key(0), params, {"w": lj.DoRA(rank=2, alpha=3)})
    base, new = starts.loftq(params, initial, {"w": quant.NF4(block=16)})
    assert new["w"].magnitude is initial["w"].magnitude
    norms = jnp.linalg.norm(lj.merge(quant.dequantize(base), new)["w"], axis=0)
    np.testing.assert_allclose(norms, jnp.linalg.norm(params["w"], axis=0), rtol=1e-5)


# Errors

DENSE = {"w": PARAMS["dense"]}
QUANTIZED = quant.quantize(DENSE, {"w": quant.Int8()})
PART = {"w": adapter()["dense"]}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: starts.pissa(QUANTIZED, PART), "Expected the adapted kernels to be arrays"),
        (lambda: starts.olora(QUANTIZED, PART), "1 of 1 are quantized"),
        (lambda: starts.lora_ga(QUANTIZED, PART, DENSE), "'w' of shape (16, 8): Int8(axes='io')"),
        (lambda: starts.gradients(lambda p: p["w"].sum(), QUANTIZED, PART), "starts.loftq or starts.qpissa"),
        (
            lambda: starts.as_plain(DENSE, PART, *starts.qpissa(DENSE, PART, {"w": quant.Int8()})),
            "Expected the changed kernels to be arrays, because only then the conversion is exact",
        ),
    ],
)
def test_a_quantized_kernel_is_an_error_where_the_kernel_is_read(call: Any, text: str) -> None:
    with pytest.raises(lj.AdapterError, match=re.escape(text)):
        call()


@pytest.mark.parametrize(
    ("variant", "options", "text"),
    [
        (lj.Full(), {}, "Expected formats for leaves that stay frozen; 1 are trained with Full()"),
        (lj.AdaLoRA(rank=2, alpha=4), {}, "has a diagonal in addition"),
        (lj.ALoRA(rank=2, alpha=4, invocation=[1]), {}, "expected a variant that adapts all tokens"),
        (lj.LoRA(rank=2, alpha=0), {}, "expected a positive scale"),
        (lj.LoRA(rank=2, alpha=4), {"iterations": 0}, "iterations"),
        (lj.LoRA(rank=2, alpha=4), {"niter": 2}, "Expected both `niter` and `key`"),
    ],
)
def test_what_cannot_be_initialized_is_an_error(variant: Any, options: Any, text: str) -> None:
    initial = lj.init(jax.random.key(0), DENSE, {"w": variant})
    with pytest.raises(lj.SpecError, match=re.escape(text)):
        starts.loftq(DENSE, initial, {"w": quant.Int8()}, **options)


def test_formats_of_no_adapted_leaf_are_an_error() -> None:
    params = DENSE | {"v": PARAMS["dense"], "u": PARAMS["dense"]}
    with pytest.raises(lj.SpecError, match=re.escape("Expected formats for at least one adapted leaf")):
        starts.loftq(params, PART, {"v": quant.Int8()})
    with pytest.raises(lj.SpecError, match="already quantized"):
        starts.loftq(QUANTIZED, PART, {"w": quant.NF4(block=16)})
    initial = lj.init(jax.random.key(0), params, {"w": lj.LoRA(rank=2, alpha=4), "v": lj.MiSS(rank=2)})
    with pytest.raises(lj.AdapterError, match="'v': MiSS"):
        starts.qpissa(params, initial, {"*": quant.Int8()})
    _, new = starts.qpissa(params, initial, {"w": quant.Int8()})
    assert new["v"] is initial["v"]


def test_initializations_that_leave_the_base_work_on_quantized_kernels() -> None:
    apply = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
    x = normal(20, 16, seed=5)
    for name in ("gaussian", "kaiming", "orthogonal"):
        base, new = getattr(starts, name)(jax.random.key(1), QUANTIZED, PART)
        assert base is QUANTIZED and not np.array_equal(new["w"].a, PART["w"].a)
    seen, expected = (starts.activations(apply, params, PART, x) for params in (QUANTIZED, quant.dequantize(QUANTIZED)))
    np.testing.assert_allclose(seen["w"].gram, expected["w"].gram, rtol=1e-5)
    base, new = starts.eva(QUANTIZED, PART, seen)
    assert base is QUANTIZED and math.isclose(float(jnp.linalg.norm(new["w"].a[:, 0])), 1, rel_tol=1e-5)
    plain = starts.as_plain(QUANTIZED, new, base, new)
    assert plain["w"] is new["w"]


@pytest.mark.parametrize("start", [starts.loftq, starts.qpissa])
def test_a_base_in_host_memory_stays_there(start: Any) -> None:
    params = {"w": normal(64, 8)}
    adapter = lj.init(jax.random.key(0), params, {"w": lj.LoRA(rank=2, alpha=2)})
    expected = start(params, adapter, {"w": quant.NF4()}, iterations=2)
    got = start(lj.sharding.to_host(params), adapter, {"w": quant.NF4()}, iterations=2)
    assert {array.sharding.memory_kind for array in jax.tree.leaves(got.params)} == {"pinned_host"}
    assert_close(jax.device_get(got), jax.device_get(expected))
