"""All functions that accept an adapter, on bases of every dtype. `make settings` runs it under JAX's strict settings.

The tests promote no dtype or rank implicitly, so that a failure is an implicit promotion in the package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import trained
from law import assert_law, normal
from zoo import ZOO

import lora_jax as lj
from lora_jax import adaptive, analysis, many, optim, starts

pytestmark = pytest.mark.sweep

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
# The rounding error, relative to the largest element.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float8_e4m3fn": 7e-2, "float8_e5m2": 0.13}

VARIANTS: dict[str, Callable[..., Any]] = {
    "LoRA": functools.partial(lj.LoRA, rank=2, alpha=3),
    "RSLoRA": functools.partial(lj.RSLoRA, rank=2, alpha=3),
    "DoRA": functools.partial(lj.DoRA, rank=2, alpha=3),
    "AdaLoRA": functools.partial(lj.AdaLoRA, rank=2, alpha=3),
    "VeRA": functools.partial(lj.VeRA, rank=6, seed=1),
    "LoRAXS": functools.partial(lj.LoRAXS, rank=2, alpha=3),
    "DeLoRA": functools.partial(lj.DeLoRA, rank=2),
    "IA3": lj.IA3,
    "MiSS": functools.partial(lj.MiSS, rank=2),
    "QALoRA": functools.partial(lj.QALoRA, rank=2, alpha=3, group=2),
    "Layers": lambda axes: lj.Layers(variant=lj.LoRA(rank=2, alpha=3, axes=axes), layers=[1]),
    "Rows": functools.partial(lj.Rows, ids=[0, 3]),
    "Full": lambda axes: lj.Full(),
    "LoRABias": lambda axes: lj.LoRABias(scale=2),
}


# Without a setting, other tests cover the same.
settings_only = pytest.mark.slow


def in_dtypes(*dtypes: Any) -> Any:
    return pytest.mark.parametrize("dtype", dtypes, ids=lambda dtype: jnp.dtype(dtype).name)


def model(dtype: Any) -> tuple[dict[str, jax.Array], Callable[..., jax.Array], jax.Array]:
    """A stack of two layers, a model that scans it, and its input."""
    params = {"stack": normal(2, 6, 6, size=0.5, dtype=dtype)}

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.astype(x.dtype)), None), x, params["stack"])[0]

    return params, apply, normal(4, 6, seed=1)


def adapter_of(params: Any, variant: str = "LoRA", *, dtype: Any = jnp.float32) -> Any:
    """An adapter whose arrays differ from their initial values."""
    rule = VARIANTS[variant](axes="bio")
    adapter = lj.init(jax.random.key(0), params, {"stack": rule}, param_dtype=dtype)
    leaves, treedef = jax.tree.flatten(adapter)
    moved = [leaf + normal(*leaf.shape, seed=9 + at, size=0.2, dtype=dtype) for at, leaf in enumerate(leaves)]
    return treedef.unflatten(moved)


def assert_near(got: Any, expected: Any, tolerance: float) -> None:
    got, expected = (np.asarray(x).astype(np.float64) for x in (got, expected))
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-3))


OTHERS = [("LoRA", jnp.float32), ("LoRA", jnp.bfloat16), ("LoRA", E5M2), ("DoRA", jnp.bfloat16), ("VeRA", jnp.float32)]


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [*((name, E4M3) for name in VARIANTS), *(pytest.param(*case, marks=settings_only) for case in OTHERS)],
    ids=lambda x: x if isinstance(x, str) else jnp.dtype(x).name,
)
def test_a_base_of_every_dtype_is_adapted_merged_and_restored(variant: str, dtype: Any) -> None:
    params, apply, x = model(dtype)
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    adapter = adapter_of(params, variant)
    if variant == "DoRA":  # the initial magnitude is the norm of each column
        start = lj.init(jax.random.key(0), params, {"stack": VARIANTS[variant](axes="bio")})["stack"]
        assert_near(start.magnitude, jnp.linalg.norm(wide["stack"], axis=1), 1e-5)
    exact = lj.merge(wide, adapter)
    merged = lj.merge(params, adapter)
    report = lj.merge_report(params, adapter, merged)
    assert merged["stack"].dtype == dtype
    assert_near(merged["stack"], exact["stack"], TOLERANCE[jnp.dtype(dtype).name])
    assert report["stack"].max_error <= TOLERANCE[jnp.dtype(dtype).name] * float(jnp.abs(exact["stack"]).max())
    assert lj.unmerge(merged, adapter, base=params)["stack"] is params["stack"]
    if VARIANTS[variant](axes="bio").adds:
        restored, drift = lj.unmerge_approximately(merged, adapter)
        there = jnp.abs(restored["stack"].astype(jnp.float32) - wide["stack"])
        assert float(there.max()) <= drift["stack"]

    def total(adapter: Any) -> tuple[jax.Array, jax.Array]:
        out = lj.lora(apply)(params, adapter, x)
        return jnp.sum(jnp.sin(out)), out

    gradient, out = jax.jit(jax.grad(total, has_aux=True))(adapter)
    if variant not in ("Full", "LoRABias"):  # the model receives these in the dtype of the base
        assert_near(out, apply(exact, x), 1e-4)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradient))
    lj.explain(apply, params, adapter, x, strict=True)


@settings_only
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_16_bit_adapter_is_merged_and_trained(variant: str) -> None:
    params, apply, x = model(jnp.float32)
    adapter = adapter_of(params, variant, dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), adapter)
    assert_near(lj.merge(params, adapter)["stack"], lj.merge(params, wide)["stack"], 2e-2)
    gradient = jax.jit(jax.grad(lambda adapter: jnp.sum(lj.lora(apply)(params, adapter, x))))(adapter)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.bfloat16)}


@in_dtypes(E4M3)
def test_initializations_work_for_a_base_of_every_dtype(dtype: Any) -> None:
    params, apply, x = model(dtype)
    adapter, key = adapter_of(params), jax.random.key(1)
    loss = lambda params, x: jnp.sum(apply(params, x))  # noqa: E731
    seen = starts.activations(apply, params, adapter, x, token_weights=jnp.linspace(0, 1, 4))
    started = {
        "gaussian": starts.gaussian(key, params, adapter),
        "kaiming": starts.kaiming(key, params, adapter),
        "orthogonal": starts.orthogonal(key, params, adapter),
        "eva": starts.eva(params, adapter, seen, whiten=True),
        "corda": starts.corda(params, adapter, seen),
        "mica": starts.mica(params, adapter),
        "pissa": starts.pissa(params, adapter),
        "pissa, randomized": starts.pissa(params, adapter, niter=2, key=key),
        "olora": starts.olora(params, adapter),
        "lora_ga": starts.lora_ga(params, adapter, starts.gradients(loss, params, adapter, x)),
    }
    for name, start in started.items():
        assert start.params["stack"].dtype == dtype, name
        # The original base, up to the rounding of the residual and of the sum.
        merged = lj.merge(start.params, start.adapter)["stack"]
        assert_near(merged, params["stack"], 2 * TOLERANCE[jnp.dtype(dtype).name])
    plain = starts.as_plain(params, started["pissa"].adapter, *started["pissa"])
    assert_near(lj.merge(params, plain)["stack"], params["stack"], 2 * TOLERANCE[jnp.dtype(dtype).name])


@in_dtypes(E4M3)
def test_measures_of_a_base_of_every_dtype_match_float32(dtype: Any) -> None:
    params, _, _ = model(dtype)
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    adapter = adapter_of(params)
    for measure in (analysis.relative_norms, analysis.amplification, functools.partial(analysis.intruders, top=3)):
        for one, other in zip(*(jax.tree.leaves(measure(base, adapter)) for base in (params, wide)), strict=True):
            assert_near(one, other, 1e-5)
    assert analysis.singular_values(adapter)["stack"].shape == (2, 2)
    assert analysis.subspace_similarity(adapter, adapter)["stack"].shape == (2, 2, 2)
    merged = lj.merge(params, adapter)
    extracted, residual = lj.extract(params, merged, {"stack": lj.LoRA(rank=4, alpha=3, axes="bio")})
    assert_near(lj.merge(params, extracted)["stack"], merged["stack"], 2 * TOLERANCE[jnp.dtype(dtype).name])
    smaller, _ = lj.compress(extracted, 1)
    assert smaller["stack"].a.shape == (2, 6, 1) and residual["stack"].shape == (2,)


@settings_only
@in_dtypes(jnp.bfloat16)
@pytest.mark.parametrize("variant", ["LoRA", "AdaLoRA", "DoRA"])
def test_every_optimizer_takes_a_step(variant: str, dtype: Any) -> None:
    params, apply, x = model(jnp.float32)
    adapter = adapter_of(params, variant, dtype=dtype)
    gradient = jax.grad(lambda adapter: jnp.sum(lj.lora(apply)(params, adapter, x)))(adapter)
    both, gradients = {"base": params, "adapter": adapter}, {"base": params, "adapter": gradient}
    for tx, before, back in (
        (optax.chain(optax.sgd(0.1), optim.lora_plus(16)), adapter, gradient),
        (optim.lora_fa(optax.sgd(0.1)), adapter, gradient),
        (optax.chain(optim.riemannian(), optax.sgd(0.1)), adapter, gradient),
        (optim.freeze_base(optax.sgd(0.1)), both, gradients),
    ):
        updates, _ = jax.jit(tx.update)(back, tx.init(before), before)
        assert all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(updates))


@settings_only
@in_dtypes(jnp.bfloat16)
def test_ranks_are_adapted(dtype: Any) -> None:
    params, apply, x = model(jnp.float32)
    adapter = adapter_of(params, "AdaLoRA", dtype=dtype)
    tx = adaptive.ada_lora(optax.sgd(0.1), end=2, warmup=0, settle=0, total=1)

    def loss(adapter: Any) -> jax.Array:
        return jnp.sum(lj.lora(apply)(params, adapter, x)) + 0.1 * adaptive.orthogonality(adapter)

    updates, _ = jax.jit(tx.update)(jax.grad(loss)(adapter), tx.init(adapter), adapter)
    after = optax.apply_updates(adapter, updates)
    assert int(jnp.count_nonzero(after["stack"].e)) == 2
    small = adaptive.compact(after)
    got, expected = (lj.merge(params, part)["stack"] for part in (small, after))
    assert_near(got, expected, TOLERANCE[jnp.dtype(dtype).name])


@settings_only
@pytest.mark.parametrize("name", ["mlp", "scanned_transformer", "conv_net", "equinox_net"])
def test_models_obey_the_laws(name: str) -> None:
    zoo_model = ZOO[name](jax.random.key(0), jnp.float32)
    kernels = lj.kernels(zoo_model.apply, zoo_model.params, *zoo_model.args)
    adapter = trained(jax.random.key(1), lj.init(jax.random.key(0), zoo_model.params, zoo_model.spec, kernels=kernels))
    assert_law(zoo_model.apply, zoo_model.params, adapter, *zoo_model.args, compiled=True)


@in_dtypes(jnp.float32, jnp.bfloat16)
def test_many_adapters_are_trained_selected_mixed_and_combined(dtype: Any) -> None:
    params, apply, x = model(dtype)
    one, other = adapter_of(params, dtype=dtype), adapter_of(params, "RSLoRA", dtype=dtype)
    tolerance = 5 * TOLERANCE[jnp.dtype(dtype).name]
    stacked = many.swap(many.stack({"one": one, "other": other}), "one", one)

    def loss(params: Any, adapter: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(lj.lora(apply)(params, adapter, x) ** 2)

    tx = optax.sgd(1e-3, momentum=0.9)
    states = jax.vmap(tx.init)(stacked.members.trainable)
    step = jax.jit(many.train_step(loss, tx, in_axes=None))
    active = np.array([True, False])
    trained_stack, _, losses = step(params, stacked, states, x, rates=np.ones(2, np.float32), active=active)
    assert np.isfinite(np.asarray(losses)).all()
    for got, expected in zip(*map(jax.tree.leaves, (many.unstack(trained_stack)["other"], other)), strict=True):
        np.testing.assert_array_equal(got, expected)

    which = np.array([0, 1, 1, 0], np.int32)
    rows = jax.jit(many.per_example(apply))(params, stacked, which, x)
    each = [lj.lora(apply)(params, (one, other)[at], x) for at in which]
    assert_near(rows, [row[at] for at, row in enumerate(each)], tolerance)

    combined = many.combine({"one": (one, 2.0), "other": (other, -0.5)}, "concat")
    deltas = [
        np.asarray(lj.merge(params, adapter)["stack"], np.float64) - np.asarray(params["stack"], np.float64)
        for adapter in (combined, one, other)
    ]
    assert_near(deltas[0], 2 * deltas[1] - 0.5 * deltas[2], tolerance)
    half = many.interpolate(one, 0.5)
    assert_near(lj.merge(params, half)["stack"], np.asarray(params["stack"], np.float64) + 0.5 * deltas[1], tolerance)

    routers = (many.Constant(), many.Gate(top_k=1), many.SigmoidGate(), many.Arrow(top_k=1))
    for router in routers:
        key = jax.random.key(3) if isinstance(router, (many.Gate, many.SigmoidGate)) else None
        mixed = many.mixture({"one": one, "other": other}, router, key=key)
        assert np.isfinite(np.asarray(jax.jit(lj.lora(apply))(params, mixed, x), np.float64)).all()
