"""LoRA+, LoRA-FA, Riemannian preconditioning and masks in float64, against closed forms and hand-written optimizers."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_few_ulp, trained
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import lora_jax as lj
from lora_jax import optim

KERNELS = {"io": (6, 5), "iiio": (2, 2, 3, 8), "bio": (3, 6, 5), "ibo": (6, 3, 5)}
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
each_layout = pytest.mark.parametrize("axes", ["io", "iiio", "ibo"])  # layouts that become matrices in different ways


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def random_array(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def random_case(axes: str, rank: int = 2) -> tuple[Any, Any]:
    """A kernel and an adapter like a trained one."""
    params = {"w": random_array(*KERNELS[axes])}
    spec = {"w": lj.LoRA(rank=rank, alpha=3 * rank, axes=axes)}
    return params, trained(jax.random.key(1), lj.init(jax.random.key(0), params, spec, param_dtype=jnp.float64))


def mixed() -> tuple[Any, Any, Any]:
    """Parameters with an embedding, a dense layer and a `Full` head; an adapter; and a gradient."""
    params = {
        "embedding": random_array(7, 4),
        "dense": {"kernel": random_array(4, 3), "bias": random_array(3)},
        "head": {"kernel": random_array(3, 2), "bias": random_array(2)},
    }
    spec = {"**/head/**": lj.Full(), "**/bias": lj.Full(), "**": lj.LoRA(rank=2, alpha=4)}
    adapter = trained(jax.random.key(1), lj.init(jax.random.key(0), params, spec, param_dtype=jnp.float64))
    return params, adapter, trained(jax.random.key(2), adapter)


def first_step(tx: Any, gradient: Any, adapter: Any) -> Any:
    """The updates of the first step of an optimizer, in one program."""
    return jax.jit(lambda gradient, adapter: tx.update(gradient, tx.init(adapter), adapter)[0])(gradient, adapter)


def arrays(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of an adapter by path and name."""
    return {f"{path}.{name}": np.asarray(array) for path, part in tree.items() for name, array in part.arrays.items()}


def matrices(part: Any) -> tuple[np.ndarray, np.ndarray]:
    """The factors of each layer: (batch, in, rank) and (batch, rank, out)."""
    batch, rank = part.a.shape[: part.axes.count("b")], part.a.shape[-1]
    return np.asarray(part.a).reshape(*batch, -1, rank), np.asarray(part.b).reshape(*batch, rank, -1)


def update_of(axes: str, adapter: Any) -> np.ndarray:
    """The materialized `s·a·b` of each layer."""
    a, b = matrices(adapter["w"])
    return adapter["w"].variant.scale * a @ b


# LoRA+


def adamw_by_hand(leaf: Any, gradient: Any, rates: list[float], decay: float) -> np.ndarray:
    """Steps of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) along one gradient, with the given rates."""
    leaf, m, v = np.asarray(leaf), 0.0, 0.0
    for step, rate in enumerate(rates, start=1):
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        leaf = leaf - rate * (m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8) + decay * leaf)
    return leaf


def test_lora_plus_is_adamw_with_another_rate_for_b() -> None:
    _, adapter, gradient = mixed()
    rates = [0.01, 0.02, 0.03]
    tx = optax.chain(optax.adamw(lambda step: 0.01 * (step + 1), weight_decay=0.1), optim.lora_plus(16))
    trained_, state = adapter, tx.init(adapter)
    for _ in rates:
        updates, state = jax.jit(tx.update)(gradient, state, trained_)
        trained_ = optax.apply_updates(trained_, updates)
    got, start, slope = arrays(trained_), arrays(adapter), arrays(gradient)
    faster = {"embedding.b", "dense/kernel.b"}  # no bias, no head, no `a`, unlike in PEFT
    assert faster < set(got) and "dense/bias.value" in got
    for name, array in got.items():
        leaf_rates = [16 * rate for rate in rates] if name in faster else rates
        np.testing.assert_allclose(
            array, adamw_by_hand(start[name], slope[name], leaf_rates, 0.1), **TOLERANCE, err_msg=name
        )


def test_lora_plus_has_no_state() -> None:
    _, adapter, _ = mixed()
    assert not jax.tree.leaves(optim.lora_plus(16).init(adapter))


def test_lora_plus_can_exclude_leaves() -> None:
    _, adapter, gradient = mixed()
    tx = optim.lora_plus(4, exclude="**/embedding")
    updates = first_step(tx, gradient, adapter)
    factors = {name: 4.0 if name == "dense/kernel.b" else 1.0 for name in arrays(gradient)}
    for name, array in arrays(updates).items():
        np.testing.assert_array_equal(array, factors[name] * arrays(gradient)[name])


# LoRA-FA


@each_layout
def test_a_lora_fa_step_is_the_nearest_to_full_fine_tuning(axes: str) -> None:
    params, adapter = random_case(axes)
    x = random_array(*KERNELS[axes], seed=5)

    def loss(w: Any) -> jax.Array:
        return jnp.sum(jnp.sin(w * x))

    merged = lj.merge(params, adapter)["w"]
    full = jax.jit(jax.grad(loss))(merged)
    gradient = jax.jit(jax.grad(lambda adapter: loss(lj.merge(params, adapter)["w"])))(adapter)
    tx = optim.lora_fa(optax.sgd(1.0), damping=0)
    updates = first_step(tx, gradient, adapter)
    new = optax.apply_updates(adapter, updates)
    order = [axis for role in "bio" for axis, letter in enumerate(axes) if letter == role]
    a, _ = matrices(adapter["w"])
    slope = np.asarray(full).transpose(order).reshape(*a.shape[:-1], -1)
    # The change with this `a` that is nearest to -slope: the projection onto the columns of `a`.
    nearest = -a @ np.linalg.pinv(a) @ slope
    np.testing.assert_allclose(update_of(axes, new) - update_of(axes, adapter), nearest, **TOLERANCE)


def test_lora_fa_preconditions_before_the_optimizer() -> None:
    _, adapter, gradient = mixed()
    tx = optim.lora_fa(optax.adamw(0.01, weight_decay=0.1), damping=0.5)
    updates = first_step(tx, gradient, adapter)
    got, start, slope = arrays(optax.apply_updates(adapter, updates)), arrays(adapter), arrays(gradient)
    for path in ("embedding", "dense/kernel"):
        a = start[f"{path}.a"]
        slope[f"{path}.b"] = np.linalg.solve(a.T @ a + 0.5 * np.eye(2), slope[f"{path}.b"]) / 2**2
    for name, array in got.items():
        expected = adamw_by_hand(start[name], slope[name], [0.01], 0.1)
        np.testing.assert_allclose(array, start[name] if name.endswith(".a") else expected, **TOLERANCE, err_msg=name)


def test_lora_fa_has_no_state_for_frozen_arrays() -> None:
    _, adapter, _ = mixed()
    trained_numbers = sum(array.size for name, array in arrays(adapter).items() if not name.endswith(".a"))
    state = optim.lora_fa(optax.adam(1e-3)).init(adapter)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * trained_numbers + 1


def test_clipping_uses_the_norm_of_trained_arrays() -> None:
    _, adapter, gradient = mixed()
    tx = optim.lora_fa(optax.chain(optax.clip_by_global_norm(1.0), optax.scale(-1.0)))
    updates = first_step(tx, jax.tree.map(lambda x: 100 * x, gradient), adapter)
    assert float(optax.tree.norm(updates)) == pytest.approx(1.0)


def test_a_lora_fa_step_computes_no_gradient_of_a() -> None:
    params = {f"layer{number}": random_array(32, 32, seed=number) for number in range(3)}
    adapter = lj.init(jax.random.key(0), params, {"*": lj.LoRA(rank=8, alpha=8)}, param_dtype=jnp.float64)

    def model(params: Any, x: jax.Array) -> jax.Array:
        for w in params.values():
            x = jnp.tanh(x @ w)
        return x

    def cost(tx: Any) -> float:
        def step(adapter: Any, state: Any, params: Any, x: jax.Array) -> Any:
            gradient = jax.grad(lambda adapter: jnp.sum(lj.lora(model, form="factored")(params, adapter, x)))(adapter)
            return tx.update(gradient, state, adapter)

        compiled = jax.jit(step).lower(adapter, tx.init(adapter), params, random_array(64, 32)).compile()
        return compiled.cost_analysis()["flops"]

    # Each gradient of an `a` takes 2·64·32·8 FLOPs, and so does the product before it.
    assert cost(optax.sgd(0.1)) - cost(optim.lora_fa(optax.sgd(0.1))) > 3 * 2 * 64 * 32 * 8 * 0.8


# Riemannian preconditioning


@each_layout
def test_each_gradient_is_divided_by_the_gram_matrix_of_the_other_factor(axes: str) -> None:
    _, adapter = random_case(axes)
    gradient = trained(jax.random.key(2), adapter)
    tx = optim.riemannian(damping=0.1)
    updates = first_step(tx, gradient, adapter)
    (a, b), (g_a, g_b) = matrices(adapter["w"]), matrices(gradient["w"])
    (got_a, got_b), damping = matrices(updates["w"]), 0.1 * np.eye(2)
    np.testing.assert_allclose(got_a, g_a @ np.linalg.inv(b @ np.swapaxes(b, -1, -2) + damping), **TOLERANCE)
    np.testing.assert_allclose(got_b, np.linalg.inv(np.swapaxes(a, -1, -2) @ a + damping) @ g_b, **TOLERANCE)
    assert jax.tree.structure(updates) == jax.tree.structure(gradient)


def test_a_direction_that_is_small_beside_another_is_not_dropped() -> None:
    rng, singular = np.random.default_rng(0), np.array([30.0] + [0.1] * 63)
    rows = np.linalg.qr(rng.normal(size=(128, 64)))[0].T
    part = lj.Adapter(
        lj.LoRA(rank=64, alpha=64),
        "io",
        a=jnp.asarray(rng.normal(size=(96, 64)), jnp.float32),
        b=jnp.asarray(singular[:, None] * rows, jnp.float32),
    )
    direct = rng.normal(size=(96, 128)) @ rows.T
    gradient = lj.Adapter(part.variant, "io", a=jnp.asarray(direct * singular, jnp.float32), b=part.b)
    updates = first_step(optim.riemannian(damping=1e-2), {"w": gradient}, {"w": part})
    expected = direct * singular / (singular**2 + 1e-2)
    assert np.linalg.norm(updates["w"].a - expected) < 0.01 * np.linalg.norm(expected)


def test_a_step_does_not_depend_on_the_factorization() -> None:
    params, adapter = random_case("io")
    part = adapter["w"]
    mix = jnp.array([[3.0, 1.0], [0.5, 0.2]])
    other = {"w": lj.Adapter(part.variant, "io", a=part.a @ mix, b=jnp.linalg.inv(mix) @ part.b)}

    def speed(adapter: Any, tx: Any) -> jax.Array:
        """The derivative of the merged kernel along the update."""
        gradient = jax.grad(lambda adapter: jnp.sum(jnp.sin(lj.merge(params, adapter)["w"])))(adapter)
        updates = first_step(tx, gradient, adapter)
        return jax.jvp(lambda adapter: lj.merge(params, adapter)["w"], (adapter,), (updates,))[1]

    tx = optim.riemannian(damping=1e-14)
    np.testing.assert_allclose(speed(adapter, tx), speed(other, tx), rtol=1e-6)
    assert abs(speed(adapter, optax.identity()) - speed(other, optax.identity())).max() > 0.1


def test_the_first_step_is_finite_though_b_is_zero() -> None:
    _, adapter = random_case("bio")
    start = {"w": lj.Adapter(adapter["w"].variant, "bio", a=adapter["w"].a, b=jnp.zeros_like(adapter["w"].b))}
    tx = optim.riemannian()
    updates = first_step(tx, adapter, start)
    np.testing.assert_allclose(updates["w"].a, adapter["w"].a / 1e-2, **TOLERANCE)
    assert np.isfinite(updates["w"].b).all()


def test_arrays_that_are_not_factors_are_unchanged() -> None:
    _, adapter, gradient = mixed()
    tx = optim.riemannian()
    updates, _ = tx.update(gradient, tx.init(adapter), adapter)
    for path in ("dense/bias", "head/kernel", "head/bias"):
        assert updates[path] is gradient[path]
    assert not np.allclose(updates["embedding"].a, gradient["embedding"].a)


# Both


PRECONDITIONED = {
    "lora_fa": lambda: optim.lora_fa(optax.adamw(0.01)),
    "riemannian": lambda: optax.chain(optim.riemannian(), optax.adamw(0.01), optim.lora_plus(4)),
}
each_preconditioned = pytest.mark.parametrize("name", PRECONDITIONED)


@each_preconditioned
def test_factors_in_half_precision_are_preconditioned_in_float32(name: str) -> None:
    _, adapter, gradient = mixed()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (adapter, gradient))
    tx = optim.lora_fa(optax.identity()) if name == "lora_fa" else optim.riemannian()
    updates = first_step(tx, half[1], half[0])
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    expected = first_step(tx, wide[1], wide[0])
    for one, other in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        assert one.dtype == jnp.bfloat16
        assert_few_ulp(one, other.astype(jnp.bfloat16), 1)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@each_preconditioned
def test_a_step_is_the_same_under_jit_and_on_sharded_arrays(name: str, kind: AxisType) -> None:
    _, adapter = random_case("bio")
    gradient = trained(jax.random.key(2), adapter)
    tx = PRECONDITIONED[name]()
    expected, _ = tx.update(gradient, tx.init(adapter), adapter)
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(3, 2), ("layers", "x"), axis_types=(kind, kind))
    part = adapter["w"]
    axes = {"a": PartitionSpec("layers", "x"), "b": PartitionSpec("layers")}
    places = {"w": lj.Adapter(part.variant, "bio", **{name: NamedSharding(mesh, spec) for name, spec in axes.items()})}
    sharded = jax.device_put((gradient, adapter), (places, places))
    for gradient_, adapter_ in ((gradient, adapter), sharded):
        updates, _ = jax.jit(tx.update)(gradient_, tx.init(adapter_), adapter_)
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-8), updates, expected)


@each_preconditioned
def test_optimizers_work_inside_freeze_base_and_multi_steps(name: str) -> None:
    params, adapter, gradient = mixed()
    expected = first_step(PRECONDITIONED[name](), gradient, adapter)
    tx = optim.freeze_base(optax.MultiSteps(PRECONDITIONED[name](), every_k_schedule=1).gradient_transformation())
    tree = {"base": params, "adapter": adapter}
    updates = first_step(tx, {"base": params, "adapter": gradient}, tree)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-8), updates["adapter"], expected)


@each_preconditioned
def test_a_missing_adapter_is_an_error(name: str) -> None:
    _, adapter, gradient = mixed()
    tx = PRECONDITIONED[name]()
    with pytest.raises(lj.AdapterError) as caught:
        tx.update(gradient, tx.init(adapter))
    assert str(caught.value) == "Expected `params`, the adapter; got None.\n  Call tx.update(gradient, state, adapter)."


def test_lora_fa_refuses_a_scale_of_zero() -> None:
    # Was an update of NaN.
    adapter = {"w": lj.Adapter(lj.LoRA(rank=1, alpha=0), "io", a=jnp.ones((4, 1)), b=jnp.zeros((1, 3)))}
    tx = optim.lora_fa(optax.sgd(1.0))
    with pytest.raises(lj.AdapterError, match=r"Expected a nonzero scale.* got LoRA\(rank=1, alpha=0\)"):
        tx.update(adapter, tx.init(adapter), adapter)


# Masks


def selected_names(mask: Any, adapter: Any) -> set[str]:
    return {
        f"{path}.{name}" for path, part in mask(adapter).items() for name, selected in part.arrays.items() if selected
    }


def test_masks_select_arrays_by_name_and_by_path() -> None:
    _, adapter, _ = mixed()
    everything = set(arrays(adapter))
    assert selected_names(optim.select(), adapter) == everything
    assert selected_names(optim.select("a", "b"), adapter) == {name for name in everything if name[-1] in "ab"}
    assert selected_names(optim.select("b", paths="dense/*"), adapter) == {"dense/kernel.b"}
    assert selected_names(optim.select(exclude="**/bias"), adapter) == {
        name for name in everything if "bias" not in name
    }
    wanted = optim.select("value", paths=["dense/*", "head/*"], exclude=["**/kernel"])
    assert selected_names(wanted, adapter) == {"dense/bias.value", "head/bias.value"}


def test_weight_decay_applies_to_masked_arrays() -> None:
    _, adapter, gradient = mixed()
    updates = []
    for mask in (None, optim.select("b")):
        tx = optax.adamw(0.01, weight_decay=0.1 if mask else 0.0, mask=mask)
        updates.append(arrays(first_step(tx, gradient, adapter)))
    for name, array in updates[1].items():
        decay = 0.01 * 0.1 * arrays(adapter)[name] if name.endswith(".b") else 0.0
        np.testing.assert_allclose(array, updates[0][name] - decay, **TOLERANCE)


def test_masks_can_be_nested() -> None:
    _, adapter, gradient = mixed()
    tx = optim.lora_fa(optax.adamw(0.01, weight_decay=0.1, mask=optim.select("a", "b")))
    updates = first_step(tx, gradient, adapter)
    assert jax.tree.structure(updates) == jax.tree.structure(adapter)


ERRORS = {
    "a name": (
        lambda: optim.select("magnitude"),
        "Expected names of the adapter's arrays, which are ['a', 'b', 'value']; got 'magnitude'.",
    ),
    "a pattern": (
        lambda: optim.select(exclude="**/biases"),
        "Expected every pattern to match a path of the adapter; '**/biases' matches none of 5.\n  The nearest paths:\n"
        "  dense/bias\n  head/bias\n",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_invalid_mask_is_an_error(name: str) -> None:
    mask, text = ERRORS[name]
    with pytest.raises(lj.AdapterError) as caught:
        mask()(mixed()[1])
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(("tree", "got"), [({"w": jnp.ones(2)}, "an array at 'w'"), (jnp.ones(2), "an array")])
def test_a_value_that_is_not_an_adapter_is_an_error(tree: Any, got: str) -> None:
    text = (
        f"Expected an adapter: a dict from paths to `Adapter`, as `init` returns; got {got}.\n"
        "  Pass only the adapter to the optimizer. If one tree holds both, wrap the optimizer: freeze_base(tx)."
    )
    for use in (lambda: optim.select("a")(tree), lambda: optim.riemannian().update(tree, optax.EmptyState(), tree)):
        with pytest.raises(lj.AdapterError) as caught:
            use()
        assert str(caught.value) == text
