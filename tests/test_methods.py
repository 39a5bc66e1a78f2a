"""LoRA-XS, DeLoRA, IA³, MiSS, QA-LoRA and `Layers`: their equations, what they train, and what they refuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluate import without_compiling
from helpers import bits, sweep, sweep_except
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from law import assert_close, assert_law, normal
from test_variants import ALL, METHODS, random_adapter
from uses import USES

import lora_jax as lj
from lora_jax import many, optim

W = normal(6, 4)
Arrays = dict[str, np.ndarray[Any, Any]]


def linear(params: Any, x: Any) -> Any:
    return x @ params["w"]


# Equations


def lora_xs(w: Any, x: Arrays) -> Any:
    return w + 3 / 2 * x["frozen_a"] @ x["r"] @ x["frozen_b"]


def delora(w: Any, x: Arrays) -> Any:
    unit_a = x["a"] / np.linalg.norm(x["a"], axis=0)
    unit_b = x["b"] / np.linalg.norm(x["b"], axis=1, keepdims=True)
    return w + x["bound"] / 2 * np.linalg.norm(w, axis=1)[:, None] * (unit_a @ unit_b)


EQUATIONS: dict[str, Callable[[Any, Arrays], Any]] = {
    "LoRA-XS": lora_xs,
    "DeLoRA": delora,
    "IA3": lambda w, x: w * (1 + x["gain"]),
    "IA3 of the inputs": lambda w, x: w * (1 + x["gain"])[:, None],
    "MiSS": lambda w, x: w + x["b"][np.arange(6) % 2],
    "QA-LoRA": lambda w, x: w + 3 / 2 * x["a"][np.arange(6) // 2] @ x["b"],
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_merged_kernel_is_that_of_the_equation(name: str) -> None:
    adapter = random_adapter({"w": W}, METHODS[name](axes="io"))
    arrays = {key: np.asarray(array) for key, array in adapter["w"].arrays.items()}
    merged = without_compiling(lj.merge)({"w": W}, adapter)
    np.testing.assert_allclose(merged["w"], EQUATIONS[name](np.asarray(W), arrays), rtol=1e-5, atol=1e-6)


# LoRA-XS


def test_the_frozen_factors_of_lora_xs_are_the_truncated_decomposition_of_the_kernel() -> None:
    part = lj.init(jax.random.key(0), {"w": W}, {"w": lj.LoRAXS(rank=2, alpha=4)})["w"]
    u, s, vt = np.linalg.svd(W, full_matrices=False)
    np.testing.assert_allclose(part.frozen_a @ part.frozen_b, u[:, :2] * s[:2] @ vt[:2], atol=1e-5)
    np.testing.assert_allclose(part.frozen_b @ part.frozen_b.T, np.eye(2), atol=1e-5)
    assert not part.r.any()


def test_only_the_matrix_between_them_is_trained_and_counted() -> None:
    adapter = lj.init(jax.random.key(0), {"w": W}, {"w": lj.LoRAXS(rank=2, alpha=4)})
    x = normal(3, 6, seed=1)
    (row,) = lj.explain(linear, {"w": W}, adapter, x).rows
    assert (row.variant, row.rank, row.scale, row.parameters) == ("LoRAXS", 2, 2.0, 4)
    tx = optax.masked(optax.adamw(0.1, weight_decay=0.1), optim.select("r"))
    state = tx.init(adapter)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * 4 + 1
    gradient = jax.grad(lambda ad: jnp.sum(lj.lora(linear)({"w": W}, ad, x)))(adapter)
    updates, _ = tx.update(gradient, state, adapter)
    changed = {name for name, update in updates["w"].arrays.items() if update.any()}
    assert changed == {"r"}


# DeLoRA


def test_a_fresh_delora_has_a_finite_gradient_and_a_trained_one_depends_on_directions_only() -> None:
    x = normal(3, 6, seed=1)
    fresh = lj.init(jax.random.key(0), {"w": W}, {"w": lj.DeLoRA(rank=2)})
    loss = lambda adapter: jnp.sum(lj.lora(linear)({"w": W}, adapter, x) ** 2)  # noqa: E731
    gradient = without_compiling(jax.grad(loss))(fresh)["w"]
    assert np.isfinite(gradient.a).all() and np.abs(gradient.b).min() > 0
    part = random_adapter({"w": W}, lj.DeLoRA(rank=2, axes="io"))["w"]
    longer = lj.Adapter(part.variant, "io", a=3 * part.a, b=7 * part.b, bound=part.bound)
    merge = without_compiling(lj.merge)
    assert_close(merge({"w": W}, {"w": longer}), merge({"w": W}, {"w": part}))


def test_delora_cannot_be_subtracted_without_the_base() -> None:
    adapter = random_adapter({"w": W}, lj.DeLoRA(rank=2, axes="io"))
    with pytest.raises(lj.MergeError, match=r"DeLoRA\(rank=2\) replaces or scales the leaf"):
        lj.unmerge_approximately({"w": W}, adapter)


# IA³


@pytest.mark.parametrize(("inputs", "parameters", "flops"), [(False, 4, 3 * 4), (True, 6, 3 * 4)])
def test_ia3_is_one_product_and_nothing_else(inputs: bool, parameters: int, flops: int) -> None:
    adapter = random_adapter({"w": W}, lj.IA3(inputs=inputs, axes="io"))
    (row,) = lj.explain(linear, {"w": W}, adapter, normal(3, 6)).rows
    assert (row.parameters, row.rank, row.scale) == (parameters, None, None)
    assert row.flops == flops + parameters  # the product, and 1 + gain


def test_a_gain_of_the_inputs_is_refused_where_it_is_no_gain_of_the_activation() -> None:
    case = USES["a convolution"]
    adapter = random_adapter(case.params, lj.IA3(inputs=True, axes=case.roles))
    with pytest.raises(lj.UnsupportedError, match="a product that contracts only some of the axes with a gain"):
        lj.lora(case.apply)(case.params, adapter, *case.arrays)
    case = USES["experts by group"]
    adapter = random_adapter(case.params, lj.IA3(inputs=True, axes=case.roles))
    with pytest.raises(lj.UnsupportedError, match="a product that contracts axes with a gain"):
        lj.lora(case.apply)(case.params, adapter, *case.arrays)


def test_concatenated_gains_of_the_inputs_and_of_the_outputs() -> None:
    params = {"w": W, "other": normal(2, 4, seed=1)}
    apply = lambda params, x: x @ jnp.concatenate([params["w"], params["other"]])  # noqa: E731
    gains = lambda *inputs: {  # noqa: E731
        path: random_adapter({"w": params[path]}, lj.IA3(inputs=one, axes="io"))["w"]
        for path, one in zip(params, inputs, strict=True)
    }
    assert_law(apply, params, gains(True, True), normal(3, 8, seed=2))
    assert_law(apply, params, {"other": gains(True, True)["other"]}, normal(3, 8, seed=2))
    for inputs, reason in (
        ((True, False), "of which one has a gain of the inputs and one of the outputs"),
        ((False, False), "along an axis that the gain of one of the kernels does not have"),
    ):
        with pytest.raises(lj.UnsupportedError, match=reason):
            lj.lora(apply)(params, gains(*inputs), normal(3, 8, seed=2))


# Shapes


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        (lj.LoRAXS(rank=5, alpha=1), "rank=5 is too large; with axes 'io' it can be at most 4"),
        (lj.DeLoRA(rank=5), "rank=5 is too large; with axes 'io' it can be at most 4"),
        (lj.MiSS(rank=7), "rank=7 is too large; with axes 'io' it can be at most 6"),
        (lj.MiSS(rank=1, axes="oo"), "MiSS needs input and output axes; the kernel's are 'oo'"),
        (lj.IA3(axes="ii"), "IA3 needs input and output axes; the kernel's are 'ii'"),
        (
            lj.QALoRA(rank=1, alpha=1, group=4),
            "expected its last input axis to be a multiple of group=4; it is 6",
        ),
        (
            lj.Layers(variant=lj.LoRA(rank=1, alpha=1), layers=[0]),
            "Layers needs a batch axis, the axis of the layers; the axes are 'io'",
        ),
        (
            lj.Layers(variant=lj.Full(), layers=[6]),
            "expected layers of a leaf of shape (6, 4), axis 0; got Layers(variant=Full(), layers=(6,))",
        ),
        (
            lj.Layers(variant=lj.LoRA(rank=5, alpha=1, axes="bo"), layers=[1]),
            "LoRA needs input and output axes; the kernel's are 'bo'",
        ),
    ],
    ids=str,
)
def test_a_kernel_that_a_method_does_not_fit_is_an_error(variant: Any, reason: str) -> None:
    with pytest.raises(lj.SpecError, match=re.escape(f"Cannot adapt 'w' of shape (6, 4), by the rule 'w': {reason}")):
        lj.init(jax.random.key(0), {"w": W}, {"w": variant})


def test_lora_xs_needs_the_values_of_the_kernel() -> None:
    with pytest.raises(lj.SpecError, match="LoRAXS is initialized from the values of the kernel, and got a shape"):
        lj.init(jax.random.key(0), {"w": jax.ShapeDtypeStruct((6, 4), jnp.float32)}, {"w": ALL["LoRA-XS"]()})


def test_miss_accepts_a_rank_that_does_not_divide_the_inputs_and_more_ranks_than_outputs() -> None:
    part = random_adapter({"w": W}, lj.MiSS(rank=5, axes="io"))
    assert_close(without_compiling(lj.merge)({"w": W}, part)["w"], W + part["w"].b[np.array([0, 1, 2, 3, 4, 0])])


# Stacks of adapters


def test_adapters_of_each_method_are_stacked_and_the_base_is_one_of_them() -> None:
    params = {name: W + 0 for name in METHODS}
    spec = {name: METHODS[name](axes="io") for name in METHODS}
    other = {path: random_adapter({"w": W}, spec[path])["w"] for path in params}
    stacked = many.stack({"other": other, "none": {}})
    assert bits(many.unstack(stacked)["other"]) == bits(other)

    def merged(params: Any, stacked: Any, other: Any) -> Any:
        members = [lj.merge(params, many.select(stacked, name)) for name in ("other", "none")]
        return *members, lj.merge(params, other)

    got, none, expected = without_compiling(merged)(params, stacked, other)
    assert_close(got, expected)
    assert bits(none) == bits(params)


def test_updates_that_add_to_the_kernel_are_interpolated_and_others_are_not() -> None:
    spec = {name: METHODS[name](axes="io") for name in METHODS}
    parts = {name: random_adapter({"w": W}, spec[name])["w"] for name in METHODS}
    adding = {name: part for name, part in parts.items() if part.variant.adds}
    params = {name: W + 0 for name in adding}

    def changes(adapter: Any) -> Any:
        half, whole = (lj.merge(params, one) for one in (many.interpolate(adapter, 0.5), adapter))
        return [(2 * (half[name] - W), whole[name] - W) for name in params]

    for half, whole in without_compiling(changes)(adding):
        assert_close(half, whole)
    assert [*adding] == ["LoRA-XS", "MiSS", "QA-LoRA"]
    with pytest.raises(lj.AdapterError, match="got 3 that cannot"):
        many.interpolate(parts, 0.5)


# Sharding


@pytest.mark.sweep
@pytest.mark.parametrize("name", METHODS)
def test_the_function_is_the_same_inside_a_shard_map(name: str) -> None:
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Explicit,))
    gather = lambda w: lax.all_gather(w, "model", axis=0, tiled=True)  # noqa: E731
    cases = [  # the body, and the shardings of the kernel, of the activation and of the result
        (lambda w, x: lax.psum(x @ w, "model"), P("model"), P(None, "model"), P()),
        (lambda w, x: x @ w, P(None, "model"), P(), P(None, "model")),
        (lambda w, x: x @ gather(w), P("model"), P("model"), P("model")),
    ]
    params, x = {"w": normal(8, 8)}, normal(4, 8, seed=1)
    adapter = random_adapter(params, METHODS[name](axes="io"))
    expected = linear(lj.merge(params, adapter), x)
    for body, of_w, of_x, of_y in cases:
        mapped = jax.shard_map(body, mesh=mesh, in_specs=(of_w, of_x), out_specs=of_y)
        with jax.set_mesh(mesh):
            base = NamedSharding(mesh, of_w)
            placed = jax.device_put((params, adapter), (base, lj.sharding.like_base(adapter, base)))
            run = jax.jit(lj.lora(lambda params, x, mapped=mapped: mapped(params["w"], x)))
            got = run(*placed, jax.device_put(x, NamedSharding(mesh, of_x)))
        assert_close(jax.device_get(got), jax.device_get(expected))


# Layers

STACK = {"w": normal(4, 6, 6, size=0.4)}
LAYERS = ALL | {"Full": lambda axes: lj.Full(), "LoRABias": lambda axes: lj.LoRABias(scale=2)}


@pytest.mark.parametrize("name", sweep_except({"DoRA", "IA3"}, LAYERS))
def test_some_layers_of_a_stack_are_adapted_and_the_others_are_those_of_the_base(name: str, tmp_path: Path) -> None:
    case = USES["a stack of layers"]
    adapter = random_adapter(STACK, lj.Layers(variant=LAYERS[name](axes="bio"), layers=[3, 1]))
    x = normal(5, 6, seed=1)
    assert_law(case.apply, STACK, adapter, x)
    assert {len(array) for array in adapter["w"].arrays.values()} == {2}
    merged = without_compiling(lj.merge)(STACK, adapter)["w"]
    np.testing.assert_array_equal(merged[::2], STACK["w"][::2])
    # The adapted layers are those of a stack of these layers.
    part = adapter["w"]
    inner = {"w": lj.Adapter(part.variant.variant, part.axes, **part.arrays)}
    np.testing.assert_array_equal(merged[1::2], without_compiling(lj.merge)({"w": STACK["w"][1::2]}, inner)["w"])
    lj.save(tmp_path / "adapter", adapter, base=STACK)
    restored = lj.restore(tmp_path / "adapter", base=STACK)
    assert (restored["w"].variant, bits(restored)) == (part.variant, bits(adapter))


def test_explain_shows_the_layers_and_counts_their_parameters() -> None:
    variant = lj.Layers(variant=lj.LoRA(rank=2, alpha=3, axes="bio"), layers=[0, 2, 3])
    adapter = random_adapter(STACK, variant)
    (row,) = lj.explain(USES["a stack of layers"].apply, STACK, adapter, normal(5, 6), strict=True).rows
    assert (row.variant, row.rank, row.scale) == ("LoRA, layers 0,2-3", 2, 1.5)
    assert row.parameters == 3 * 2 * (6 + 6)


def test_the_axis_of_the_layers_is_the_first_batch_axis() -> None:
    params = {"w": normal(4, 3, 2, 5), "bias": normal(3, 5)}
    apply = lambda params, x: jnp.einsum("ilef,tli->tlef", params["w"], x)  # noqa: E731
    variant = lj.Layers(variant=lj.DoRA(rank=2, alpha=3, clip_rank=True), layers=[2], axes="iboo")
    spec = {"w": variant, "bias": lj.Layers(variant=lj.Full(), layers=np.array([1]))}
    adapter = lj.init(jax.random.key(0), params, spec)
    assert adapter["w"].a.shape == (1, 4, 2) and adapter["w"].magnitude.shape == (1, 2, 5)
    assert adapter["w"].variant == lj.Layers(variant=lj.DoRA(rank=2, alpha=3), layers=[2])
    np.testing.assert_array_equal(adapter["bias"].value, params["bias"][1:2])
    adapter["w"].arrays["b"] += 0.3
    assert_law(apply, params, adapter, normal(2, 3, 4, seed=1))


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["DoRA", *METHODS])
def test_all_and_some_layers_of_a_quantized_stack(name: str) -> None:
    base = lj.quant.quantize({"w": normal(3, 64, 64, size=0.1)}, {"w": lj.quant.NF4(axes="bio")})
    variant, x = ALL[name](axes="bio"), normal(4, 64, seed=1)
    adapters = [random_adapter(base, one) for one in (variant, lj.Layers(variant=variant, layers=[2]))]
    run = USES["a stack of layers"].apply
    got = jax.jit(lambda base: [lj.lora(run)(base, adapter, x) for adapter in adapters])(base)
    dense = lj.quant.dequantize(base)
    expected = jax.jit(lambda dense: [run(lj.merge(dense, adapter), x) for adapter in adapters])(dense)
    assert_close(got, expected)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["LoRA", "DoRA", "DeLoRA", "IA3 of the inputs", "Full"])
def test_layers_that_are_sharded_over_explicit_devices(name: str) -> None:
    case = USES["experts"]
    params = {"w": normal(4, 4, 4)}
    adapter = random_adapter(params, lj.Layers(variant=LAYERS[name](axes="bio"), layers=[1, 2]))
    x = normal(4, 3, 4, seed=1)
    expected = case.apply(lj.merge(params, adapter), x)
    mesh = jax.make_mesh((2, 2), ("layers", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        base = NamedSharding(mesh, P("layers", None, "model"))
        placed, sharded = jax.device_put(params, base), jax.device_put(adapter, lj.sharding.like_base(adapter, base))
        got = jax.jit(lj.lora(case.apply))(placed, sharded, jax.device_put(x, NamedSharding(mesh, P("layers"))))
    assert_close(jax.device_get(got), jax.device_get(expected))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layers": [1, 1]}, "Expected no duplicates in `layers`; got layers=(1, 1)."),
        ({"layers": []}, "Expected at least one integer for `layers`; got []."),
        (
            {"layers": [1], "variant": lj.Layers(layers=[0], variant=lj.Full())},
            "Expected a variant such as LoRA(rank=8, alpha=16) for `variant`; got Layers(variant=Full(), layers=(0,)).",
        ),
    ],
)
def test_invalid_layers_are_errors(options: Any, reason: str) -> None:
    with pytest.raises(lj.SpecError, match=re.escape(reason)):
        lj.Layers(**{"variant": lj.Full()} | options)


def test_layers_are_not_stacked() -> None:
    adapter = random_adapter(STACK, lj.Layers(variant=ALL["LoRA"](axes="bio"), layers=[1]))
    with pytest.raises(lj.AdapterError, match=r"Layers\(variant=LoRA.*cannot be stacked"):
        many.stack({"one": adapter})


def test_layers_of_a_variant_that_is_not_of_the_library_are_not_saved(tmp_path: Path) -> None:
    class Own(lj.LoRA):
        pass

    adapter = random_adapter(STACK, lj.Layers(variant=Own(rank=1, alpha=1, axes="bio"), layers=[1]))
    with pytest.raises(lj.CheckpointError, match="Expected one of the variants ALoRA, AdaLoRA"):
        lj.save(tmp_path, adapter, base=STACK)


# QA-LoRA on a quantized base


@pytest.mark.parametrize(
    ("shape", "format_"),
    [
        ((8, 4), lj.quant.Int8(axes="io")),
        sweep((8, 4), lj.quant.Float8(axes="io")),
        sweep((2, 8, 4), lj.quant.Int8(axes="bio")),
    ],
    ids=str,
)
def test_the_groups_of_qa_lora_are_merged_into_zero_points(shape: tuple[int, ...], format_: Any) -> None:
    w = normal(*shape).at[..., 0].set(0)  # a scale of 0
    base = lj.quant.quantize({"w": w}, {"w": format_})
    adapter = random_adapter(base, lj.QALoRA(rank=2, alpha=3, group=4, axes=format_.axes))
    merged = lj.merge(base, adapter)
    assert bits(merged["w"].codes) == bits(base["w"].codes)
    assert merged["w"].zero_point.shape == (*shape[:-2], 2, 4)
    expected = lj.merge(lj.quant.dequantize(base), adapter)
    assert_close(lj.quant.dequantize(merged), expected)
    twice = lj.merge(merged, adapter)  # into zero points that are there already
    assert_close(lj.quant.dequantize(twice), lj.merge(expected, adapter))


def test_groups_across_scales_and_formats_without_zero_points_are_not_merged() -> None:
    adapter = random_adapter({"w": normal(64, 4)}, lj.QALoRA(rank=2, alpha=3, group=32, axes="io"))
    tiles = lj.quant.from_qwix(
        {"w": {"qvalue": jnp.ones((64, 4), jnp.int8), "scale": jnp.ones((4, 4)), "zero_point": None}}
    )
    for base in (tiles, lj.quant.quantize({"w": normal(64, 4)}, {"w": lj.quant.NF4()})):
        with pytest.raises(lj.MergeError, match="Expected the adapted leaves of `params` to be arrays; 1 of 1 are"):
            lj.merge(base, adapter)
