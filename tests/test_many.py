"""Several adapters of one base: each behaves, in a stack, as it does by itself."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluate import without_compiling
from helpers import FORWARD, assert_close, assert_few_ulp, bits
from jax import lax
from law import normal
from uses import USES
from zoo import ZOO

import lora_jax as lj
from lora_jax import many, testing
from lora_jax._report.flops import bodies

# What can be in one stack at one path.
TOGETHER: Mapping[str, list[Any]] = {
    "LoRA of different ranks and scales": [
        lj.LoRA(rank=2, alpha=4),
        lj.LoRA(rank=3, alpha=0.1),
        lj.LoRA(rank=1, alpha=0),
    ],
    "LoRA and rsLoRA": [lj.RSLoRA(rank=3, alpha=2), lj.LoRA(rank=1, alpha=5), lj.RSLoRA(rank=2, alpha=1 / 3)],
    "LoRA, rsLoRA and DoRA": [
        lj.DoRA(rank=2, alpha=3),
        lj.LoRA(rank=3, alpha=1),
        lj.DoRA(rank=1, alpha=0.7, rank_stabilized=True),
        lj.RSLoRA(rank=1, alpha=1),
    ],
    "with dropout": [lj.LoRA(rank=2, alpha=4, dropout=0.5), lj.DoRA(rank=3, alpha=4, dropout=0.5)],
    "AdaLoRA": [lj.AdaLoRA(rank=2, alpha=3), lj.AdaLoRA(rank=3, alpha=1)],
    "VeRA": [lj.VeRA(rank=4, seed=1), lj.VeRA(rank=4, seed=1)],
    "Rows": [lj.Rows(ids=[3, 1]), lj.Rows(ids=[3, 1])],
    "Full": [lj.Full(), lj.Full()],
    "LoRABias": [lj.LoRABias(scale=2), lj.LoRABias(scale=1 / 3)],
}
AXES = {"io": (5, 4), "ioo": (5, 2, 3), "iio": (4, 2, 5), "bio": (3, 5, 4), "iiio": (3, 2, 4, 6)}
CASES = [(name, "io") for name in TOGETHER] + [("LoRA, rsLoRA and DoRA", axes) for axes in AXES if axes != "io"]


def random(variant: Any, params: Any, seed: int, axes: str = "io", dtype: Any = jnp.float32) -> Any:
    """An adapter of the leaf `w` with nonzero arrays."""
    if not isinstance(variant, lj.Full | lj.LoRABias):
        variant = dataclasses.replace(variant, axes=axes)
    init = lambda params: lj.init(jax.random.key(0), params, {"w": variant}, param_dtype=dtype)  # noqa: E731
    shapes = jax.eval_shape(init, params)
    leaves, treedef = jax.tree.flatten(shapes)
    drawn = [normal(*leaf.shape, seed=100 * seed + at, size=0.4, dtype=dtype) for at, leaf in enumerate(leaves)]
    return treedef.unflatten(drawn)


def random_adapters(name: str, axes: str = "io", dtype: Any = jnp.float32) -> tuple[Any, dict[str, Any]]:
    params = {"w": normal(*AXES[axes], size=0.5)}
    made = {f"ad{at}": random(variant, params, at, axes, dtype) for at, variant in enumerate(TOGETHER[name])}
    return params, made | {"none": {}}


# Stacking


@pytest.mark.parametrize(
    ("name", "axes", "dtype"), [*((*case, "float32") for case in CASES), ("LoRA, rsLoRA and DoRA", "io", "bfloat16")]
)
def test_unstack_returns_the_adapters_bit_for_bit(name: str, axes: str, dtype: str) -> None:
    _, adapters = random_adapters(name, axes, jnp.dtype(dtype))
    adapters = jax.tree.map(np.asarray, adapters)  # compiles nothing; the next test has JAX arrays
    found = many.unstack(jax.tree.map(np.asarray, many.stack(adapters, rank=5)))
    assert list(found) == list(adapters)
    assert bits(found) == bits(adapters)
    assert jax.tree.structure(found) == jax.tree.structure(adapters)  # variants, ranks, scales, axes


def test_adapters_are_stacked_from_jax_and_numpy_arrays_and_under_jit() -> None:
    _, adapters = random_adapters("LoRA, rsLoRA and DoRA")
    assert bits(many.unstack(jax.jit(many.stack)(jax.tree.map(np.asarray, adapters)))) == bits(adapters)
    assert bits(many.unstack(many.stack(adapters))) == bits(adapters)
    abstract = jax.eval_shape(many.stack, adapters)
    assert abstract.members["w"].a.shape == (5, 5, 3)


def test_the_rank_of_a_stack_is_the_largest_or_that_asked_for() -> None:
    _, adapters = random_adapters("LoRA of different ranks and scales")
    ranks = {rank: many.stack(adapters, rank=rank).members["w"].a.shape[-1] for rank in (1, 4, 99)}
    assert ranks == {1: 3, 4: 4, 99: 4}  # the kernel is (5, 4)


@pytest.mark.parametrize(("name", "axes"), [case for case in CASES if case[0] != "with dropout"])
def test_a_selected_adapter_merges_as_the_adapter_does(name: str, axes: str) -> None:
    params, adapters = random_adapters(name, axes)
    bases = [many.BASE, -1, "none"]

    def compute(params: Any, adapters: Any) -> Any:
        stacked = many.stack(adapters)
        selected = [lj.merge(params, many.select(stacked, which)) for which in [*adapters, *bases]]
        return selected, [lj.merge(params, adapter) for adapter in adapters.values()]

    selected, expected = without_compiling(compute)(params, adapters)
    assert_close(selected[: len(adapters)], expected)
    # Exactly the base for every variant: DoRA has the gain 1, Full the base's values.
    assert all(bits(base) == bits(params) for base in selected[len(adapters) :])


def test_a_scale_is_exact_in_float64() -> None:
    with jax.enable_x64(True):
        params = {"w": normal(5, 4, dtype=np.float64)}
        adapter = random(lj.RSLoRA(rank=3, alpha=0.1), params, 0, dtype=np.float64)
        stacked, merge = many.stack({"one": adapter, "other": {}}), without_compiling(lj.merge)
        assert_close(merge(params, many.select(stacked, "one")), merge(params, adapter), {"float64": 1e-15})
        assert bits(many.unstack(stacked)["one"]) == bits(adapter)


# One adapter per example

MODELS = {
    "scanned_transformer": "float32",
    "tied_embedding": "float64",
    "grouped_conv": "float32",
    "experts": "float32",
}
VARIANTS = [
    lj.LoRA(rank=2, alpha=4, clip_rank=True),
    lj.DoRA(rank=1, alpha=3),
    lj.RSLoRA(rank=3, alpha=2, clip_rank=True),
]


@functools.cache
def mixture(name: str) -> tuple[Any, dict[str, Any]]:
    """A model, and adapters of different variants and ranks for its kernels; the last one is for some kernels only."""
    dtype = jnp.dtype(MODELS[name])
    model = ZOO[name](jax.random.key(0), dtype)
    kernels = lj.kernels(model.apply, model.params, *model.args)
    paths = list(lj.spec(kernels, model.spec))
    adapters = {}
    for number, variant in enumerate(VARIANTS):
        spec = dict.fromkeys(paths[1:] if number == 2 else paths, variant)
        init = lambda params, spec=spec: lj.init(  # noqa: E731
            jax.random.key(0), params, spec, kernels=kernels, param_dtype=dtype
        )
        draw = lambda leaf, number=number: normal(*leaf.shape, seed=number + leaf.size, size=0.4, dtype=dtype)  # noqa: E731
        adapters[f"ad{number}"] = jax.tree.map(draw, jax.eval_shape(init, model.params))
    return model, adapters


WHICH = ["ad2", "ad0", "base", "ad1", "ad0", "ad2", "ad1", "base"]


def one_by_one(model: Any, adapters: Any, which: Any, *args: Any) -> Any:
    """The oracle: the model with the merged kernels of each adapter, and of its results each example's row."""
    outs = {name: model.apply(lj.merge(model.params, adapter), *args) for name, adapter in adapters.items()}
    outs["base"] = model.apply(model.params, *args)
    rows = [jax.tree.map(lambda out, row=row: out[row], outs[name]) for row, name in enumerate(which)]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *rows)


@pytest.mark.parametrize(("name", "dtype"), MODELS.items())
def test_a_mixed_batch_is_each_example_with_its_adapter(name: str, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        model, adapters = mixture(name)

        def compute(params: Any, adapters: Any, *args: Any) -> Any:
            own = dataclasses.replace(model, params=params)
            got = many.per_example(own.apply)(params, many.stack(adapters), WHICH, *args)
            return got, one_by_one(own, adapters, WHICH, *args)

        got, expected = without_compiling(compute)(model.params, adapters, *model.args)
        assert_close(got, expected, FORWARD)


@pytest.mark.parametrize("use", [use for use in USES if use != "experts by group"])  # JAX has no such `vmap`
def test_every_use_of_a_kernel_takes_a_selected_adapter(use: str) -> None:
    case = USES[use]
    variants = [lj.LoRA(rank=2, alpha=3), lj.DoRA(rank=1, alpha=3)]
    adapters = {str(at): random(x, case.params, at, case.axes or case.roles) for at, x in enumerate(variants)}
    which = ["1", "base", "0"]

    def compute(adapters: Any, *args: Any) -> Any:
        adapted, members = lj.lora(case.apply, form="factored"), many.select(many.stack(adapters), which)
        got = jax.vmap(lambda member: adapted(case.params, member, *args))(members)
        merged = [case.params if name == "base" else lj.merge(case.params, adapters[name]) for name in which]
        return got, jax.tree.map(lambda *xs: jnp.stack(xs), *(case.apply(params, *args) for params in merged))

    assert_close(*without_compiling(compute)(adapters, *case.arrays), FORWARD)


def equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for body in bodies(eqn):
            yield from equations(body)


@pytest.mark.parametrize("name", ["scanned_transformer", "tied_embedding"])
def test_the_product_with_the_base_is_not_batched(name: str) -> None:
    with jax.enable_x64(MODELS[name] == "float64"):
        model, adapters = mixture(name)
        stacked = many.stack({key: adapters[key] for key in ("ad0", "ad2")})  # the norm of DoRA uses the kernel
        which = many.ids(stacked, ["ad0", "base"] * 4)
        jaxpr = jax.make_jaxpr(many.per_example(model.apply))(model.params, stacked, which, *model.args)
    shapes = {leaf.shape[1:] if name.startswith("scanned") else leaf.shape for leaf in jax.tree.leaves(model.params)}
    shapes = {shape for shape in shapes if len(shape) > 1}
    shapes |= {shape[::-1] for shape in shapes}  # the tied head
    products = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]
    with_kernel = [eqn for eqn in products if shapes & {var.aval.shape for var in eqn.invars}]
    assert len(with_kernel) >= 2
    assert all(eqn.params["dimension_numbers"][1] == ((), ()) for eqn in with_kernel)
    made = {var.aval.shape for eqn in equations(jaxpr) for var in eqn.outvars}
    assert not made & {(8, *shape) for shape in shapes}  # no kernel for each example


def test_no_kernel_is_materialized_for_each_example_where_that_takes_fewer_flops() -> None:
    params, x = {"w": normal(16, 12)}, normal(2, 256, 16)
    stacked = many.stack({"one": random(lj.LoRA(rank=11, alpha=1), params, 0)})
    apply = lambda params, x: x @ params["w"]  # noqa: E731
    assert (16, 12) in testing.shapes_made(lj.lora(apply), params, many.select(stacked, 0), x)
    made = testing.shapes_made(many.per_example(apply), params, stacked, np.zeros(2, np.int32), x)
    assert not {(16, 12), (2, 16, 12)} & made


def test_the_flops_are_those_of_the_base_and_of_one_adapter_per_example() -> None:
    batch, tokens, d, f, rank = 4, 8, 64, 96, 4
    params, x = {"w": normal(d, f)}, normal(batch, tokens, d, seed=1)
    apply = lambda params, x: x @ params["w"]  # noqa: E731
    counts = {}
    for number in (2, 32):
        adapters = {f"ad{at}": random(lj.LoRA(rank=rank - at % 2, alpha=at), params, at) for at in range(number)}
        stacked = many.stack(adapters)
        counts[number] = testing.flops(many.per_example(apply), params, stacked, np.zeros(batch, np.int32), x)
    base = testing.flops(apply, params, x)
    assert base == 2 * batch * tokens * d * f
    low_rank = 2 * batch * tokens * rank * (d + f)
    scale_and_sum = batch * (d * rank + tokens * rank + tokens * f)  # the scale of `a`, the static scale 1, the sum
    assert counts[2] == counts[32] == base + low_rank + scale_and_sum


def test_a_quantized_base_has_an_adapter_per_example() -> None:
    params = lj.quant.quantize({"w": normal(64, 8)}, {"w": lj.quant.NF4(axes="io")})
    dense, x = lj.quant.dequantize(params), normal(3, 64, seed=1)
    adapters = {str(rank): random(lj.LoRA(rank=rank, alpha=3), dense, rank) for rank in (1, 3)}
    apply = lambda params, x: x @ params["w"]  # noqa: E731
    got = jax.jit(many.per_example(apply))(params, many.stack(adapters), np.array([1, -1, 0]), x)
    merged = without_compiling(lj.merge)
    expected = [merged(dense, adapters["3"]), dense, merged(dense, adapters["1"])]
    assert_close(got, np.stack([row @ np.asarray(params["w"]) for row, params in zip(x, expected, strict=True)]))


def test_examples_have_different_dropout_masks(key: jax.Array) -> None:
    params = {"w": normal(16, 4)}
    adapter = random(lj.LoRA(rank=2, alpha=4, dropout=0.5), params, 0)
    stacked, mixed = many.stack({"one": adapter}), many.per_example(lambda params, x: x @ params["w"])
    out = jax.jit(mixed, static_argnums=2)(params, stacked, 2 * ("one",), jnp.ones((2, 16)), dropout_key=key)
    assert np.abs(out[0] - out[1]).max() > 0.01


def test_activated_adapters_of_one_invocation_are_stacked() -> None:
    params, ids = {"e": normal(9, 5), "w": normal(5, 4)}, jnp.array([[1, 7, 8, 2, 3], [7, 8, 4, 4, 7]])
    variants = [lj.ALoRA(rank=2, alpha=3, invocation=[7, 8]), lj.ALoRA(rank=3, alpha=1, invocation=[7, 8])]
    adapters = {str(at): random(variant, params, at) for at, variant in enumerate(variants)}
    assert bits(many.unstack(many.stack(adapters))) == bits(adapters)
    apply = lambda params, ids: params["e"][ids] @ params["w"]  # noqa: E731
    active = lj.active_tokens(adapters["0"], ids)

    def compute(params: Any, adapters: Any, ids: Any, active: Any) -> Any:
        got = many.per_example(apply)(params, many.stack(adapters), ["1", "0"], ids, token_weights=active)
        adapted = lj.lora(apply)
        rows = [(adapters[name], slice(at, at + 1)) for at, name in enumerate(["1", "0"])]
        expected = [adapted(params, ad, ids[row], token_weights=active[row]) for ad, row in rows]
        return got, jnp.concatenate(expected), apply(params, ids)

    got, expected, base = without_compiling(compute)(params, adapters, ids, active)
    assert_close(got, expected)
    assert bits(got[0, :1]) == bits(base[0, :1])  # the token before the invocation


def test_arguments_have_the_examples_along_any_axis_or_are_shared() -> None:
    params, x, shared = {"w": normal(4, 3)}, normal(5, 2, 4), normal(5, 1, 3)
    stacked = many.stack({"one": random(lj.LoRA(rank=1, alpha=1), params, 0)})
    apply = lambda params, x, shared, *, scale, flag: {"y": x @ params["w"] * scale + shared, "flag": flag}  # noqa: E731
    mixed = many.per_example(apply, in_axes=(1, None), out_axes=1)
    scale = jnp.array([2.0, 3.0])

    def compute(params: Any, stacked: Any, x: Any, shared: Any, scale: Any) -> Any:
        out = mixed(params, stacked, ["one", "base"], x, shared, scale=scale, flag="a flag")
        assert out["flag"] == "a flag"
        kernels = [lj.merge(params, many.select(stacked, "one"))["w"], params["w"]]
        rows = [x[:, row] @ kernel * scale[row] + shared[:, 0] for row, kernel in enumerate(kernels)]
        return out["y"], jnp.stack(rows, axis=1)

    assert_close(*without_compiling(compute)(params, stacked, x, shared, scale))


def test_axes_may_be_trees_and_the_adapters_selected_before() -> None:
    params, x = {"w": normal(4, 3)}, normal(2, 4)
    cache = {"keys": normal(6, 2, 3), "length": jnp.array([1, 2]), "step": jnp.float32(5)}
    stacked = many.stack({"one": random(lj.LoRA(rank=1, alpha=1), params, 0)})

    def apply(params: Any, x: jax.Array, cache: Any) -> Any:
        y = x @ params["w"]
        return y, {"keys": cache["keys"] + y[None], "length": cache["length"] + 1}, "a flag"

    axes = {"keys": 1, "length": 0}
    mixed = many.per_example(apply, in_axes=(0, axes | {"step": None}), out_axes=(0, axes, 0))

    def compute(params: Any, stacked: Any, x: Any, cache: Any) -> Any:
        selected = many.select(stacked, ["one", "base"])
        *out, flag = mixed(params, stacked, ["one", "base"], x, cache)
        *again, _ = mixed(params, selected, None, x, cache)
        assert flag == "a flag"
        y = jnp.stack([x[0] @ lj.merge(params, many.select(stacked, "one"))["w"], x[1] @ params["w"]])
        return out, again, [y, {"keys": cache["keys"] + y[None], "length": cache["length"] + 1}]

    out, again, expected = without_compiling(compute)(params, stacked, x, cache)
    assert_close(out, expected)
    assert bits(again) == bits(out)


def test_axes_that_do_not_fit_are_refused() -> None:
    params, x = {"w": normal(4, 3)}, normal(2, 4)
    stacked = many.stack({"one": random(lj.LoRA(rank=1, alpha=1), params, 0)})
    apply = lambda params, x: x["x"] @ params["w"]  # noqa: E731
    run = lambda which=("one", "base"), of=stacked, **axes: many.per_example(apply, **axes)(params, of, which, {"x": x})  # noqa: E731
    with pytest.raises(lj.AdapterError, match=r"axes, for PyTreeDef\(\{'x': \*\}\); got \{'y': 0\} in `in_axes`"):
        run(in_axes=({"y": 0},))
    with pytest.raises(lj.AdapterError, match=r"axes, for PyTreeDef\(\*\); got \(0, 1\) in `out_axes`"):
        run(out_axes=(0, 1))
    with pytest.raises(lj.SpecError, match=r"axis of the examples in each result; got out_axes=\(0, None\)"):
        many.per_example(apply, out_axes=(0, None))
    member = many.select(stacked, ["one", "base"])
    for of, which in ((member, ["one", "base"]), (stacked, None)):
        with pytest.raises(lj.AdapterError, match=rf"`select` returns for them and None; got {type(of).__name__} and"):
            run(which, of)


def test_results_of_numpy_have_an_axis_of_examples() -> None:
    params = {"w": normal(4, 3)}
    stacked = many.stack({"one": random(lj.LoRA(rank=1, alpha=1), params, 0)})
    mixed = many.per_example(lambda params, x: (x @ params["w"], np.ones((len(x), 2)), "text"))
    _, ones, text = mixed(params, stacked, ["one", "base", "one"], normal(3, 4))
    assert ones.shape == (3, 2) and text == "text"


def test_a_result_without_an_axis_of_examples_is_refused() -> None:
    params = {"w": normal(4, 3), "v": normal(3)}
    stacked = many.stack({"one": random(lj.LoRA(rank=1, alpha=1), params, 0)})
    mixed = many.per_example(lambda params, x: (x @ params["w"], params["v"].sum()))
    with pytest.raises(lj.UnsupportedError, match=r"one element per example along axis 0; .*, got shape \(\)"):
        mixed(params, stacked, ["one", "base"], normal(2, 4))
    with pytest.raises(lj.AdapterError, match=r"array with an axis 0 for the examples; got the shape \(\)"):
        mixed(params, stacked, ["one", "base"], normal(2, 4), jnp.float32(1))
    with pytest.raises(lj.AdapterError, match="`in_axes` for each of the 1 arguments after the adapters; got 2"):
        many.per_example(lambda params, x: x, in_axes=(0, None))(params, stacked, ["one", "base"], normal(2, 4))


def test_explain_shows_a_selected_adapter() -> None:
    params, adapters = random_adapters("LoRA, rsLoRA and DoRA")
    member = many.select(many.stack(adapters), "ad0")
    table = str(lj.explain(lambda params, x: x @ params["w"], params, member, jnp.ones((2, 5)), strict=True))
    assert "Padded" in table and "factored dot_general ×1" in table


# Unknown names and numbers


def test_unknown_names_and_numbers_raise_where_they_are_known() -> None:
    _, adapters = random_adapters("LoRA and rsLoRA")
    stacked = many.stack(adapters)
    with pytest.raises(lj.AdapterError, match=r"name of one of the 4 adapters; got 'ad7'.\n  The nearest are 'ad2'"):
        many.select(stacked, "ad7")
    with pytest.raises(lj.AdapterError, match="got 'german'"):
        jax.jit(lambda stacked: many.select(stacked, ["ad0", "german"]))(stacked)
    for number in (4, -2, np.array([0, 4]), jnp.array([[-2]]), [0, 9]):
        with pytest.raises(lj.AdapterError, match=r"numbers of the 4 adapters, or -1 for the base; got (4|-2|9)"):
            many.select(stacked, number)
    with pytest.raises(lj.AdapterError, match=r"names or integers that select adapters; got float32\[1\]"):
        many.select(stacked, jnp.ones(1))
    with pytest.raises(lj.SpecError, match="'nan' or 'base' for `unknown`; got 'zero'"):
        many.select(stacked, 0, unknown="zero")


@pytest.mark.parametrize("name", ["LoRA, rsLoRA and DoRA", "AdaLoRA", "VeRA", "Rows", "Full", "LoRABias"])
def test_an_unknown_number_under_jit_is_nan_or_the_base(name: str) -> None:
    params, adapters = random_adapters(name)
    count = len(adapters)
    which = jnp.array([0, -1, count, -2, 2**31 - 1, -(2**31)])

    def compute(params: Any, adapters: Any, which: Any) -> Any:
        def merged(unknown: Any) -> Any:
            members = many.select(many.stack(adapters), which, unknown=unknown)
            return jax.vmap(lambda member: lj.merge(params, member)["w"])(members)

        return merged("nan"), merged("base"), lj.merge(params, adapters["ad0"])["w"]

    invalid, base, expected = without_compiling(compute)(params, adapters, which)
    rows = slice(None) if name != "Rows" else [3, 1]
    assert np.isnan(invalid[2:, rows]).all()
    assert bits(base[2:]) == bits(np.stack([params["w"]] * 4))
    for out in (invalid, base):
        assert_close(out[0], expected)
        assert bits(out[1]) == bits(params["w"])


ONE = np.ones((1, 1), np.float32)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64"])
def test_numbers_of_any_integer_type_select_no_other_adapter(dtype: str) -> None:
    params = {"w": jnp.zeros((1, 1))}
    adapters = {
        str(at): {"w": lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=np.full((1, 1), at + 1.0, np.float32), b=ONE)}
        for at in range(200)
    }
    stacked = many.stack(adapters)
    run = jax.jit(lambda which: jax.vmap(lambda one: lj.merge(params, one)["w"][0, 0])(many.select(stacked, which)))
    with jax.enable_x64(dtype == "int64"):
        info = jnp.iinfo(dtype)
        numbers = [0, 5, 100, info.max, info.min, *([2**32 + 3] if dtype == "int64" else [])]
        got = run(jnp.array(numbers, dtype))
    expected = [number + 1.0 if 0 <= number < 200 else np.nan for number in numbers]
    np.testing.assert_array_equal(got, expected)


# Replacing an adapter


def test_another_adapter_rank_or_scale_compiles_nothing(caplog: pytest.LogCaptureFixture) -> None:
    params, x = {"w": normal(6, 5), "bias": normal(5)}, normal(3, 6)
    apply = lambda params, x: x @ params["w"] + params["bias"]  # noqa: E731
    make = lambda variant, seed: random(variant, params, seed)  # noqa: E731
    one = make(lj.LoRA(rank=2, alpha=4), 0) | {"bias": lj.Adapter(lj.Full(), "", value=normal(5, seed=9))}
    stacked = many.stack({"one": one, "two": make(lj.DoRA(rank=1, alpha=1), 1)}, rank=4)
    run = jax.jit(many.per_example(apply))
    which = many.ids(stacked, ["two", "one", "base"])
    stacked = many.swap(stacked, "two", make(lj.LoRA(rank=1, alpha=1), 2))
    run(params, stacked, which, x)
    others = [make(lj.RSLoRA(rank=4, alpha=3), 3), make(lj.DoRA(rank=3, alpha=0.1), 4), one, {}]
    oracle = without_compiling(lambda params, adapter, x: apply(lj.merge(params, adapter), x))
    expected = [oracle(params, other, x[:1]) for other in others]
    expected_one = oracle(params, one, x[2:])
    which = many.ids(stacked, ["two", "base", "one"])
    with jax.log_compiles():
        caplog.clear()
        results = [run(params, many.swap(stacked, "two", other), which, x) for other in others]
        assert not [record.message for record in caplog.records if "Compiling" in record.message]
    for got, wanted in zip(results, expected, strict=True):
        assert_close(got[:1], wanted)
        assert_close(got[2:], expected_one)
    swapped = many.unstack(many.swap(stacked, "two", others[1]))
    assert bits(swapped) == bits({"one": one, "two": others[1]})


# Training


def test_the_whole_member_cannot_be_differentiated_by_mistake() -> None:
    params, adapters = random_adapters("LoRA and rsLoRA")
    member = many.select(many.stack(adapters), "ad0")
    with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs"):
        jax.grad(lambda member: lj.merge(params, member)["w"].sum())(member)
    with pytest.raises(lj.AdapterError, match=r"needs a \(5, 3\), b \(3, 4\), scale \(\); the adapter has a"):
        lj.lora(lambda params: params["w"])(params, member.trainable)


def test_the_trainable_arrays_are_an_adapter_for_optimizers() -> None:
    _, adapters = random_adapters("LoRA and rsLoRA")
    member = many.select(many.stack(adapters), "ad0")
    mask = lj.optim.select("b")(member.trainable)
    assert (mask["w"].a, mask["w"].b) == (False, True)
    for tx in (lj.optim.riemannian(), lj.optim.lora_fa(optax.sgd(1.0))):  # these need the scale or the rank
        with pytest.raises(lj.AdapterError, match=r"adapter that is not in a stack; got Padded\("):
            tx.update(member.trainable, tx.init(member.trainable), member.trainable)


# What is refused

REFUSED: Mapping[str, tuple[list[Any], str]] = {
    "variants": ([lj.LoRA(rank=1, alpha=1), lj.VeRA(rank=1, seed=0)], "VeRA.* does not fit LoRA"),
    "adaptive": ([lj.AdaLoRA(rank=1, alpha=1), lj.LoRA(rank=1, alpha=1)], "LoRA.* does not fit AdaLoRA"),
    "full": ([lj.LoRA(rank=1, alpha=1), lj.Full()], "Full.* does not fit LoRA"),
    "rows": ([lj.Rows(ids=[1]), lj.Rows(ids=[2])], r"Rows\(ids=\(2,\)\) does not fit Rows\(ids=\(1,\)\)"),
    "seeds": ([lj.VeRA(rank=2, seed=0), lj.VeRA(rank=2, seed=1)], "seed=1.* does not fit .*seed=0"),
    "ranks of VeRA": ([lj.VeRA(rank=2, seed=0), lj.VeRA(rank=3, seed=0)], "rank=3.* does not fit .*rank=2"),
    "dropout": ([lj.LoRA(rank=1, alpha=1), lj.LoRA(rank=1, alpha=1, dropout=0.1)], "dropout=0.1.* does not fit LoRA"),
    "invocations": (
        [lj.ALoRA(rank=1, alpha=1, invocation=[1]), lj.ALoRA(rank=1, alpha=1, invocation=[2])],
        r"invocation=\(2,\)\) does not fit ALoRA\(.*invocation=\(1,\)\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_leaves_that_cannot_be_stacked_are_all_named(name: str) -> None:
    variants, reason = REFUSED[name]
    params = {"w": normal(5, 4)}
    adapters = [random(variant, params, 0) for variant in variants]
    adapters = [{path: adapter["w"] for path in ("x/w", "y/w", "z")} for adapter in adapters]
    adapters[1]["z"] = adapters[0]["z"]
    expected = rf"same axes, shapes and dtypes; got 2 that cannot.\n  'x/w' of 'two': .*{reason}.*\n  'y/w' of 'two'"
    with pytest.raises(lj.AdapterError, match=expected):
        many.stack({"one": adapters[0], "two": adapters[1]})


class OtherLoRA(lj.LoRA):
    """A variant of a user."""


def test_leaves_of_other_kernels_or_dtypes_are_refused() -> None:
    def refused(part: Any) -> str:
        with pytest.raises(lj.AdapterError) as error:
            many.stack({"one": random(lj.LoRA(rank=1, alpha=1), {"w": normal(5, 4)}, 0), "two": {"w": part}})
        return str(error.value)

    other = random(lj.LoRA(rank=2, alpha=1), {"w": normal(6, 4)}, 0)["w"]
    assert "'w' of 'two': 'a' has the shape (6, 2), and would fit with (5, 2)" in refused(other)
    other = random(lj.LoRA(rank=1, alpha=1), {"w": normal(5, 4)}, 0, dtype=jnp.bfloat16)["w"]
    assert "'a' is bfloat16, and float32 in 'one'" in refused(other)
    other = random(lj.LoRA(rank=1, alpha=1), {"w": normal(5, 4)}, 0, axes="oi")["w"]
    assert "the axes are 'oi', and 'io' in 'one'" in refused(other)
    other = lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=normal(5, 1))
    assert "has the arrays ['a'], and here needs ['a', 'b']" in refused(other)
    for variant in (
        lj.LoRA(rank=2, alpha=1, clip_rank=True),
        lj.ALoRA(rank=2, alpha=1, clip_rank=True, invocation=[1]),
        OtherLoRA(rank=2, alpha=1),
    ):
        other = lj.Adapter(variant, "io", a=normal(5, 2), b=normal(2, 4))
        assert f"'w' of 'two': {variant} cannot be stacked" in refused(other)


def test_names_and_ranks_are_checked() -> None:
    with pytest.raises(lj.AdapterError, match="strings other than 'base', which is the base, as names; got 'base'"):
        many.stack({"base": {}})
    with pytest.raises(lj.AdapterError, match=r"at least one adapter with a leaf; got \{'one': \{\}\}"):
        many.stack({"one": {}})
    with pytest.raises(lj.SpecError, match="`rank`; got rank=0"):
        many.stack({"one": {}}, rank=0)
    with pytest.raises(lj.AdapterError, match=r"The argument is \{name: adapter, …\}"):
        many.stack({"one": {"w": 3}})


def test_what_does_not_fit_a_stack_is_not_swapped_in() -> None:
    params = {"w": normal(5, 4)}
    stacked = many.stack({"one": random(lj.LoRA(rank=2, alpha=1), params, 0)})
    adapter = random(lj.LoRA(rank=3, alpha=1), params, 0) | {"v": random(lj.LoRA(rank=1, alpha=1), params, 0)["w"]}
    expected = r"got 2 that cannot.\n  'w': the rank is 3; the stack is padded to 2\n  'v': the stack has no such leaf"
    with pytest.raises(lj.AdapterError, match=expected):
        many.swap(stacked, "one", adapter)
    with pytest.raises(lj.AdapterError, match=r"'w': DoRA.* 'magnitude'\], and here needs \['a', 'b'\]"):
        many.swap(stacked, "one", random(lj.DoRA(rank=1, alpha=1), params, 0))
    with pytest.raises(lj.AdapterError, match="name of one of the 1 adapters; got 'two'"):
        many.swap(stacked, "two", {})


def test_unstack_needs_values() -> None:
    _, adapters = random_adapters("LoRA and rsLoRA")
    with pytest.raises(lj.AdapterError, match="Call unstack outside `jit`"):
        jax.jit(many.unstack)(many.stack(adapters))


def test_a_stack_is_not_an_adapter() -> None:
    params, adapters = random_adapters("LoRA and rsLoRA")
    stacked, adapted = many.stack(adapters), lj.lora(lambda params, x: x @ params["w"])
    with pytest.raises(lj.AdapterError, match="got Stack"):
        adapted(params, stacked, jnp.ones((1, 5)))
    with pytest.raises(lj.AdapterError, match=r"the adapter has a \(4, 5, 3\), b \(4, 3, 4\), scale \(4,\)"):
        adapted(params, stacked.members, jnp.ones((1, 5)))
    with pytest.raises(lj.AdapterError, match=r"one adapter per example; got \[3\] adapters and \[2\] examples"):
        many.per_example(lambda params, x: x @ params["w"])(params, stacked, [0, 1, 2], jnp.ones((2, 5)))


class Normalized(nn.Module):
    training: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(use_running_average=not self.training)(nn.Dense(3, name="w")(x))


def normalized(training: bool, *, keep: bool) -> Callable[..., Any]:
    def apply(params: Any, x: jax.Array) -> Any:
        out, changed = Normalized(training).apply(
            {"params": {"w": {"kernel": params["w"], "bias": jnp.zeros(3)}, "BatchNorm_0": NORM["params"]}, **STATS},
            x,
            mutable=["batch_stats"],
        )
        return (out, changed) if keep else out

    return apply


NORM = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}}
STATS = {"batch_stats": {"BatchNorm_0": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}}

COMBINE: Mapping[str, tuple[Callable[..., Any], str]] = {
    "batch statistics": (normalized(True, keep=True), "reduce_sum"),
    "batch statistics that are dropped": (normalized(True, keep=False), "reduce_sum"),
    "a mean loss": (lambda p, x: (x @ p["w"]).mean(), "reduce_sum"),
    "a contrastive loss": (lambda p, x: jnp.einsum("nf,mf->nm", x @ p["w"], x), "dot_general"),
    "another example": (lambda p, x: (x @ p["w"])[::-1], "rev"),
    "the first example": (lambda p, x: x @ p["w"] - (x @ p["w"])[:1], "slice"),
    "a sum over examples": (lambda p, x: jnp.cumsum(x @ p["w"], 0), "cumsum"),
    "the largest example": (lambda p, x: jnp.sort(x @ p["w"], 0), "sort"),
    "a loop over examples": (lambda p, x: lax.scan(lambda h, y: (h + y, h), jnp.zeros(4), x)[1] @ p["w"], "scan"),
    "counts": (lambda p, x: x @ p["w"] + jnp.zeros(4).at[x.astype(int)[:, 0]].add(1.0)[0], "scatter-add"),
}


@pytest.mark.parametrize("name", COMBINE)
def test_a_model_that_combines_examples_is_refused(name: str) -> None:
    apply, primitive = COMBINE[name]
    params = {"w": normal(4, 3) if "statistics" in name else normal(4, 4)}
    stacked = many.stack({"one": random(lj.LoRA(rank=1, alpha=1), params, 0)})
    with pytest.raises(
        lj.UnsupportedError, match=f"treats the examples .* separately; .*combine them.\n.*`{primitive}` at"
    ):
        many.per_example(apply)(params, stacked, ["one", "base"], normal(2, 4))


SEPARATE: Mapping[str, Callable[..., Any]] = {
    "running statistics": lambda p, x: normalized(False, keep=False)(p, x[..., 0]),
    "a norm of the features": lambda p, x: (x - x.mean((1, 2), keepdims=True)).swapaxes(1, 2) @ p["w"],
    "attention": lambda p, x: jax.nn.softmax(jnp.einsum("nit,njt->nij", x, x)) @ x,
    "sums and orders over time": lambda p, x: jnp.sort(jnp.cumsum(x[:, :, ::-1], 2), 1),
    "a recurrence": lambda p, x: lax.scan(
        lambda h, y: ((jnp.tanh(h[0] @ p["w"] @ p["w"].T + y), h[1] + 1), y),
        (jnp.zeros((x.shape[0], 4)), 0),
        jnp.moveaxis(x, 2, 0),
    )[0][0],
    "a fold of the batch into tokens": lambda p, x: (x.swapaxes(1, 2).reshape(-1, 4) @ p["w"]).reshape(
        x.shape[0], 5, 3
    ),
    "two sizes only": lambda p, x: x.reshape(1, 4, 5).swapaxes(1, 2) @ p["w"],  # cannot be traced with two examples
}


@pytest.mark.parametrize("name", SEPARATE)
def test_a_model_that_keeps_examples_apart_is_not_refused(name: str) -> None:
    params = {"w": normal(4, 3)}
    stacked = many.stack({"one": random(lj.LoRA(rank=1, alpha=1), params, 0)})
    x = normal(2, 4, 5)
    got = many.per_example(SEPARATE[name])(params, stacked, ["one", "base"], x)
    assert_few_ulp(got[1:], SEPARATE[name](params, x[1:]), 64)


def test_a_model_that_combines_examples_is_accepted_if_asked_for() -> None:
    params = {"w": normal(4, 4)}
    stacked = many.stack({"one": random(lj.LoRA(rank=1, alpha=1), params, 0)})
    mixed = many.per_example(lambda p, x: jnp.sort(x @ p["w"], 0), allow_coupled=True)
    x = normal(1, 4, seed=1)
    got = without_compiling(lambda params, x: (mixed(params, stacked, ["base"], x), jnp.sort(x @ params["w"], 0)))
    assert_close(*got(params, x))
