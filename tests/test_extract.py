"""`extract` and `compress` in float64, against truncated NumPy decompositions of materialized matrices."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_few_ulp, trained
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import lora_jax as lj

KERNELS = {"io": (6, 5), "ioo": (6, 2, 3), "iio": (2, 3, 7), "iiio": (2, 2, 3, 8), "bio": (3, 6, 5), "ibo": (6, 3, 5)}
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
each_kernel = pytest.mark.parametrize(
    ("axes", "variant"), [*((axes, lj.LoRA) for axes in KERNELS), ("bio", lj.RSLoRA)], ids=str
)


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def random_kernel(axes: str, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(KERNELS[axes]))


def random_case(axes: str, variant: Any) -> tuple[Any, Any]:
    """A kernel of zeros, so that the merged kernel is the update, and an adapter like a trained one."""
    params = {"w": jnp.zeros(KERNELS[axes])}
    adapter = lj.init(jax.random.key(0), params, {"w": variant}, param_dtype=jnp.float64)
    return params, trained(jax.random.key(1), adapter)


def matrices(kernel: Any, axes: str) -> np.ndarray:
    """The layers of a kernel: (batch, in, out)."""
    order = [axis for role in "bio" for axis, letter in enumerate(axes) if letter == role]
    sizes = {role: [kernel.shape[axis] for axis, letter in enumerate(axes) if letter == role] for role in "bio"}
    return np.asarray(kernel).transpose(order).reshape(*sizes["b"], np.prod(sizes["i"]), np.prod(sizes["o"]))


def truncated(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The best approximation of a rank, and the relative norm of the residual."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    residual_norm = np.linalg.norm(s[..., rank:], axis=-1) / np.linalg.norm(s, axis=-1)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :], residual_norm


# From a fine-tuned model


@each_kernel
def test_extract_truncates_the_difference_at_any_scale(axes: str, variant: Any) -> None:
    base, tuned = {"w": random_kernel(axes, 0)}, {"w": random_kernel(axes, 1)}
    spec = {"w": variant(rank=2, alpha=5, axes=axes)}
    adapter, residual = lj.extract(base, tuned, spec, param_dtype=jnp.float64)
    expected, residual_norm = truncated(matrices(tuned["w"] - base["w"], axes), 2)
    update = lj.merge({"w": jnp.zeros(KERNELS[axes])}, adapter)["w"]
    np.testing.assert_allclose(matrices(update, axes), expected, **TOLERANCE)
    np.testing.assert_allclose(residual["w"], residual_norm, **TOLERANCE)
    assert residual["w"].shape == tuple(size for size, role in zip(KERNELS[axes], axes, strict=True) if role == "b")


def test_no_other_adapter_of_the_rank_is_nearer() -> None:
    base, tuned = {"w": random_kernel("io", 0)}, {"w": random_kernel("io", 1)}
    adapter, residual = lj.extract(base, tuned, {"w": lj.LoRA(rank=2, alpha=2)}, param_dtype=jnp.float64)

    def distance(adapter: Any) -> jax.Array:
        return jnp.linalg.norm(tuned["w"] - base["w"] - adapter["w"].a @ adapter["w"].b)

    least = distance(adapter)
    np.testing.assert_allclose(least, residual["w"] * jnp.linalg.norm(tuned["w"] - base["w"]), rtol=1e-10)
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(jax.grad(distance)(adapter))) < 1e-10
    for seed in range(5):
        step = trained(jax.random.key(seed), adapter, 0.1)
        assert distance(jax.tree.map(jnp.add, adapter, step)) > least


def test_extract_recovers_a_merged_adapter() -> None:
    base = {"w": random_kernel("bio", 0)}
    adapter = trained(jax.random.key(0), random_case("bio", lj.LoRA(rank=3, alpha=5, axes="bio"))[1])
    tuned = lj.merge(base, adapter)
    again, residual = lj.extract(base, tuned, {"w": lj.LoRA(rank=3, alpha=5, axes="bio")}, param_dtype=jnp.float64)
    assert jax.tree.structure(again) == jax.tree.structure(adapter)
    np.testing.assert_allclose(lj.merge(base, again)["w"], tuned["w"], **TOLERANCE)
    assert residual["w"].max() < 1e-12


def test_the_factors_share_the_singular_values() -> None:
    base, tuned = {"w": random_kernel("io", 0)}, {"w": random_kernel("io", 1)}
    part = lj.extract(base, tuned, {"w": lj.LoRA(rank=3, alpha=6)}, param_dtype=jnp.float64)[0]["w"]
    s = np.linalg.svd(tuned["w"] - base["w"], compute_uv=False)[:3]
    np.testing.assert_allclose(part.a.T @ part.a, np.diag(s / 2), **TOLERANCE)
    np.testing.assert_allclose(part.b @ part.b.T, np.diag(s / 2), **TOLERANCE)


def test_each_leaf_follows_its_rule() -> None:
    names = ("kernel", "same", "frozen", "other", "bias", "same_bias")
    base = {name: jnp.ones((4, 3)) for name in names}
    tuned = {name: leaf if "same" in name else 2 * leaf for name, leaf in base.items()}
    spec = {
        "{kernel,same}": lj.LoRA(rank=1, alpha=1),
        "{bias,same_bias}": lj.Full(),
        "frozen": None,
    }
    adapter, residual = lj.extract(base, tuned, spec)
    assert list(adapter) == ["bias", "kernel"] and list(residual) == ["bias", "frozen", "kernel", "other"]
    np.testing.assert_array_equal(adapter["bias"].value, tuned["bias"])
    assert {path: round(float(residual_norm), 6) for path, residual_norm in residual.items()} == {
        "frozen": 1.0,
        "bias": 0.0,
        "kernel": 0.0,
        "other": 1.0,
    }


def test_axes_come_from_the_model_or_the_rule_and_are_not_kept() -> None:
    base, tuned = {"w": random_kernel("ioo", 0)}, {"w": random_kernel("ioo", 1)}
    kernels = lj.kernels(lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"]), base, jnp.ones((2, 6)))
    traced = lj.extract(base, tuned, {"w": lj.LoRA(rank=2, alpha=2)}, kernels=kernels)[0]
    stated = lj.extract(base, tuned, {"w": lj.LoRA(rank=2, alpha=2, axes="ioo")})[0]
    assert traced["w"].axes == stated["w"].axes == "ioo"
    assert traced["w"].variant == stated["w"].variant == lj.LoRA(rank=2, alpha=2)


def test_half_precision_is_subtracted_in_float32() -> None:
    base = {"w": np.asarray(random_kernel("io", 0).astype(jnp.bfloat16))}
    tuned = {"w": np.asarray((random_kernel("io", 0) + 0.1 * random_kernel("io", 1)).astype(jnp.bfloat16))}
    adapter, residual = lj.extract(base, tuned, {"w": lj.LoRA(rank=5, alpha=5)})
    assert {array.dtype for array in adapter["w"].arrays.values()} == {jnp.dtype("float32")}
    assert_few_ulp(lj.merge(base, adapter)["w"], tuned["w"], 1)
    assert float(residual["w"]) == 0


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_trees_may_be_sharded_and_have_leaves_that_are_not_numeric(kind: AxisType) -> None:
    base, tuned = {"w": random_kernel("bio", 0)}, {"w": random_kernel("bio", 1)}
    spec = {"w": lj.LoRA(rank=2, alpha=2, axes="bio")}
    expected = lj.extract(base, tuned, spec)
    mesh = Mesh(np.array(jax.devices()[:3]), ("x",), axis_types=(kind,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
    others = {"key": jax.random.key(0), "name": "a model"}
    base, tuned = (jax.device_put(tree, sharding) | others for tree in (base, tuned))
    found = lj.extract(base, tuned, spec)
    updates = [
        lj.merge({"w": jax.device_put(jnp.zeros(KERNELS["bio"]), result[0]["w"].a.sharding)}, result[0])["w"]
        for result in (found, expected)
    ]
    np.testing.assert_allclose(*updates, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1]["w"], expected[1]["w"], **TOLERANCE)
    smaller, lost = lj.compress(found[0], 1)
    np.testing.assert_allclose(lost["w"], lj.compress(expected[0], 1)[1]["w"], rtol=1e-5)
    assert smaller["w"].variant.rank == 1


WRONG = {
    "the same tree": (
        {"w": jnp.ones((4, 3))},
        "Expected a fine-tuned tree; it equals the base in every leaf.\n"
        "  Call extract(base, tuned, spec) with two different trees.",
    ),
    "another shape": (
        {"w": jnp.ones((4, 2))},
        "Expected two trees with the same paths and shapes; got 1 difference.\n"
        "  'w' has shape (4, 3) in the base and (4, 2) in the tuned tree",
    ),
    "another path": (
        {"v": jnp.ones((4, 3))},
        "Expected two trees with the same paths and shapes; got 2 differences.\n"
        "  'w' is only in the base\n  'v' is only in the tuned tree",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_tree_that_is_not_a_fine_tuned_base_is_an_error(name: str) -> None:
    tuned, text = WRONG[name]
    with pytest.raises(lj.AdapterError) as caught:
        lj.extract({"w": jnp.ones((4, 3))}, tuned, {"w": lj.LoRA(rank=1, alpha=1)})
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("variant", "text"),
    [
        (lj.LoRA(rank=1, alpha=0), "expected LoRA or RSLoRA, with a nonzero alpha, or Full; got LoRA("),
        (lj.LoRA(rank=4, alpha=1), "rank=4 is too large; with axes 'io' it can be at most 3."),
    ],
)
def test_a_variant_that_cannot_hold_the_change_is_an_error(variant: Any, text: str) -> None:
    base = {"w": jnp.ones((4, 3))}
    with pytest.raises(lj.SpecError) as caught:
        lj.extract(base, {"w": 2 * base["w"]}, {"w": variant})
    assert str(caught.value).startswith(f"Cannot adapt 'w' of shape (4, 3), by the rule 'w': {text}")


def test_a_clipped_rank_is_the_rank_of_the_factors() -> None:
    base, tuned = {"w": jnp.zeros((4, 3))}, {"w": jnp.ones((4, 3))}
    adapter, residual = lj.extract(base, tuned, {"w": lj.LoRA(rank=8, alpha=6, clip_rank=True)})
    assert adapter["w"].variant == lj.LoRA(rank=3, alpha=6)
    assert float(residual["w"]) < 1e-6


# From an adapter of a higher rank


def test_a_numpy_float64_base_is_compared_at_the_precision_of_the_tuned_tree() -> None:
    wide = np.random.default_rng(0).normal(size=(8, 4))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tuned = jax.device_put({"same": wide, "tuned": wide + 1}, NamedSharding(mesh, PartitionSpec("x")))
    adapter, _ = lj.extract({"same": wide, "tuned": wide}, tuned, {"*": lj.LoRA(rank=2, alpha=4, axes="io")})
    assert [*adapter] == ["tuned"]


@pytest.mark.parametrize("x64", [True, False])
def test_the_change_of_numpy_float64_is_not_rounded_before(x64: bool) -> None:
    base = np.random.default_rng(0).normal(size=(8, 4))
    change = 1e-8 * np.outer(np.arange(1.0, 9), np.arange(1.0, 5))
    with jax.enable_x64(x64):
        adapter, residual = lj.extract({"w": base}, {"w": base + change}, {"w": lj.LoRA(rank=1, alpha=2)})
    factors = adapter["w"]
    np.testing.assert_allclose(2 * np.asarray(factors.a) @ np.asarray(factors.b), change, rtol=1e-5)
    assert residual["w"] < 1e-6


@each_kernel
def test_compress_truncates_the_product_at_the_same_scale(axes: str, variant: Any) -> None:
    zeros, adapter = random_case(axes, variant(rank=4, alpha=5, axes=axes))
    smaller, lost = lj.compress(adapter, 2)
    expected, residual_norm = truncated(matrices(lj.merge(zeros, adapter)["w"], axes), 2)
    np.testing.assert_allclose(matrices(lj.merge(zeros, smaller)["w"], axes), expected, **TOLERANCE)
    np.testing.assert_allclose(lost["w"], residual_norm, **TOLERANCE)
    assert smaller["w"].variant == variant(rank=2, alpha=5) and smaller["w"].axes == axes
    assert smaller["w"].variant.scale != adapter["w"].variant.scale


def test_compress_to_the_actual_rank_keeps_the_function() -> None:
    zeros, adapter = random_case("io", lj.LoRA(rank=4, alpha=8))
    part = adapter["w"]
    adapter = {"w": lj.Adapter(part.variant, "io", a=part.a.at[:, 2:].set(part.a[:, :2]), b=part.b)}
    smaller, lost = lj.compress(adapter, 2)
    np.testing.assert_allclose(lj.merge(zeros, smaller)["w"], lj.merge(zeros, adapter)["w"], **TOLERANCE)
    assert float(lost["w"]) < 1e-12


def test_a_rank_above_the_size_of_the_kernel_can_be_reduced() -> None:
    # Adapters of `as_plain` and of concatenations have such ranks.
    rng, zeros = np.random.default_rng(0), {"w": jnp.zeros((4, 6))}
    part = lj.Adapter(lj.LoRA(rank=7, alpha=3), "io", a=rng.normal(size=(4, 7)), b=rng.normal(size=(7, 6)))
    expected = lj.merge(zeros, {"w": part})["w"]
    for rank in (6, 5, 4):
        smaller, lost = lj.compress({"w": part}, rank)
        assert smaller["w"].variant.rank == rank and float(lost["w"]) < 1e-12
        np.testing.assert_allclose(lj.merge(zeros, smaller)["w"], expected, **TOLERANCE)


def test_a_negative_scale_stays_negative() -> None:
    zeros, adapter = random_case("io", lj.LoRA(rank=3, alpha=-4))
    expected = truncated(np.asarray(lj.merge(zeros, adapter)["w"]), 2)[0]
    np.testing.assert_allclose(lj.merge(zeros, lj.compress(adapter, 2)[0])["w"], expected, **TOLERANCE)


def test_the_product_is_never_materialized() -> None:
    _, adapter = random_case("io", lj.LoRA(rank=3, alpha=4))
    text = str(jax.make_jaxpr(lambda adapter: lj.compress(adapter, 2))(adapter))
    assert "f64[6,3]" in text
    assert "f64[6,5]" not in text and "f64[5,6]" not in text


def test_unchanged_leaves_are_the_same_arrays() -> None:
    _, adapter = random_case("io", lj.LoRA(rank=2, alpha=4))
    adapter["bias"] = lj.Adapter(lj.Full(), "", value=jnp.ones(3))
    smaller, lost = lj.compress(adapter, 2)
    assert smaller["w"] is adapter["w"] and smaller["bias"] is adapter["bias"]
    assert list(lost) == ["w"] and float(lost["w"]) == 0


def test_an_adapter_without_factors_is_unchanged() -> None:
    # Was the error of a pattern, which the caller had not passed.
    adapter = {"w": lj.Adapter(lj.MiSS(rank=2), "io", b=jnp.ones((2, 3)))}
    assert lj.compress(adapter, 1) == (adapter, {})
    with pytest.raises(lj.SpecError, match="Expected an integer of at least 1 for `rank`"):
        lj.compress(adapter, 0)


def test_the_first_pattern_that_matches_decides_the_rank() -> None:
    part = random_case("io", lj.LoRA(rank=4, alpha=4))[1]["w"]
    adapter = {"x/query": part, "x/value": part, "y": part}
    smaller, lost = lj.compress(adapter, {"x/query": 1, "x/*": 3})
    assert [part.variant.rank for part in smaller.values()] == [1, 3, 4]
    assert [float(residual_norm) == 0 for residual_norm in lost.values()] == [False, False, True]


def test_compress_works_under_jit_and_keeps_dtypes_and_dropout() -> None:
    _, adapter = random_case("bio", lj.LoRA(rank=4, alpha=5, axes="bio", dropout=0.1))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapter)
    smaller, _ = jax.jit(lambda adapter: lj.compress(adapter, 2))(half)
    assert smaller["w"].variant == dataclasses.replace(half["w"].variant, rank=2)
    assert {array.dtype for array in smaller["w"].arrays.values()} == {jnp.dtype("bfloat16")}
    nothing, lost = lj.compress(jax.tree.map(jnp.zeros_like, adapter), 1)
    assert not any(leaf.any() for leaf in jax.tree.leaves((nothing, lost)))


@pytest.mark.parametrize(
    ("rank", "text"),
    [
        (0, "Expected an integer of at least 1 for `rank`; got rank=0."),
        ({"v": 1}, "Expected every pattern to match a leaf with factors; 'v' matches none of 1.\n  The nearest paths:"),
    ],
)
def test_an_invalid_rank_is_an_error(rank: Any, text: str) -> None:
    with pytest.raises(lj.SpecError) as caught:
        lj.compress(random_case("io", lj.LoRA(rank=2, alpha=4))[1], rank)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("call", [lambda params: lj.compress(params, 1), lj.analysis.singular_values])
def test_parameters_in_place_of_the_adapter_are_an_error(call: Any) -> None:
    with pytest.raises(lj.AdapterError, match=r"Expected an adapter: .*; got an array at 'w'"):
        call({"w": jnp.zeros((4, 3))})


# By energy


def smallest_rank(matrix: np.ndarray, energy: float) -> int:
    s = np.linalg.svd(matrix, compute_uv=False) ** 2
    return max(1 + int((np.cumsum(layer) < energy * layer.sum()).sum()) for layer in s.reshape(-1, s.shape[-1]))


@each_kernel
def test_compress_keeps_the_smallest_rank_with_the_energy(axes: str, variant: Any) -> None:
    zeros, adapter = random_case(axes, variant(rank=4, alpha=5, axes=axes))
    update = matrices(lj.merge(zeros, adapter)["w"], axes)
    for energy in (0.3, 0.8, 0.95):
        rank = smallest_rank(update, energy)
        smaller, lost = lj.compress(adapter, energy=energy)
        expected, expected_lost = lj.compress(adapter, rank)
        assert smaller["w"].variant == variant(rank=rank, alpha=5)
        np.testing.assert_array_equal(smaller["w"].a, expected["w"].a)
        np.testing.assert_array_equal(lost["w"], expected_lost["w"])
        assert (lost["w"] ** 2 <= 1 - energy + 1e-12).all()
        if rank > 1:
            assert (lj.compress(adapter, rank - 1)[1]["w"] ** 2 > 1 - energy).any()


@each_kernel
def test_extract_keeps_the_smallest_rank_with_the_energy_up_to_that_of_the_variant(axes: str, variant: Any) -> None:
    base, tuned = {"w": random_kernel(axes, 0)}, {"w": random_kernel(axes, 1)}
    change = matrices(tuned["w"] - base["w"], axes)
    for energy in (0.5, 0.9, 0.999):
        spec = {"w": variant(rank=4, alpha=5, axes=axes)}
        adapter, lost = lj.extract(base, tuned, spec, energy=energy, param_dtype=jnp.float64)
        rank = min(4, smallest_rank(change, energy))
        assert adapter["w"].variant == variant(rank=rank, alpha=5)
        np.testing.assert_allclose(lost["w"], truncated(change, rank)[1], **TOLERANCE)


def test_each_pattern_has_its_energy_and_a_leaf_without_an_update_has_rank_one() -> None:
    part = random_case("io", lj.LoRA(rank=4, alpha=4))[1]["w"]
    zero = lj.Adapter(part.variant, "io", a=part.a, b=0 * part.b)
    adapter = {"x/query": part, "x/value": part, "y": part, "x/zero": zero}
    smaller, _ = lj.compress(adapter, energy={"x/query": 0.01, "x/*": 0.999999})
    assert [part.variant.rank for part in smaller.values()] == [1, 4, 4, 1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "Expected either `rank` or `energy`; got rank=None and energy=None."),
        ({"rank": 1, "energy": 0.5}, "Expected either `rank` or `energy`; got rank=1 and energy=0.5."),
        ({"energy": 1.0}, "Expected a number in (0, 1) for `energy`; got energy=1.0."),
        ({"energy": {"w": 0}}, "Expected a number in (0, 1) for `energy`; got energy=0."),
        ({"energy": {"v": 0.5}}, "Expected every pattern to match a leaf with factors; 'v' matches none of 1."),
    ],
)
def test_an_invalid_energy_is_an_error(arguments: Any, text: str) -> None:
    with pytest.raises(lj.SpecError) as caught:
        lj.compress(random_case("io", lj.LoRA(rank=2, alpha=4))[1], **arguments)
    assert str(caught.value).startswith(text)


def test_an_energy_under_jit_or_out_of_range_is_an_error() -> None:
    base, tuned = {"w": random_kernel("io", 0)}, {"w": random_kernel("io", 1)}
    with pytest.raises(lj.SpecError, match=r"because `energy` determines the ranks from them; got traced arrays\."):
        jax.jit(lambda adapter: lj.compress(adapter, energy=0.5))(random_case("io", lj.LoRA(rank=2, alpha=4))[1])
    with pytest.raises(lj.SpecError, match=r"Expected a number in \(0, 1\) for `energy`; got energy=2\."):
        lj.extract(base, tuned, {"w": lj.LoRA(rank=2, alpha=4)}, energy=2)
