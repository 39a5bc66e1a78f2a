"""VeRA: the trained vectors and the frozen random matrices."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from law import assert_close, normal

import lora_jax as lj

# Values of `A`. Adapters that were trained with other values would be useless.
GOLDEN = [[0.23375988, -0.99867034], [-0.83515, 0.16250539]]


def frozen(variant: lj.VeRA, d_in: int, d_out: int) -> tuple[Any, Any]:
    """`A`, (in, rank), and `B`, (rank, out), recovered by merging with one entry of `lambda_d` at a time."""
    params = {"w": jnp.zeros((d_in, d_out))}
    products = []
    for which in range(variant.rank):
        lambda_d = jnp.zeros(variant.rank).at[which].set(1.0)
        part = lj.Adapter(variant, "io", lambda_b=jnp.ones(d_out), lambda_d=lambda_d)
        products.append(np.asarray(lj.merge(params, {"w": part})["w"]))
    return np.stack(products)


def test_vera_matches_the_equation_of_the_paper() -> None:
    variant, x = lj.VeRA(rank=5, seed=3), normal(2, 4, seed=1)
    params = {"w": normal(4, 6)}
    part = lj.Adapter(variant, "io", lambda_b=normal(6, seed=2), lambda_d=normal(5, seed=4))
    outer = frozen(variant, 4, 6)  # the outer product of a column of A and a row of B, for each index of the rank
    low_rank = jnp.einsum("nd,rdf,r,f->nf", x, outer, part.lambda_d, part.lambda_b)
    assert_close(lj.lora(lambda p, x: x @ p["w"])(params, {"w": part}, x), x @ params["w"] + low_rank)


def test_the_outer_products_have_the_variance_of_kaiming_uniform() -> None:
    outer = frozen(lj.VeRA(rank=40, seed=0), 30, 20)
    singular = np.linalg.svd(outer, compute_uv=False)
    assert (singular[:, 1] < 1e-5 * singular[:, 0]).all()
    bound_a, bound_b = math.sqrt(6 / 30), math.sqrt(6 / 40)
    assert 0.9 * bound_a * bound_b < np.abs(outer).max() <= bound_a * bound_b
    # The variance of a product of two uniform variables is the product of their variances, b²/3 each.
    np.testing.assert_allclose(outer.std(), bound_a * bound_b / 3, rtol=0.05)


def test_all_kernels_use_the_first_rows_of_the_same_matrices() -> None:
    variant = lj.VeRA(rank=3, seed=7)
    small, large = frozen(variant, 4, 5), frozen(variant, 9, 8)
    np.testing.assert_allclose(small, large[:, :4, :5] * math.sqrt(9 / 4), rtol=1e-5)
    assert np.abs(frozen(lj.VeRA(rank=3, seed=8), 4, 5) - small).max() > 0.05


def test_the_matrices_are_reproducible() -> None:
    variant = lj.VeRA(rank=2, seed=5)
    expected = np.asarray(variant.frozen(0, 2, fan_in=6))
    np.testing.assert_allclose(expected, GOLDEN, rtol=1e-6)
    with jax.default_prng_impl("rbg"), jax.threefry_partitionable(False), jax.enable_x64(True):
        np.testing.assert_array_equal(variant.frozen(0, 2, fan_in=6), expected)


def test_the_layers_of_a_stack_share_matrices_and_have_separate_vectors() -> None:
    variant, params = lj.VeRA(rank=3, seed=0, axes="bio"), {"w": jnp.zeros((2, 4, 5))}
    part = lj.init(jax.random.key(0), params, {"w": variant})["w"]
    assert (part.lambda_b.shape, part.lambda_d.shape) == ((2, 5), (2, 3))
    part = lj.Adapter(part.variant, "bio", lambda_b=jnp.stack([jnp.ones(5), 2 * jnp.ones(5)]), lambda_d=part.lambda_d)
    first, second = lj.merge(params, {"w": part})["w"]
    assert_close(2 * first, second)


def test_only_the_vectors_are_trained_and_saved() -> None:
    params = {"w": normal(64, 48)}
    adapter = lj.init(jax.random.key(0), params, {"w": lj.VeRA(rank=256, seed=0)})
    assert {name: array.shape for name, array in adapter["w"].arrays.items()} == {"lambda_b": (48,), "lambda_d": (256,)}
    assert not adapter["w"].lambda_b.any()
    assert (adapter["w"].lambda_d == np.float32(0.1)).all()
    row = lj.explain(lambda p, x: x @ p["w"], params, adapter, jnp.ones((2, 64))).rows[0]
    assert (row.variant, row.parameters, row.rank) == ("VeRA", 48 + 256, 256)


def test_unmerge_restores_the_base() -> None:
    params = {"w": normal(6, 5)}
    part = lj.Adapter(lj.VeRA(rank=4, seed=0), "io", lambda_b=normal(5, seed=1), lambda_d=normal(4, seed=2))
    merged = lj.merge(params, {"w": part})
    assert float(jnp.abs(merged["w"] - params["w"]).max()) > 0.1
    restored, _ = lj.unmerge_approximately(merged, {"w": part})
    assert_close(restored["w"], params["w"])


def test_the_matrices_are_computed_in_the_program_and_not_stored() -> None:
    params = {"w": jnp.zeros((256, 128))}
    adapter = lj.init(jax.random.key(0), params, {"w": lj.VeRA(rank=64, seed=0)})
    step = jax.jit(lj.lora(lambda p, x: x @ p["w"]))
    text = step.lower(params, adapter, jnp.ones((2, 256))).compile().as_text()
    sizes = [math.prod(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\][^=]* constant\(", text)]
    assert max(sizes, default=0) < 64


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0, "seed": 0}, "Expected an integer of at least 1 for `rank`; got rank=0."),
        ({"rank": 4, "seed": -1}, "Expected an integer in [0, 4294967296) for `seed`; got seed=-1."),
        ({"rank": 4, "seed": 2**32}, "Expected an integer in [0, 4294967296) for `seed`; got seed=4294967296."),
        ({"rank": 4, "seed": 0, "dropout": 1.0}, "Expected a number in [0, 1) for `dropout`; got dropout=1.0."),
        (
            {"rank": 4, "seed": 0, "axes": "ii"},
            "Cannot adapt 'w' of shape (3, 4), by the rule 'w': VeRA needs input and output axes; the kernel's are "
            "'ii'.",
        ),
    ],
)
def test_invalid_options_are_errors(options: dict[str, Any], text: str) -> None:
    with pytest.raises(lj.SpecError, match=re.escape(text)):
        lj.init(jax.random.key(0), {"w": jnp.ones((3, 4))}, {"w": lj.VeRA(**options)})
