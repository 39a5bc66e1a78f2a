"""The measures of an adapter in float64, against NumPy decompositions of materialized matrices and closed forms."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits, trained
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure

import lora_jax as lj
from lora_jax import analysis
from lora_jax._core import linalg as _matrices

KERNELS = {"io": (6, 5), "ioo": (6, 2, 3), "iio": (2, 3, 7), "iiio": (2, 2, 3, 8), "bio": (3, 6, 5), "ibo": (6, 3, 5)}
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def random_case(axes: str, rank: int = 3, seed: int = 0, **choices: Any) -> tuple[Any, Any]:
    """A kernel and an adapter like a trained one."""
    params = {"w": jnp.asarray(np.random.default_rng(seed).standard_normal(KERNELS[axes]))}
    variant = lj.LoRA(rank=rank, alpha=5, axes=axes, **choices)
    adapter = lj.init(jax.random.key(0), params, {"w": variant}, param_dtype=jnp.float64)
    return params, trained(jax.random.key(seed + 1), adapter)


def layers_of(params: Any, adapter: Any) -> tuple[np.ndarray, np.ndarray]:
    """The kernel and the materialized update as matrices (batch…, in, out)."""
    axes, w = adapter["w"].axes, np.asarray(params["w"])
    delta = np.asarray(lj.merge(params, adapter)["w"]) - w

    def matrices(kernel: np.ndarray) -> np.ndarray:
        by_role = [[axis for axis, role in enumerate(axes) if role == wanted] for wanted in "bio"]
        batch, d_in, d_out = ([kernel.shape[axis] for axis in group] for group in by_role)
        ordered = kernel.transpose([axis for group in by_role for axis in group])
        return ordered.reshape(*batch, math.prod(d_in), math.prod(d_out))

    return matrices(w), matrices(delta)


each_layout = pytest.mark.parametrize("axes", KERNELS)
some_layouts = pytest.mark.parametrize("axes", ["ioo", "iiio", "ibo"])  # layouts that become matrices in different ways


@each_layout
def test_singular_values_match_the_materialized_update(axes: str) -> None:
    params, adapter = random_case(axes)
    _, delta = layers_of(params, adapter)
    expected = np.linalg.svd(delta, compute_uv=False)[..., :3]
    np.testing.assert_allclose(analysis.singular_values(adapter)["w"], expected, **TOLERANCE)


def test_the_update_is_never_materialized() -> None:
    _, adapter = random_case("io", rank=2)
    text = str(jax.make_jaxpr(analysis.singular_values)(adapter))
    assert "f64[6,2]" in text
    assert "f64[6,5]" not in text and "f64[5,6]" not in text


def test_singular_values_do_not_depend_on_the_sign_of_the_scale() -> None:
    _, adapter = random_case("io")
    part = adapter["w"]
    negated = lj.Adapter(dataclasses.replace(part.variant, alpha=-5), part.axes, **part.arrays)
    one, other = (analysis.singular_values({"w": p})["w"] for p in (part, negated))
    np.testing.assert_allclose(one, other, **TOLERANCE)


@some_layouts
@pytest.mark.parametrize("of", ["a", "b"])
def test_similarity_compares_singular_vectors_of_the_factors(axes: str, of: str) -> None:
    (_, one), (_, other) = random_case(axes, rank=2, seed=3), random_case(axes, rank=3, seed=4)
    found = np.asarray(analysis.subspace_similarity(one, other, of=of)["w"])
    factors = [_matrices.factor_matrices(adapter["w"]) for adapter in (one, other)]
    bases = [np.linalg.svd(np.asarray(a if of == "a" else b.mT), full_matrices=False)[0] for a, b in factors]
    for i in range(1, 3):
        for j in range(1, 4):
            overlap = np.swapaxes(bases[0][..., :i], -1, -2) @ bases[1][..., :j]
            expected = np.sum(overlap**2, axis=(-2, -1)) / min(i, j)
            np.testing.assert_allclose(found[..., i - 1, j - 1], expected, **TOLERANCE)


def test_similarity_ignores_scale_and_is_zero_for_disjoint_subspaces() -> None:
    def part(a: Any) -> dict[str, lj.Adapter]:
        return {"w": lj.Adapter(lj.LoRA(rank=2, alpha=2), "io", a=jnp.asarray(a, jnp.float64), b=jnp.ones((2, 3)))}

    upper, lower = np.eye(4, 2) * [3, 2], np.eye(4)[:, 2:] * [3, 2]
    np.testing.assert_allclose(analysis.subspace_similarity(part(upper), part(7 * upper))["w"], [[1, 1], [1, 1]])
    np.testing.assert_allclose(analysis.subspace_similarity(part(upper), part(lower))["w"], np.zeros((2, 2)))
    exchanged = upper[:, ::-1] * [2, 1]  # (e2, e1) with the order of sizes exchanged
    np.testing.assert_allclose(analysis.subspace_similarity(part(upper), part(exchanged))["w"], [[0, 1], [1, 1]])


def test_independent_factors_have_the_similarity_of_random_subspaces() -> None:
    params = {"w": jnp.zeros((400, 40))}
    spec = {"w": lj.LoRA(rank=20, alpha=20)}
    one, other = (lj.init(jax.random.key(seed), params, spec, param_dtype=jnp.float64) for seed in (0, 1))
    found = analysis.subspace_similarity(one, other)["w"]
    assert float(found[-1, -1]) == pytest.approx(20 / 400, rel=0.15)


@some_layouts
def test_relative_norms_match_the_materialized_matrices(axes: str) -> None:
    params, adapter = random_case(axes)
    kernel, delta = layers_of(params, adapter)
    expected = np.linalg.norm(delta, axis=(-2, -1)) / np.linalg.norm(kernel, axis=(-2, -1))
    np.testing.assert_allclose(analysis.relative_norms(params, adapter)["w"], expected, **TOLERANCE)


@some_layouts
def test_amplification_matches_the_materialized_matrices(axes: str) -> None:
    params, adapter = random_case(axes, rank=2)
    kernel, delta = layers_of(params, adapter)
    found = analysis.amplification(params, adapter)["w"]

    def along(matrix: np.ndarray) -> np.ndarray:
        u, _, vt = np.linalg.svd(matrix)
        inner = np.swapaxes(u[..., :2], -1, -2) @ kernel @ np.swapaxes(vt[..., :2, :], -1, -2)
        return np.linalg.norm(inner, axis=(-2, -1))

    size = np.linalg.norm(delta, axis=(-2, -1))
    np.testing.assert_allclose(found.delta, size, **TOLERANCE)
    np.testing.assert_allclose(found.kernel, np.linalg.norm(kernel, axis=(-2, -1)), **TOLERANCE)
    np.testing.assert_allclose(found.along_delta, along(delta), **TOLERANCE)
    np.testing.assert_allclose(found.along_kernel, along(kernel), **TOLERANCE)
    np.testing.assert_allclose(found.factor, size / along(delta), **TOLERANCE)


def test_amplification_of_random_directions_matches_sampling() -> None:
    params, adapter = random_case("io", rank=2)
    kernel = np.asarray(params["w"])
    random = np.random.default_rng(0)
    u, v = (np.linalg.qr(random.standard_normal((4000, size, 2)))[0] for size in kernel.shape)
    squares = np.sum((np.swapaxes(u, 1, 2) @ kernel @ v) ** 2, axis=(1, 2))
    found = float(analysis.amplification(params, adapter)["w"].along_random)
    assert found**2 == pytest.approx(squares.mean(), rel=0.05)
    # The values of the LoRA paper for GPT-3, of width 12288: 0.02 at r = 4 and 0.33 at r = 64.
    assert 61.95 * 4 / 12288 == pytest.approx(0.02, abs=0.005)
    assert 61.95 * 64 / 12288 == pytest.approx(0.33, abs=0.01)


@some_layouts
@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_intruders_are_singular_vectors_that_the_base_lacks(axes: str, threshold: float) -> None:
    params, adapter = random_case(axes)
    kernel, delta = layers_of(params, adapter)
    found = analysis.intruders(params, adapter, top=3, threshold=threshold)["w"]
    own = np.linalg.svd(kernel, full_matrices=False)[2]
    _, values, vt = np.linalg.svd(kernel + delta, full_matrices=False)
    similarity = np.abs(vt[..., :3, :] @ np.swapaxes(own, -1, -2)).max(-1)
    np.testing.assert_allclose(found.similarity, similarity, rtol=1e-8)
    np.testing.assert_allclose(found.singular_values, values[..., :3], **TOLERANCE)
    np.testing.assert_array_equal(found.intruder, similarity < threshold)
    np.testing.assert_array_equal(found.number, (similarity < threshold).sum(-1))


def test_intruders_compare_the_vectors_of_the_outputs() -> None:
    params = {"w": jnp.diag(jnp.array([4.0, 3.0, 2.0]))}
    spread = jnp.ones((3, 1)) / jnp.sqrt(3)
    own = jnp.array([[1.0, 0.0, 0.0]])
    new_input = lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=100 * spread, b=own)
    new_output = lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=100 * own.T, b=spread.T)
    assert not analysis.intruders(params, {"w": new_input}, top=1, threshold=0.9)["w"].intruder[0]
    assert analysis.intruders(params, {"w": new_output}, top=1, threshold=0.9)["w"].intruder[0]


def test_a_fresh_adapter_has_no_intruders_and_no_amplification() -> None:
    params, adapter = random_case("bio")
    nothing = jax.tree.map(jnp.zeros_like, adapter)
    assert not analysis.intruders(params, nothing, top=4)["w"].intruder.any()
    assert not analysis.amplification(params, nothing)["w"].factor.any()
    assert not analysis.relative_norms(params, nothing)["w"].any()


def test_leaves_without_factors_are_omitted() -> None:
    params = {"w": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    spec = {"w": lj.LoRA(rank=1, alpha=1), "bias": lj.Full()}
    adapter = lj.init(jax.random.key(0), params, spec)
    measured = [
        analysis.singular_values(adapter),
        analysis.subspace_similarity(adapter, adapter),
        analysis.relative_norms(params, adapter),
        analysis.amplification(params, adapter),
        analysis.intruders(params, adapter),
    ]
    assert [list(found) for found in measured] == [["w"]] * 5


@some_layouts
@pytest.mark.parametrize("scale", [0.75, 0.0])
def test_intruders_are_scaled_in_the_adapted_kernel_up_to_the_rank_of_the_update(axes: str, scale: float) -> None:
    params, adapter = random_case(axes)
    kernel, delta = layers_of(params, adapter)
    found = analysis.intruders(params, adapter, top=3, threshold=0.97)["w"]
    assert found.intruder.any()
    reduced, residual = analysis.reduce_intruders(params, adapter, scale=scale, top=3, threshold=0.97)
    u, s, vt = np.linalg.svd(kernel + delta, full_matrices=False)
    mask = np.where(found.intruder, scale - 1, 0) * s[..., :3]
    expected = delta + (u[..., :3] * mask[..., None, :]) @ vt[..., :3, :]
    rank = adapter["w"].a.shape[-1]
    u, s, vt = np.linalg.svd(expected, full_matrices=False)
    truncated = (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]
    np.testing.assert_allclose(layers_of(params, reduced)[1], truncated, **TOLERANCE)
    lost = np.linalg.norm(s[..., rank:], axis=-1) / np.linalg.norm(s, axis=-1)
    np.testing.assert_allclose(residual["w"], np.where(found.intruder.any(-1), lost, 0), **TOLERANCE)
    assert jax.tree.structure(reduced) == jax.tree.structure(adapter)


def test_a_layer_without_intruders_is_unchanged_bit_for_bit() -> None:
    params, adapter = random_case("bio")
    part = adapter["w"]
    adapter = {"w": lj.Adapter(part.variant, "bio", a=part.a, b=part.b.at[1].set(0))}
    for call in (analysis.reduce_intruders, jax.jit(analysis.reduce_intruders)):
        reduced, residual = call(params, adapter)
        np.testing.assert_array_equal(reduced["w"].a[1], part.a[1])
        np.testing.assert_array_equal(reduced["w"].b[1], 0)
        assert residual["w"].shape == (3,) and residual["w"][1] == 0
    nothing, residual = analysis.reduce_intruders(params, adapter, threshold=0.0)
    assert bits(nothing) == bits(adapter) and not residual["w"].any()


def test_intruders_of_a_rank_above_the_size_of_the_kernel_are_reduced() -> None:
    # Such as that of `as_plain`.
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 5)))}
    part = lj.Adapter(lj.LoRA(rank=7, alpha=3), "io", a=rng.normal(size=(4, 7)), b=rng.normal(size=(7, 5)))
    reduced, residual = analysis.reduce_intruders(params, {"w": part}, scale=0.5, top=2, threshold=0.99)
    kernel, delta = layers_of(params, {"w": part})
    intruder = np.asarray(analysis.intruders(params, {"w": part}, top=2, threshold=0.99)["w"].intruder)
    u, s, vt = np.linalg.svd(kernel + delta, full_matrices=False)
    expected = delta - 0.5 * (u[:, :2] * (s[:2] * intruder)) @ vt[:2]
    assert intruder.any() and float(residual["w"]) < 1e-12
    np.testing.assert_allclose(layers_of(params, reduced)[1], expected, **TOLERANCE)


def test_leaves_whose_intruders_cannot_be_reduced_are_an_error_or_unchanged() -> None:
    params = {"w": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    spec = {"w": lj.DoRA(rank=1, alpha=1, axes="io"), "bias": lj.Full()}
    adapter = lj.init(jax.random.key(0), params, spec)
    with pytest.raises(lj.AdapterError, match=r"whose update is s·A·B; got 1 others\.\n  'w': DoRA"):
        analysis.reduce_intruders(params, adapter)
    reduced, residual = analysis.reduce_intruders(params, {"bias": adapter["bias"]})
    assert reduced["bias"] is adapter["bias"] and residual == {}
    with pytest.raises(lj.SpecError, match="Expected a finite number for `scale`"):
        analysis.reduce_intruders(params, {}, scale=float("nan"))


def test_intruders_works_for_every_variant() -> None:
    params = {"w": jnp.diag(jnp.array([4.0, 3.0, 2.0]))}
    rows = jnp.array([[0.0, 50.0, 50.0]])
    found = analysis.intruders(params, {"w": lj.Adapter(lj.Rows(ids=(1,)), "io", rows=rows)}, top=1, threshold=0.9)["w"]
    expected = np.linalg.svd(np.array([[4, 0, 0], [0, 53, 50], [0, 0, 2]]), compute_uv=False)
    np.testing.assert_allclose(found.singular_values, expected[:1], **TOLERANCE)
    assert found.intruder.all()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_all_measures_work_under_jit_and_on_sharded_arrays(kind: AxisType) -> None:
    params, adapter = random_case("bio")

    def measure(params: Any, adapter: Any) -> Any:
        return (
            analysis.singular_values(adapter),
            analysis.subspace_similarity(adapter, adapter),
            analysis.relative_norms(params, adapter),
            analysis.amplification(params, adapter),
            analysis.intruders(params, adapter, top=2),
        )

    mesh = Mesh(np.array(jax.devices()[:2]), ("x",), axis_types=(kind,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
    params_sharded = jax.device_put(params, sharding)
    adapter_sharded = {
        "w": lj.Adapter(adapter["w"].variant, "bio", a=jax.device_put(adapter["w"].a, sharding), b=adapter["w"].b)
    }
    expected = jax.jit(measure)(params, adapter)
    with jax.set_mesh(mesh):
        for found in (measure(params_sharded, adapter_sharded), jax.jit(measure)(params_sharded, adapter_sharded)):
            jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-8), found, expected)


def test_numpy_and_half_precision_kernels_are_measured_in_wider_dtypes() -> None:
    params, adapter = random_case("io")
    half = {"w": np.asarray(params["w"].astype(jnp.bfloat16))}
    found = analysis.relative_norms(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapter))["w"]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, analysis.relative_norms(params, adapter)["w"], rtol=2e-2)


# Errors


def test_adapters_without_common_leaves_are_an_error() -> None:
    _, adapter = random_case("io")
    with pytest.raises(lj.AdapterError) as caught:
        analysis.subspace_similarity(adapter, {"v": adapter["w"]})
    assert str(caught.value) == (
        "Expected two adapters of the same kernels; none of the 1 low-rank paths of the first is among the 1 of the "
        "second.\n  Their first paths are ['w'] and ['v']."
    )


def test_adapters_of_other_kernels_are_an_error() -> None:
    (_, one), (_, other) = random_case("io"), random_case("bio")
    with pytest.raises(lj.AdapterError) as caught:
        analysis.subspace_similarity(one, other)
    assert str(caught.value) == (
        "Expected factors of one kernel; `a` of 'w' has directions of shape (6,) in one adapter and (3, 6) in the "
        "other.\n  Compare adapters of the same model."
    )


@pytest.mark.parametrize("measure", [analysis.relative_norms, analysis.amplification, analysis.intruders])
def test_an_adapter_of_another_model_is_an_error(measure: Any) -> None:
    _, adapter = random_case("io")
    with pytest.raises(lj.AdapterError, match="Expected an adapter of `params`"):
        measure({"w": jnp.ones((6, 4))}, adapter)


def test_plotting_nothing_is_an_error() -> None:
    with pytest.raises(lj.AdapterError, match="Expected something to plot; got nothing"):
        analysis.plot_relative_norms({})


# Plots


def test_every_figure_shows_each_layer() -> None:
    params, adapter = random_case("bio")
    figures = {
        "lines": analysis.plot_singular_values(analysis.singular_values(adapter)),
        "panels": analysis.plot_subspace_similarity(analysis.subspace_similarity(adapter, adapter)),
        "norms": analysis.plot_relative_norms(analysis.relative_norms(params, adapter)),
        "amplification": analysis.plot_amplification(analysis.amplification(params, adapter)),
        "intruders": analysis.plot_intruders(analysis.intruders(params, adapter, top=4, threshold=0.99)),
    }
    assert all(isinstance(figure, Figure) for figure in figures.values())
    assert [line.get_label() for line in figures["lines"].axes[0].lines] == ["w[0]", "w[1]", "w[2]"]
    assert [panel.get_title() for panel in figures["panels"].axes] == ["w[0]", "w[1]", "w[2]", ""]
    np.testing.assert_allclose(
        [bar.get_width() for bar in figures["norms"].axes[0].patches], analysis.relative_norms(params, adapter)["w"]
    )
    factors = analysis.amplification(params, adapter)["w"].factor
    names = [label.get_text() for label in figures["amplification"].axes[0].get_yticklabels()]
    assert names == [f"w[{layer}] (×{float(factor):.3g})" for layer, factor in enumerate(factors)]
    number = analysis.intruders(params, adapter, top=4, threshold=0.99)["w"].number.sum()
    assert len(figures["intruders"].axes[0].texts) == int(number) > 0


def test_a_figure_is_drawn_without_a_window_or_a_warning(tmp_path: Any) -> None:
    params, adapter = random_case("io")
    for figure in (
        analysis.plot_amplification(analysis.amplification(params, adapter)),
        analysis.plot_subspace_similarity(analysis.subspace_similarity(adapter, adapter)),
    ):
        figure.savefig(tmp_path / "figure.png", dpi=40)
        assert (tmp_path / "figure.png").stat().st_size > 1000
