"""Initialization: distribution, dtype, keys, transformations and containers."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from helpers import assert_few_ulp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lora_jax as lj

LORA = lj.LoRA(rank=2, alpha=4)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def models() -> dict[str, Any]:
    return {"a": {"kernel": jnp.ones((8, 6))}, "b": {"kernel": jnp.ones((8, 6)), "bias": jnp.arange(6.0)}}


# The distribution

KERNELS = [
    # axes, shape of the kernel, shape of a, shape of b, fan-in
    ("io", (400, 6), (400, 4), (4, 6), 400),
    ("oi", (6, 400), (400, 4), (4, 6), 400),
    ("ioo", (400, 4, 3), (400, 4), (4, 4, 3), 400),
    ("iio", (4, 100, 6), (4, 100, 4), (4, 6), 400),
    ("bio", (4, 400, 6), (4, 400, 4), (4, 4, 6), 400),
    ("biio", (4, 4, 100, 6), (4, 4, 100, 4), (4, 4, 6), 400),
    ("ibo", (400, 4, 6), (4, 400, 4), (4, 4, 6), 400),
    ("bbio", (3, 2, 400, 6), (3, 2, 400, 4), (3, 2, 4, 6), 400),
    ("iiio", (5, 5, 16, 6), (5, 5, 16, 4), (4, 6), 400),
]


@pytest.mark.parametrize(("axes", "shape", "a", "b", "fan_in"), KERNELS, ids=[row[0] for row in KERNELS])
def test_a_is_uniform_by_the_fan_in_of_the_input_axes_and_b_is_zero(
    axes: str, shape: Any, a: Any, b: Any, fan_in: int, key: jax.Array
) -> None:
    variant = lj.LoRA(rank=4, alpha=8, axes=axes)
    part = lj.init(key, {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}, {"kernel": variant})["kernel"]
    assert (part.a.shape, part.b.shape) == (a, b)
    assert not np.asarray(part.b).any()
    values = np.asarray(part.a, np.float64)
    bound = 1 / math.sqrt(fan_in)
    assert np.abs(values).max() <= bound * (1 + 1e-6)
    assert np.abs(values).max() > 0.99 * bound
    # Six standard errors: √(4/5n)·σ² for the variance σ² of a uniform distribution, σ/√n for the mean.
    sigma = 1 / math.sqrt(3 * fan_in)
    assert abs(values.std() / sigma - 1) < 6 * math.sqrt(0.2 / values.size)
    assert abs(values.mean()) < 6 * sigma / math.sqrt(values.size)


def test_every_low_rank_variant_has_the_same_initialization(key: jax.Array) -> None:
    one, other = (lj.init(key, models(), {"**/kernel": variant(rank=2, alpha=4)}) for variant in (lj.LoRA, lj.RSLoRA))
    assert bits(one) == bits(other)


def test_the_layers_of_a_stack_are_initialized_differently(key: jax.Array) -> None:
    part = lj.init(key, {"k": jnp.ones((12, 8, 6))}, {"k": lj.LoRA(rank=2, alpha=4, axes="bio")})["k"]
    assert len({layer.tobytes() for layer in np.asarray(part.a)}) == 12


@pytest.mark.parametrize("base", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("variant", [LORA, lj.RSLoRA(rank=2, alpha=4), lj.Full()], ids=str)
def test_arrays_are_float32_over_any_base(base: Any, variant: lj.LoRA, key: jax.Array) -> None:
    adapter = lj.init(key, {"k": jnp.ones((8, 6), base)}, {"k": variant})
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float16, np.float32, "bfloat16"])
def test_param_dtype_is_that_of_every_array(param_dtype: Any, key: jax.Array) -> None:
    spec = {"a/kernel": LORA, "b/*": lj.Full()}
    adapter = lj.init(key, models(), spec, param_dtype=param_dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype(param_dtype)}


def test_a_narrow_dtype_keeps_the_bounds_up_to_rounding(key: jax.Array) -> None:
    adapter = lj.init(key, {"k": jnp.ones((700, 16))}, {"k": lj.LoRA(rank=16, alpha=4)}, param_dtype=jnp.bfloat16)
    assert float(jnp.max(jnp.abs(adapter["k"].a))) <= float(jnp.bfloat16(700**-0.5))


@pytest.mark.parametrize("base", [jnp.float32, jnp.bfloat16])
def test_initialization_does_not_depend_on_the_base(base: Any, key: jax.Array) -> None:
    one, other = (lj.init(key, {"k": jnp.full((8, 6), value, base)}, {"k": LORA}) for value in (0, 7))
    assert bits(one) == bits(other)


# Keys


def test_another_layer_does_not_change_the_initialization(key: jax.Array) -> None:
    few, many = models(), models() | {"0": {"kernel": jnp.ones((8, 6))}, "c": [{"kernel": jnp.ones((8, 6))}]}
    spec = {"**/kernel": LORA}
    before, after = lj.init(key, few, spec), lj.init(key, many, spec)
    assert len(after) == len(before) + 2
    assert bits({path: after[path] for path in before}) == bits(before)


def test_initialization_does_not_depend_on_the_rule(key: jax.Array) -> None:
    one = lj.init(key, models(), {"**/kernel": LORA})
    other = lj.init(key, models(), {"b/kernel": LORA, "a/*": lj.LoRA(rank=2, alpha=4, axes="io"), "b/bias": lj.Full()})
    assert bits(one) == bits({path: other[path] for path in one})


def test_every_path_is_initialized_differently(key: jax.Array) -> None:
    params = {f"layer_{layer}": {name: jnp.ones((8, 6)) for name in ("query", "key", "value")} for layer in range(8)}
    adapter = lj.init(key, params, {"**": LORA})
    assert len({np.asarray(part.a).tobytes() for part in adapter.values()}) == 24


def test_another_key_gives_another_initialization() -> None:
    one, other = (lj.init(jax.random.key(seed), models(), {"**/kernel": LORA}) for seed in (0, 1))
    assert bits(one["a/kernel"].a) != bits(other["a/kernel"].a)


def test_a_typed_and_a_raw_key_give_the_same_initialization() -> None:
    typed, raw = (lj.init(make(7), models(), {"**/kernel": LORA}) for make in (jax.random.key, jax.random.PRNGKey))
    assert bits(typed) == bits(raw)


def test_other_key_implementations_work() -> None:
    adapter = lj.init(jax.random.key(0, impl="rbg"), models(), {"**/kernel": LORA})
    assert np.asarray(adapter["a/kernel"].a).any()


def test_initialization_does_not_depend_on_the_container(key: jax.Array) -> None:
    kernel = jnp.ones((8, 6))
    trees = [
        {"dense": {"kernel": kernel}},
        FrozenDict({"dense": {"kernel": kernel}}),
        {"dense": {"kernel": nn.Partitioned(kernel, (None, "x"))}},
        {"dense": {"kernel": np.asarray(kernel)}},
        nnx.State({"dense": {"kernel": nnx.Param(kernel)}}),
        {"dense": {"kernel": jax.ShapeDtypeStruct((8, 6), jnp.float32)}},
    ]
    adapters = [lj.init(key, tree, {"**/kernel": LORA}) for tree in trees]
    assert all(bits(adapter) == bits(adapters[0]) for adapter in adapters)
    assert all(type(adapter) is dict for adapter in adapters)


# Transformations and shapes

SPEC = {"b/bias": lj.Full(), "**/kernel": LORA}


def test_init_under_jit_matches_init_outside(key: jax.Array) -> None:
    outside = lj.init(key, models(), SPEC)
    inside = jax.jit(lambda key, params: lj.init(key, params, SPEC))(key, models())
    assert jax.tree.structure(inside) == jax.tree.structure(outside)
    assert_few_ulp(inside, outside, 2)


def test_init_under_eval_shape_gives_its_shapes(key: jax.Array) -> None:
    shapes = jax.eval_shape(lambda key, params: lj.init(key, params, SPEC), key, models())
    expected = jax.eval_shape(lambda: lj.init(key, models(), SPEC))
    assert jax.tree.structure(shapes) == jax.tree.structure(expected)
    assert jax.tree.leaves(shapes) == jax.tree.leaves(expected)
    assert shapes["a/kernel"].a == jax.ShapeDtypeStruct((8, 2), jnp.float32)
    assert (shapes["a/kernel"].variant, shapes["a/kernel"].axes) == (LORA, "io")


def test_low_rank_initialization_needs_shapes_only(key: jax.Array) -> None:
    shapes = jax.eval_shape(models)
    assert bits(lj.init(key, shapes, {"**/kernel": LORA})) == bits(lj.init(key, models(), {"**/kernel": LORA}))


def test_init_under_vmap_makes_a_population() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = jax.vmap(lambda key: lj.init(key, models(), {"**/kernel": LORA}))(keys)
    single = lj.init(keys[1], models(), {"**/kernel": LORA})
    assert stacked["a/kernel"].a.shape == (3, 8, 2)
    assert_few_ulp(stacked["a/kernel"].a[1], single["a/kernel"].a, 2)


def test_full_of_a_shape_is_an_error_with_advice(key: jax.Array) -> None:
    with pytest.raises(lj.SpecError) as caught:
        lj.init(key, jax.eval_shape(models), {"b/bias": lj.Full()})
    assert str(caught.value) == (
        "Cannot adapt 'b/bias' of shape (6,), by the rule 'b/bias': Full() is initialized from the values of the "
        "leaf, and got a shape only; pass the parameters, or call `init` under `jax.eval_shape`."
    )


def test_full_of_a_shape_under_eval_shape_works(key: jax.Array) -> None:
    shapes = jax.eval_shape(lambda params: lj.init(key, params, SPEC), jax.eval_shape(models))
    assert shapes["b/bias"].value == jax.ShapeDtypeStruct((6,), jnp.float32)


# Axes


def attention(params: Any, x: jax.Array) -> jax.Array:
    query = jnp.einsum("td,dhk->thk", x, params["query"])
    mixed = jnp.einsum("thk,hkd->td", query, params["out"])
    return jnp.einsum("td,edf->etf", mixed, params["experts"]) @ params["head"]


SHAPES = {"query": (8, 2, 4), "out": (2, 4, 8), "experts": (3, 8, 6), "head": (6, 5)}


def roles(**axes: str) -> dict[str, str]:
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    kernels = lj.kernels(attention, params, jnp.ones((7, 8)))
    spec = {name: lj.LoRA(rank=2, alpha=4, axes=axes.get(name)) for name in SHAPES}
    return {path: part.axes for path, part in lj.init(jax.random.key(0), params, spec, kernels=kernels).items()}


def test_traced_axes_are_used() -> None:
    assert roles() == {"experts": "oio", "head": "io", "out": "iio", "query": "ioo"}


def test_axes_in_the_spec_override_traced_axes() -> None:
    assert roles(experts="bio", head="oi")["experts"] == "bio"
    assert roles(experts="bio", head="oi")["head"] == "oi"


def test_the_fan_in_of_experts_is_the_fan_in_of_one_expert(key: jax.Array) -> None:
    params = {"experts": jnp.ones((64, 100, 50))}
    part = lj.init(key, params, {"experts": lj.LoRA(rank=8, alpha=8, axes="bio")})["experts"]
    assert 0.099 < float(jnp.max(jnp.abs(part.a))) <= 0.1


def test_an_adapter_does_not_record_the_source_of_its_axes(key: jax.Array) -> None:
    params = {"k": jnp.ones((8, 6))}
    stated = lj.init(key, params, {"k": lj.LoRA(rank=2, alpha=4, axes="io")})
    guessed = lj.init(key, params, {"k": LORA})
    assert jax.tree.structure(stated) == jax.tree.structure(guessed)


# The base


def test_init_does_not_change_the_parameters(key: jax.Array) -> None:
    params = models()
    leaves, before = jax.tree.leaves(params), bits(params)
    lj.init(key, params, SPEC)
    assert all(one is other for one, other in zip(jax.tree.leaves(params), leaves, strict=True))
    assert bits(params) == before


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("base", [jnp.float32, jnp.bfloat16])
def test_full_is_initialized_with_the_leaf(base: Any, param_dtype: Any, key: jax.Array) -> None:
    params = {"bias": jnp.linspace(-1, 1, 6, dtype=base)}
    value = lj.init(key, params, {"bias": lj.Full()}, param_dtype=param_dtype)["bias"].value
    assert value.dtype == param_dtype
    np.testing.assert_array_equal(value, params["bias"].astype(param_dtype))


def test_donating_an_adapter_does_not_delete_the_base(key: jax.Array) -> None:
    params = {"bias": jnp.arange(6.0), "kernel": jnp.ones((8, 6))}
    adapter = lj.init(key, params, {"bias": lj.Full(), "kernel": LORA})
    jax.jit(lambda adapter: jax.tree.map(lambda leaf: leaf + 1, adapter), donate_argnums=0)(adapter)
    assert adapter["bias"].value.is_deleted()
    np.testing.assert_array_equal(params["bias"], np.arange(6.0))


def test_donating_an_adapter_made_under_jit_does_not_delete_the_base(key: jax.Array) -> None:
    params = {"bias": jnp.arange(6.0)}
    adapter = jax.jit(lambda key, params: lj.init(key, params, {"bias": lj.Full()}))(key, params)
    jax.jit(lambda adapter: jax.tree.map(lambda leaf: leaf + 1, adapter), donate_argnums=0)(adapter)
    np.testing.assert_array_equal(params["bias"], np.arange(6.0))


def test_changing_a_numpy_base_does_not_change_the_full_copy(key: jax.Array) -> None:
    params = {"bias": np.zeros(4096, np.float32)}  # large enough for JAX to alias the memory
    value = lj.init(key, params, {"bias": lj.Full()})["bias"].value
    params["bias"][:] = 1
    assert not np.asarray(value).any()


def test_a_full_copy_has_the_sharding_of_the_leaf(key: jax.Array) -> None:
    sharding = NamedSharding(Mesh(np.array(jax.devices()).reshape(8), ("x",)), PartitionSpec("x"))
    params = {"kernel": jax.device_put(jnp.ones((16, 4)), sharding)}
    assert lj.init(key, params, {"kernel": lj.Full()})["kernel"].value.sharding == sharding


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_numpy_base_of_any_dtype_works_without_warnings(dtype: Any, key: jax.Array) -> None:
    params = {"kernel": np.ones((8, 6), dtype), "bias": np.ones(6, dtype)}
    adapter = lj.init(key, params, {"kernel": LORA, "bias": lj.Full()})
    out = lj.lora(lambda p, x: x @ p["kernel"] + p["bias"])(params, adapter, jnp.ones((1, 8)))
    np.testing.assert_array_equal(out, np.full((1, 6), 9.0))
