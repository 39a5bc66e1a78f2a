"""Merging, unmerging, rounding reports, and errors."""

import math
from typing import Any

import chex
import flax.linen as nn
import flax.struct
import helpers
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import lora_jax as lj

LORA = lj.LoRA(rank=2, alpha=4)


def adapter_of(**arrays: Any) -> dict[str, lj.Adapter]:
    """An adapter of a kernel with two axes, at scale 1."""
    rank = arrays["a"].shape[-1]
    return {"kernel": lj.Adapter(lj.LoRA(rank=rank, alpha=rank), "io", **arrays)}


def trained(params: Any, spec: Any = None, seed: int = 0) -> dict[str, lj.Adapter]:
    adapter = lj.init(jax.random.key(seed), params, spec or {"**/kernel": LORA})
    return helpers.trained(jax.random.key(seed + 1), adapter)


def model(dtype: Any = jnp.float32) -> dict[str, Any]:
    kernel = jax.random.normal(jax.random.key(5), (8, 6)).astype(dtype)
    return {"a": {"kernel": kernel, "bias": jnp.ones(6, dtype)}, "b": {"kernel": kernel + 1}}


def bits(tree: Any) -> list[tuple[Any, bytes]]:
    return [(leaf.dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def error(call: Any, *args: Any, kind: type[Exception] = lj.MergeError, **kwargs: Any) -> str:
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# The sum

ROLES = ["io", "oi", "ioo", "iio", "oio", "bio", "ibo", "iob", "biio", "bbioo", "iiio"]


def dense(kernel: Any, part: lj.Adapter) -> np.ndarray:
    """`W0 + s·A·B` in float64 by NumPy."""
    axes = [chr(ord("a") + axis) for axis in range(len(part.axes))]
    axes_of = {
        role: "".join(axis for axis, letter in zip(axes, part.axes, strict=True) if letter == role) for role in "bio"
    }
    equation = f"{axes_of['b']}{axes_of['i']}z,{axes_of['b']}z{axes_of['o']}->{''.join(axes)}"
    a, b = (np.asarray(part.arrays[name], np.float64) for name in "ab")
    return np.asarray(kernel, np.float64) + part.variant.scale * np.einsum(equation, a, b)


@pytest.mark.parametrize("roles", ROLES)
def test_merge_is_the_dense_formula(roles: str) -> None:
    shape = tuple(range(3, 3 + len(roles)))
    random = np.random.default_rng(0)
    params = {"kernel": random.normal(size=shape)}  # NumPy's float64
    variant = lj.RSLoRA(rank=2, alpha=3)
    arrays = {name: random.normal(size=size) for name, size in variant.shapes(shape, roles).items()}
    adapter = {"kernel": lj.Adapter(variant, roles, **arrays)}
    merged = lj.merge(params, adapter)["kernel"]
    assert merged.dtype == np.float64
    np.testing.assert_allclose(merged, dense(params["kernel"], adapter["kernel"]), rtol=0, atol=1e-14)


def test_with_x64_jax_arrays_are_summed_in_float64() -> None:
    with jax.enable_x64(True):
        params = {"kernel": jnp.full((2, 2), 1.0)}
        merged = lj.merge(params, adapter_of(a=jnp.full((2, 1), 2.0**-40), b=jnp.ones((1, 2))))["kernel"]
    assert bits(merged) == bits(np.full((2, 2), 1 + 2.0**-40))


def test_merging_a_full_leaf_replaces_the_base_s_leaf() -> None:
    params = model(jnp.bfloat16)
    adapter = trained(params, {"**/bias": lj.Full()})
    merged = lj.merge(params, adapter)
    np.testing.assert_array_equal(merged["a"]["bias"], adapter["a/bias"].value.astype(jnp.bfloat16))


@pytest.mark.parametrize("container", [jnp.asarray, np.asarray])
def test_a_merged_full_leaf_is_a_copy(container: Any) -> None:
    params = {"bias": container(np.ones(4096, np.float32))}
    adapter = lj.init(jax.random.key(0), params, {"bias": lj.Full()})
    merged = lj.merge(params, adapter)
    jax.jit(lambda adapter: jax.tree.map(lambda leaf: leaf + 1, adapter), donate_argnums=0)(adapter)
    np.testing.assert_array_equal(merged["bias"], np.ones(4096))


def test_a_fresh_adapter_merges_to_the_base_bit_for_bit() -> None:
    params = model(jnp.bfloat16)
    spec = {"**/kernel": LORA, "**/bias": lj.Full()}
    assert bits(lj.merge(params, lj.init(jax.random.key(0), params, spec))) == bits(params)


def fractions(seed: int, *shape: int) -> np.ndarray:
    """Multiples of 1/64, so that products and short sums are exact in float32 but not in narrower dtypes."""
    return np.random.default_rng(seed).integers(-64, 65, shape).astype(np.float32) / 64


@pytest.mark.parametrize("narrow", [ml_dtypes.bfloat16, np.float16])
def test_a_narrow_base_is_summed_in_float32_and_cast_once(narrow: Any) -> None:
    base = np.random.default_rng(0).normal(size=(64, 48)).astype(narrow)
    a, b = fractions(1, 64, 4), fractions(2, 4, 48)
    expected = (base.astype(np.float32) + a @ b).astype(narrow)
    assert (expected != base + (a.astype(narrow) @ b.astype(narrow)).astype(narrow)).any()  # a narrow sum differs
    for params in ({"kernel": jnp.asarray(base)}, {"kernel": base}):
        merged = lj.merge(params, adapter_of(a=jnp.asarray(a), b=jnp.asarray(b)))["kernel"]
        assert bits(merged) == bits(expected)


def test_narrow_factors_are_multiplied_in_float32() -> None:
    base, a, b = (np.random.default_rng(seed).normal(size=(32, 32)).astype(ml_dtypes.bfloat16) for seed in range(3))
    adapter = adapter_of(a=jnp.asarray(a), b=jnp.asarray(b))
    merged = lj.merge({"kernel": jnp.asarray(base, jnp.float32)}, adapter)["kernel"]
    np.testing.assert_allclose(merged, dense(base, adapter["kernel"]), rtol=0, atol=1e-5)


def test_wide_factors_are_summed_in_their_dtype() -> None:
    with jax.enable_x64(True):
        params = {"kernel": jnp.ones((4, 4), jnp.float32)}
        # In float64 more than half a unit in the last place of 1; in float32 exactly half, which rounds to even.
        adapter = adapter_of(a=jnp.full((4, 1), 2.0**-24 + 2.0**-50, jnp.float64), b=jnp.ones((1, 4), jnp.float64))
        merged = lj.merge(params, adapter)["kernel"]
    assert bits(merged) == bits(np.full((4, 4), 1 + 2.0**-23, np.float32))


# Containers, dtypes and shardings


@flax.struct.dataclass
class Dense:
    kernel: Any
    bias: Any


def containers() -> dict[str, Any]:
    kernel, bias = np.ones((8, 6), np.float32), np.ones(6, np.float32)
    leaf = {"kernel": kernel, "bias": bias}
    boxed = {"kernel": nn.Partitioned(jnp.asarray(kernel), ("x", None)), "bias": nn.Partitioned(bias, (None,))}
    return {
        "dict": {"dense": jax.tree.map(jnp.asarray, leaf)},
        "FrozenDict": FrozenDict({"dense": jax.tree.map(jnp.asarray, leaf)}),
        "list and tuple": [({"kernel": jnp.asarray(kernel)},), jnp.asarray(bias)],
        "dataclass": Dense(jnp.asarray(kernel), jnp.asarray(bias)),
        "NumPy": {"dense": leaf},
        "Partitioned": {"dense": boxed},
        "LogicallyPartitioned": {"kernel": nn.LogicallyPartitioned(jnp.asarray(kernel), ("embed", "mlp"))},
        "nnx.State": nnx.split(nnx.Linear(8, 6, rngs=nnx.Rngs(0)))[1],
        "with other leaves": {"kernel": jnp.asarray(kernel), "scale": 0.5, "key": jax.random.key(0), "none": None},
    }


@pytest.mark.parametrize("name", containers())
def test_merge_keeps_the_container(name: str) -> None:
    params = containers()[name]
    merged = lj.merge(params, trained(params))
    assert type(merged) is type(params)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(merged), strict=True))
    assert all(type(one) is type(other) for one, other in pairs)
    # All other leaves are the same objects, not copies.
    assert [getattr(one, "shape", ()) for one, other in pairs if one is not other] == [(8, 6)]


@pytest.mark.parametrize("name", containers())
def test_merge_does_not_change_its_arguments(name: str) -> None:
    params = containers()[name]
    adapter = trained(params)
    leaves, before = jax.tree.leaves((params, adapter)), bits(adapter)
    lj.merge_report(params, adapter, lj.merge(params, adapter))
    assert all(one is other for one, other in zip(jax.tree.leaves((params, adapter)), leaves, strict=True))
    assert bits(adapter) == before


def test_an_nnx_model_can_be_updated_with_merged_parameters() -> None:
    linear = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    graph, state = nnx.split(linear)
    adapter = trained(state)
    x = jnp.ones((2, 8))
    adapted = lj.lora(lambda state, x: nnx.merge(graph, state)(x))(state, adapter, x)
    helpers.assert_close(nnx.merge(graph, lj.merge(state, adapter))(x), adapted)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_numpy_parameters_stay_numpy_and_keep_their_dtype(dtype: Any) -> None:
    params = {"kernel": np.random.default_rng(0).normal(size=(8, 6)).astype(dtype), "bias": np.ones(6, dtype)}
    adapter = trained(params, {"kernel": LORA, "bias": lj.Full()})
    merged = lj.merge(params, adapter)
    report = lj.merge_report(params, adapter, merged)
    assert {(type(leaf), leaf.dtype) for leaf in jax.tree.leaves(merged)} == {(np.ndarray, np.dtype(dtype))}
    assert merged["kernel"].flags.writeable
    np.testing.assert_allclose(
        merged["kernel"].astype(np.float64),
        dense(params["kernel"], adapter["kernel"]),
        rtol=0,
        atol=4 * float(jnp.finfo(dtype).eps) if dtype != np.float64 else 1e-6,  # the factors are float32
    )
    restored, bound = lj.unmerge_approximately(merged, {"kernel": adapter["kernel"]})
    assert restored["kernel"].dtype == dtype
    drift = np.abs(restored["kernel"].astype(np.float64) - params["kernel"].astype(np.float64)).max()
    assert drift <= bound["kernel"]
    assert report["kernel"].lost <= 1


def test_a_numpy_float64_base_is_summed_in_float64() -> None:
    params = {"kernel": np.full((2, 2), 1.0)}
    adapter = adapter_of(a=jnp.full((2, 1), 2.0**-40), b=jnp.ones((1, 2)))
    merged = lj.merge(params, adapter)
    report = lj.merge_report(params, adapter, merged)
    assert (merged["kernel"] == 1 + 2.0**-40).all()
    assert report["kernel"] == (0.0, 0.0, 0.0)


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))


@pytest.mark.parametrize(
    ("roles", "shape", "spec"),
    [
        ("io", (16, 12), ("x", "y")),
        ("ioo", (16, 4, 2), (("x", "y"), None, None)),
        ("bio", (4, 6, 8), ("x", None, "y")),
        ("io", (16, 12), ()),
    ],
    ids=str,
)
def test_merge_keeps_the_sharding(roles: str, shape: Any, spec: Any) -> None:
    sharding = NamedSharding(mesh(), PartitionSpec(*spec))
    local = {"kernel": jax.random.normal(jax.random.key(0), shape)}
    adapter = trained(local, {"kernel": lj.LoRA(rank=2, alpha=4, axes=roles)})
    params = jax.device_put(local, sharding)
    merged = lj.merge(params, adapter)
    report = lj.merge_report(params, adapter, merged)
    assert merged["kernel"].sharding == sharding
    np.testing.assert_allclose(merged["kernel"], dense(local["kernel"], adapter["kernel"]), rtol=0, atol=1e-6)
    restored, _ = lj.unmerge_approximately(merged, adapter)
    assert restored["kernel"].sharding == sharding
    assert report["kernel"].max_error < 1e-6


def test_merge_keeps_the_memory_kind() -> None:
    host = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    local = {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}
    params, adapter = jax.device_put(local, host), trained(local)
    merged = lj.merge(params, adapter)
    lj.merge_report(params, adapter, merged)
    assert merged["kernel"].sharding == host
    helpers.assert_few_ulp(jax.device_get(merged), jax.device_get(lj.merge(local, adapter)), 2)
    assert lj.unmerge_approximately(merged, adapter)[0]["kernel"].sharding == host


# Transformations


def test_merge_under_jit_matches_merge_outside() -> None:
    for dtype in (jnp.float32, jnp.bfloat16):
        params = model(dtype)
        for spec in ({"**/kernel": lj.LoRA(rank=1, alpha=3)}, {"**/kernel": lj.RSLoRA(rank=6, alpha=3)}):
            adapter = trained(params, spec)
            helpers.assert_few_ulp(jax.jit(lj.merge)(params, adapter), lj.merge(params, adapter), 2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merge_with_donation_reuses_the_memory_of_the_base(dtype: Any) -> None:
    params = {"kernel": jnp.ones((256, 256), dtype), "bias": jnp.ones(256, dtype)}
    adapter = trained(params, {"kernel": LORA})
    places = {name: leaf.unsafe_buffer_pointer() for name, leaf in params.items()}
    expected = lj.merge(jax.tree.map(jnp.copy, params), adapter)
    merged = jax.jit(lj.merge, donate_argnums=0)(params, adapter)
    assert {name: leaf.unsafe_buffer_pointer() for name, leaf in merged.items()} == places
    assert all(leaf.is_deleted() for leaf in params.values())
    helpers.assert_few_ulp(merged, expected, 2)


def test_merge_with_donation_keeps_the_sharding() -> None:
    sharding = NamedSharding(mesh(), PartitionSpec("x", "y"))
    params = {"kernel": jax.device_put(jnp.ones((64, 64)), sharding)}
    merged = jax.jit(lj.merge, donate_argnums=0)(params, trained(params))
    assert merged["kernel"].sharding == sharding


@pytest.mark.parametrize("kind", ["jax", "numpy", "sharded"])
@pytest.mark.parametrize("transform", ["grad", "jit", "jit of grad", "vmap", "pmap", "eval_shape"])
def test_merge_can_be_transformed_in_the_adapter(transform: str, kind: str) -> None:
    base = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    sharding = NamedSharding(mesh(), PartitionSpec("x", "y"))
    kernel = {"jax": jnp.asarray, "numpy": np.asarray, "sharded": lambda x: jax.device_put(x, sharding)}[kind](base)
    adapter = trained({"kernel": base})

    def total(adapter: Any) -> jax.Array:
        return jnp.sum(lj.merge({"kernel": kernel}, adapter)["kernel"])

    expected = float(dense(base, adapter["kernel"]).sum())
    gradient = 2.0 * np.broadcast_to(np.asarray(adapter["kernel"].b).sum(1), (8, 2))
    match transform:
        case "grad" | "jit of grad":
            grad = jax.grad(total)
            got = (jax.jit(grad) if transform == "jit of grad" else grad)(adapter)["kernel"].a
            np.testing.assert_allclose(got, gradient, rtol=1e-4, atol=1e-5)
        case "jit":
            np.testing.assert_allclose(jax.jit(total)(adapter), expected, rtol=1e-4)
        case "vmap":
            several = jax.tree.map(lambda leaf: jnp.stack([leaf, 0 * leaf]), adapter)
            np.testing.assert_allclose(jax.vmap(total)(several), [expected, base.sum()], rtol=1e-4)
        case "pmap":
            several = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), adapter)
            np.testing.assert_allclose(jax.pmap(total)(several), [expected] * 8, rtol=1e-4)
        case "eval_shape":
            assert jax.eval_shape(total, adapter).shape == ()


def test_a_report_under_jit_is_an_error() -> None:
    params = model()
    adapter = trained(params)
    call = jax.jit(lambda merged: lj.merge_report(params, adapter, merged))
    assert error(call, lj.merge(params, adapter)) == (
        "Expected arrays with values; got traced arrays.\n  Call merge_report outside `jit`."
    )


def test_a_report_on_another_tree_is_an_error() -> None:
    params = model()
    adapter = trained(params)
    assert error(lj.merge_report, params, adapter, lj.merge(params, trained(params, seed=3))) == (
        "Expected `merged` to be the merge of `params` and the adapter; 2 of 2 leaves are not.\n"
        "  'a/kernel'\n  'b/kernel'\n  It may have been trained further, or merged with another adapter or base."
    )
    text = error(lj.merge_report, params, adapter, {"a": params["a"]}, kind=lj.AdapterError)
    assert "\n  'b/kernel' is not in `merged`; the nearest are 'a/kernel', 'a/bias'\n" in text


def test_swapped_arguments_are_an_error_with_the_order() -> None:
    params = model()
    adapter = trained(params)
    for call in (lj.merge, lambda params, adapter: lj.merge_report(params, adapter, params)):
        text = error(call, adapter, params, kind=lj.AdapterError)
        assert "got dict at 'a'.\n  The arguments come in this order: first `params`, then the adapter." in text
    for call in (lj.unmerge_approximately, lambda merged, adapter: lj.unmerge(merged, adapter, base=merged)):
        text = error(call, adapter, params, kind=lj.AdapterError)
        assert "got dict at 'a'.\n  The arguments come in this order: first `merged`, then the adapter." in text


# Rounding reports


def figures(base: Any, exact: np.ndarray, merged: Any) -> tuple[float, float, float]:
    """`Rounding`, in float64 by NumPy."""
    base, merged = (np.asarray(leaf).astype(np.float64) for leaf in (base, merged))
    error, changed = np.abs(merged - exact), exact != base
    return error.max(), error.mean(), (changed & (merged == base)).sum() / max(changed.sum(), 1)


@pytest.mark.parametrize("size", [1.0, 2.0**-8, 2.0**-20, 2.0**-40])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_report_matches_numpy(dtype: Any, size: float) -> None:
    base = jax.random.normal(jax.random.key(0), (64, 48)).astype(dtype)
    adapter = adapter_of(a=jnp.asarray(fractions(1, 64, 1)), b=jnp.asarray(fractions(2, 1, 48) * size))
    merged = lj.merge({"kernel": base}, adapter)
    report = lj.merge_report({"kernel": base}, adapter, merged)
    expected = figures(base, dense(base.astype(jnp.float32), adapter["kernel"]), merged["kernel"])
    np.testing.assert_allclose(report["kernel"], expected, rtol=1e-3)


def test_the_report_of_a_full_leaf_is_the_error_of_the_cast() -> None:
    params = {"bias": jax.random.normal(jax.random.key(0), (64,)).astype(jnp.bfloat16)}
    adapter = trained(params, {"bias": lj.Full()})
    merged = lj.merge(params, adapter)
    report = lj.merge_report(params, adapter, merged)
    value = np.asarray(adapter["bias"].value, np.float64)
    np.testing.assert_allclose(report["bias"], figures(params["bias"], value, merged["bias"]), rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", [1e-10, 1e-20])
def test_a_change_too_small_for_the_base_is_reported_as_lost(dtype: Any, size: float) -> None:
    params = {"kernel": jnp.ones((8, 6), dtype)}
    adapter = adapter_of(a=jnp.full((8, 1), size), b=jnp.ones((1, 6)))
    merged = lj.merge(params, adapter)
    report = lj.merge_report(params, adapter, merged)
    assert bits(merged) == bits(params)
    assert report["kernel"].lost == 1.0
    np.testing.assert_allclose(report["kernel"][:2], size, rtol=1e-6)


def test_lost_is_the_fraction_of_changed_elements() -> None:
    params = {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
    # The change of the first of four rows is zero, of the second too small, of the others large enough.
    adapter = adapter_of(a=jnp.array([[0.0], [1e-4], [1.0], [2.0]]), b=jnp.ones((1, 4)))
    report = lj.merge_report(params, adapter, lj.merge(params, adapter))
    assert report["kernel"].lost == pytest.approx(1 / 3)


def test_a_fresh_adapter_loses_nothing() -> None:
    params = model(jnp.bfloat16)
    adapter = lj.init(jax.random.key(0), params, {"**/kernel": LORA})
    report = lj.merge_report(params, adapter, lj.merge(params, adapter))
    assert report == {"a/kernel": (0.0, 0.0, 0.0), "b/kernel": (0.0, 0.0, 0.0)}


def test_wide_factors_show_the_rounding_of_the_base() -> None:
    with jax.enable_x64(True):
        base = jnp.ones((4, 4), jnp.float32)
        adapter = adapter_of(a=jnp.full((4, 1), 0.1, jnp.float64), b=jnp.ones((1, 4), jnp.float64))
        report = lj.merge_report({"kernel": base}, adapter, lj.merge({"kernel": base}, adapter))
    assert report["kernel"].max_error == pytest.approx(abs(float(np.float32(1.1)) - 1.1), rel=1e-6)


# Errors

BAD = [("a", math.nan), ("b", math.inf), ("b", -math.inf)]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_factor_that_is_not_finite_is_an_error(name: str, value: float) -> None:
    params = model()
    good = trained(params)
    before = bits(params)
    arrays = good["b/kernel"].arrays
    bad = lj.Adapter(LORA, "io", **(arrays | {name: arrays[name].at[0, 0].set(value)}))
    assert error(lj.merge, params, good | {"b/kernel": bad}) == (
        f"Expected finite factors; got NaN or infinity in 1 arrays.\n  'b/kernel': {name}\n"
        "  Nothing was merged. Use a checkpoint from before the loss diverged."
    )
    assert bits(params) == before


def test_all_arrays_that_are_not_finite_are_listed() -> None:
    params = {f"layer_{number}": {"kernel": jnp.ones((4, 4))} for number in range(6)}
    adapter = jax.tree.map(lambda leaf: leaf * math.nan, trained(params))
    text = error(lj.merge, params, adapter)
    assert "in 12 arrays.\n  'layer_0/kernel': a\n  'layer_0/kernel': b\n" in text
    assert "\n  … and 4 more\n" in text


def test_a_full_leaf_that_is_not_finite_is_an_error() -> None:
    adapter = {"a/bias": lj.Adapter(lj.Full(), "", value=jnp.full(6, jnp.nan))}
    assert "\n  'a/bias': value\n" in error(lj.merge, model(), adapter)


@pytest.mark.parametrize("container", [jnp.asarray, np.asarray])
def test_a_merge_that_overflows_its_dtype_is_an_error(container: Any) -> None:
    params = {"kernel": container(np.full((4, 4), 6e4, np.float16))}
    adapter = adapter_of(a=jnp.full((4, 1), 1e4), b=jnp.ones((1, 4)))
    assert error(lj.merge, params, adapter) == (
        "Expected merged leaves to fit their dtype; 1 overflow.\n"
        "  'kernel': 70000 in float16, whose largest value is 65504.0\n"
        "  Cast the base to a wider dtype before merging, such as bfloat16 or float32."
    )


def test_an_infinity_in_the_base_is_not_an_overflow() -> None:
    params = {"kernel": jnp.array([[-jnp.inf, 1.0], [0.0, 1.0]])}
    merged = lj.merge(params, adapter_of(a=jnp.ones((2, 1)), b=jnp.ones((1, 2))))["kernel"]
    np.testing.assert_array_equal(merged, [[-np.inf, 2.0], [1.0, 2.0]])


def tied(container: Any = jnp.asarray) -> dict[str, Any]:
    embedding = container(np.ones((8, 6), np.float32))
    return {"embed": {"kernel": embedding}, "head": {"kernel": embedding}, "other": container(np.ones(3, np.float32))}


@pytest.mark.parametrize("container", [jnp.asarray, np.asarray])
def test_a_leaf_that_is_tied_to_another_is_an_error(container: Any) -> None:
    params = tied(container)
    adapter = trained(params, {"embed/kernel": LORA})
    assert error(lj.merge, params, adapter) == (
        "Expected 'embed/kernel' to hold a separate array; 'head/kernel' holds the same one (tied weights).\n"
        "  merge(..., untie=True) changes only 'embed/kernel'; or adapt an untied tree."
    )


def test_tied_leaves_are_an_error_under_full_and_under_both_paths() -> None:
    params = tied()
    assert "(tied weights)" in error(lj.merge, params, trained(params, {"embed/kernel": lj.Full()}))
    assert "(tied weights)" in error(lj.merge, params, trained(params, {"**/kernel": LORA}))


def test_untie_changes_only_the_adapted_leaf() -> None:
    params = tied()
    adapter = trained(params, {"embed/kernel": LORA})
    merged = lj.merge(params, adapter, untie=True)
    assert merged["head"]["kernel"] is params["head"]["kernel"]
    helpers.assert_close(
        merged["embed"]["kernel"], jnp.asarray(dense(params["embed"]["kernel"], adapter["embed/kernel"]), jnp.float32)
    )


@pytest.mark.parametrize(
    "hide",
    [
        lambda params: jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params),
        lambda params: jax.tree.map(lambda leaf: np.asarray(leaf)[:], params),
    ],
    ids=["copied", "viewed"],
)
def test_equal_leaves_that_are_different_objects_are_not_tied(hide: Any) -> None:
    params = tied()
    adapter = trained(params, {"embed/kernel": LORA})
    expected = lj.merge(params, adapter, untie=True)
    chex.assert_trees_all_equal(lj.merge(hide(params), adapter), expected)


def test_tied_leaves_are_not_detected_as_arguments_of_jit() -> None:
    params = tied()
    adapter = trained(params, {"embed/kernel": LORA})
    expected = lj.merge(params, adapter, untie=True)
    chex.assert_trees_all_close(jax.jit(lj.merge)(params, adapter), expected)
    assert "(tied weights)" in error(jax.jit(lambda adapter: lj.merge(params, adapter)), adapter)


def test_tied_leaves_that_are_not_adapted_stay_tied() -> None:
    params = tied() | {"extra": {"kernel": jnp.ones((8, 6))}}
    merged = lj.merge(params, trained(params, {"extra/kernel": LORA}))
    assert merged["embed"]["kernel"] is merged["head"]["kernel"]


# Merging again


def test_merging_twice_into_the_base_gives_the_same() -> None:
    params = model()
    adapter = trained(params)
    assert bits(lj.merge(params, adapter)) == bits(lj.merge(params, adapter))


def test_a_second_adapter_can_be_merged() -> None:
    params = model()
    merged = lj.merge(lj.merge(params, trained(params, seed=0)), trained(params, seed=1))
    assert jax.tree.structure(merged) == jax.tree.structure(params)


def test_merging_the_opposite_scale_removes_an_adapter() -> None:
    params = model()
    adapter = trained(params)
    negative = {path: lj.Adapter(lj.LoRA(rank=2, alpha=-4), part.axes, **part.arrays) for path, part in adapter.items()}
    restored = lj.merge(lj.merge(params, adapter), negative)
    chex.assert_trees_all_close(restored, params, atol=1e-5)


def test_an_unmerged_adapter_can_be_merged_again() -> None:
    params = model()
    adapter = trained(params)
    merged = lj.merge(params, adapter)
    assert bits(lj.merge(lj.unmerge(merged, adapter, base=params), adapter)) == bits(merged)


# Unmerging

FULL = {"**/kernel": LORA, "**/bias": lj.Full()}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("under_jit", [False, True])
def test_unmerge_with_the_base_returns_the_leaves_of_the_base(dtype: Any, under_jit: bool) -> None:
    params = model(dtype)
    adapter = trained(params, FULL)
    merged = (jax.jit(lj.merge) if under_jit else lj.merge)(params, adapter)
    restored = lj.unmerge(merged, adapter, base=params)
    assert all(restored[layer][name] is params[layer][name] for layer, name in (path.split("/") for path in adapter))
    assert bits(restored) == bits(params)


def test_unmerge_keeps_leaves_that_are_not_adapted() -> None:
    params = model()
    adapter = trained(params)
    merged = lj.merge(params, adapter)
    merged["a"]["bias"] = merged["a"]["bias"] + 1
    restored = lj.unmerge(merged, adapter, base=params)
    assert restored["a"]["bias"] is merged["a"]["bias"]


def test_the_base_may_have_only_the_adapted_leaves_in_any_container() -> None:
    params = model()
    adapter = trained(params, {"a/kernel": LORA})
    base = FrozenDict({"a": {"kernel": np.asarray(params["a"]["kernel"])}})
    assert bits(lj.unmerge(lj.merge(params, adapter), adapter, base=base)) == bits(params)


@pytest.mark.parametrize("wrong", ["another base", "another adapter", "not merged", "one bit"])
def test_a_base_that_was_not_merged_is_an_error(wrong: str) -> None:
    params = model(jnp.bfloat16)
    adapter = trained(params)
    merged, base = lj.merge(params, adapter), params
    match wrong:
        case "another base":
            base = {"a": params["a"], "b": {"kernel": params["b"]["kernel"] * 2}}
        case "another adapter":
            adapter = adapter | {"b/kernel": trained(params, seed=3)["b/kernel"]}
        case "not merged":
            merged = {"a": merged["a"], "b": params["b"]}
        case "one bit":
            kernel = merged["b"]["kernel"]
            merged["b"]["kernel"] = kernel.at[3, 3].set(jnp.nextafter(kernel[3, 3], jnp.bfloat16(jnp.inf)))
    assert error(lj.unmerge, merged, adapter, base=base) == (
        "Expected `merged` to be the merge of `base` and the adapter; 1 of 2 leaves are not.\n  'b/kernel'\n"
        "  It may have been trained further, or merged with another adapter or base."
    )


@pytest.mark.parametrize("under_jit", [False, True])
def test_unmerge_accepts_the_rounding_of_another_processor(under_jit: bool) -> None:
    params = model()
    adapter = trained(params)
    merged = (jax.jit(lj.merge) if under_jit else lj.merge)(params, adapter)
    kernel, base = merged["b"]["kernel"], params["b"]["kernel"]
    merged["b"]["kernel"] = jnp.nextafter(kernel, jnp.float32(jnp.inf))
    assert lj.unmerge(merged, adapter, base=params)["b"]["kernel"] is base
    merged["b"]["kernel"] = kernel.at[0, 0].add(1e-5 * jnp.abs(kernel).max())
    assert "1 of 2 leaves are not" in error(lj.unmerge, merged, adapter, base=params)


def test_a_base_without_an_adapted_path_is_an_error() -> None:
    params = model()
    adapter = trained(params)
    text = error(lj.unmerge, lj.merge(params, adapter), adapter, base={"a": params["a"]}, kind=lj.AdapterError)
    assert "\n  'b/kernel' is not in `base`; the nearest are 'a/kernel', 'a/bias'\n" in text


def test_a_full_leaf_needs_the_base() -> None:
    params = model()
    adapter = trained(params, FULL)
    assert error(lj.unmerge_approximately, lj.merge(params, adapter), adapter) == (
        "Cannot unmerge 'a/bias' without the base: Full() replaces or scales the leaf.\n"
        "  Call unmerge(merged, adapter, base=base)."
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [1e-4, 0.3, 30.0])
def test_without_the_base_the_error_bound_holds_and_is_not_loose(dtype: Any, size: float) -> None:
    params = {"kernel": jax.random.normal(jax.random.key(0), (64, 48)).astype(dtype)}
    adapter = adapter_of(a=jax.random.normal(jax.random.key(1), (64, 4)), b=size * jnp.ones((4, 48)))
    restored, bound = lj.unmerge_approximately(lj.merge(params, adapter), adapter)
    drift = np.abs(np.asarray(restored["kernel"], np.float64) - np.asarray(params["kernel"], np.float64)).max()
    assert drift <= bound["kernel"] <= 20 * max(drift, float(jnp.finfo(dtype).eps))


FLOATS = st.floats(min_value=-(2.0**10), max_value=2.0**10, width=16)
NEAR_HALF = st.builds(math.ldexp, st.sampled_from([1.0, -1.0, 1 + 2**-20, 1 - 2**-20]), st.integers(-30, 8))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@hypothesis.given(value=st.one_of(FLOATS, NEAR_HALF), change=st.one_of(FLOATS, NEAR_HALF))
def test_the_error_bound_holds_for_single_values(dtype: str, value: float, change: float) -> None:
    params = {"kernel": jnp.full((1, 1), value, dtype)}
    adapter = adapter_of(a=jnp.full((1, 1), change), b=jnp.ones((1, 1)))
    restored, bound = lj.unmerge_approximately(lj.merge(params, adapter), adapter)
    assert abs(float(restored["kernel"][0, 0]) - float(params["kernel"][0, 0])) <= bound["kernel"]


@pytest.mark.parametrize("kind", [lj.LoRAError, ValueError])
def test_a_merge_error_is_also_a_built_in_error(kind: type[Exception]) -> None:
    params = tied()
    with pytest.raises(kind):
        lj.merge(params, trained(params, {"embed/kernel": LORA}))


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_constants_under_jit_are_merged_by_value(kind: Any) -> None:
    params = {"kernel": kind(np.ones((4, 3), np.float32)), "other": kind(np.ones(2, np.float32))}
    adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    adapter = jax.tree.map(lambda leaf: leaf + 1, adapter)
    merged = jax.jit(lambda x: lj.merge(params, adapter)["kernel"] * x)(1.0)
    np.testing.assert_allclose(merged, lj.merge(params, adapter)["kernel"], rtol=1e-6)


def test_unmerging_approximately_needs_values() -> None:
    params = {"kernel": jnp.ones((4, 3))}
    adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4)})
    with pytest.raises(lj.MergeError, match="Call unmerge_approximately outside `jit`"):
        jax.jit(lj.unmerge_approximately)(params, adapter)
