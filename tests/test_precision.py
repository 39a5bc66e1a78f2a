"""Precision of the low-rank term where a model computes in 8 bits, or in float16 with a float32 result."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dense
from jax import lax
from law import adapted, normal

import lora_jax as lj
from lora_jax._core.contract import is_narrow, widest

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
IO, OUT = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))
GROUPS = jnp.array([2, 0, 3], jnp.int32)
IMAGES = ("NHWC", "HWIO", "NHWC")


class Use(NamedTuple):
    """`call(w, x, dtype, y)`, which casts both operands to a dtype for a product with another result dtype."""

    call: Callable[..., jax.Array]
    kernel: tuple[int, ...]
    x: tuple[int, ...]
    axes: str


def dot(numbers: Any) -> Callable[..., jax.Array]:
    return lambda w, x, dtype, y: lax.dot_general(x.astype(dtype), w.astype(dtype), numbers, preferred_element_type=y)


def on_the_left(w: jax.Array, x: jax.Array, dtype: Any, y: Any) -> jax.Array:
    return lax.dot_general(w.astype(dtype), x.astype(dtype), (((0,), (1,)), ((), ())), preferred_element_type=y)


def attention(w: jax.Array, x: jax.Array, dtype: Any, y: Any) -> jax.Array:
    return jnp.einsum("td,dhk->htk", x.astype(dtype), w.astype(dtype), preferred_element_type=y)


def experts(w: jax.Array, x: jax.Array, dtype: Any, y: Any) -> jax.Array:
    return lax.ragged_dot(x.astype(dtype), w.astype(dtype), GROUPS, preferred_element_type=y)


def selected_experts(w: jax.Array, x: jax.Array, dtype: Any, y: Any) -> jax.Array:
    selected = w.astype(dtype)[jnp.array([2, 0])]
    return jnp.einsum("td,tdf->tf", x.astype(dtype), selected, preferred_element_type=y)


def convolution(**options: Any) -> Callable[..., jax.Array]:
    return lambda w, x, dtype, y: lax.conv_general_dilated(
        x.astype(dtype), w.astype(dtype), (1, 1), "SAME", dimension_numbers=IMAGES, preferred_element_type=y, **options
    )


def layers(w: jax.Array, x: jax.Array, dtype: Any, y: Any) -> jax.Array:
    def layer(total: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return total + dot(IO)(w, x, dtype, y), None

    return lax.scan(layer, jnp.zeros((x.shape[0], w.shape[-1]), y), w)[0]


def narrow_result(w: jax.Array, x: jax.Array, dtype: Any, y: Any) -> jax.Array:
    return lax.dot_general(x.astype(dtype), w.astype(dtype), IO).astype(y)


def scaled(w: jax.Array, x: jax.Array, dtype: Any, y: Any) -> jax.Array:
    scales = jnp.full((w.shape[1],), 0.5, dtype)
    return lax.dot_general(x.astype(dtype), w.astype(dtype) * scales, IO, preferred_element_type=y)


def rows(w: jax.Array, x: jax.Array, dtype: Any, y: Any) -> jax.Array:
    return w.astype(dtype)[jnp.array([0, 3, 3])].astype(y) + x[:, :1].astype(dtype).astype(y)


def one_row(w: jax.Array, x: jax.Array, dtype: Any, y: Any) -> jax.Array:
    return w.astype(dtype)[2].astype(y) + x[:, :1].astype(dtype).astype(y)


USES = {
    "Dense": Use(dot(IO), (6, 5), (3, 6), "io"),
    "a tied head": Use(dot(OUT), (6, 5), (3, 5), "io"),
    "on the left": Use(on_the_left, (6, 5), (3, 6), "io"),
    "the query of attention": Use(attention, (6, 2, 3), (3, 6), "ioo"),
    "a stack of layers": Use(layers, (2, 6, 5), (3, 6), "bio"),
    "experts by group": Use(experts, (3, 6, 5), (5, 6), "bio"),
    "one expert per token": Use(selected_experts, (3, 6, 5), (2, 6), "bio"),
    "a convolution": Use(convolution(), (2, 2, 6, 4), (1, 3, 3, 6), "iiio"),
    "a convolution in groups": Use(convolution(feature_group_count=2), (2, 2, 3, 4), (1, 3, 3, 6), "iiio"),
    "a narrow result": Use(narrow_result, (6, 5), (3, 6), "io"),
    "scaled by an array": Use(scaled, (6, 5), (3, 6), "io"),
    "rows looked up": Use(rows, (6, 5), (3, 6), "io"),
    "one row": Use(one_row, (6, 5), (3, 6), "io"),
}
LOOKED_UP = ("rows looked up", "one row")


def wide(use: Use) -> Callable[..., jax.Array]:
    """The oracle: the same in float32, with `x` rounded as in the model."""
    return lambda w, x, dtype, y: use.call(w, x.astype(dtype).astype(jnp.float32), jnp.float32, jnp.float32)


def assert_near(got: Any, expected: Any, tolerance: float) -> None:
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


OTHER_DTYPES = [
    (name, dtype, y)
    for name in ("Dense", "experts by group", "a convolution", "rows looked up")
    for dtype, y in [(E5M2, jnp.float32), (E4M3, jnp.float16)]
]


@pytest.mark.parametrize(("name", "dtype", "y"), [*((name, E4M3, jnp.bfloat16) for name in USES), *OTHER_DTYPES])
def test_the_low_rank_term_has_sixteen_bits_where_the_base_has_eight(name: str, dtype: Any, y: Any) -> None:
    use = USES[name]
    params, x = {"w": jnp.zeros(use.kernel)}, normal(*use.x, seed=1, size=60)
    # x·A exceeds 448, the largest float8_e4m3fn, and the update needs more than its 3 bits.
    adapter = jax.tree.map(lambda array: 3 * array, adapted(params, {"w": use.axes}))

    def run(call: Callable[..., jax.Array], lora: Any) -> Any:
        function = lora(lambda params, x: call(params["w"], x, dtype, y))
        total = lambda adapter: jnp.sum(jnp.tanh(function(params, adapter, x).astype(jnp.float32) / 1000))  # noqa: E731
        return function(params, adapter, x), jax.grad(total)(adapter)["w"]

    got, gradient = jax.jit(lambda: run(use.call, lj.lora))()
    expected, expected_gradient = jax.jit(lambda: run(wide(use), dense))()
    assert got.dtype == y
    assert_near(got, expected, 2e-2)
    # The cotangent of an 8-bit result has 8 bits, as in the model.
    back = 2e-1 if name in ("a narrow result", *LOOKED_UP) else 3e-2
    for name_of_factor in "ab":
        assert_near(gradient.arrays[name_of_factor], expected_gradient.arrays[name_of_factor], back)


def products(jaxpr: Any) -> list[Any]:
    """The operand dtypes of all products in a jaxpr and its inner jaxprs."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "ragged_dot_general", "conv_general_dilated"):
            found.append([var.aval.dtype for var in eqn.invars[:2]])
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found += products(getattr(inner, "jaxpr", inner))
    return found


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, None) for name in USES if name not in LOOKED_UP),
        *((name, form) for name in ("Dense", "a convolution") for form in ("hybrid", "merged")),
    ],
)
def test_only_the_base_product_is_in_eight_bits_in_every_form(name: str, form: Any) -> None:
    use = USES[name]
    params, x = {"w": jnp.zeros(use.kernel)}, normal(*use.x, seed=1)
    adapter = adapted(params, {"w": use.axes})

    def narrow(function: Any, *args: Any) -> int:
        total = lambda *args: jnp.sum(function(*args).astype(jnp.float32))  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(total, argnums=len(args) - 1))(*args)
        return sum(any(map(is_narrow, dtypes)) for dtypes in products(jaxpr.jaxpr))

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return use.call(params["w"], x, E4M3, jnp.bfloat16)

    assert narrow(lj.lora(apply, form=form), params, adapter, x) == narrow(apply, params, x)


@pytest.mark.parametrize("name", USES)
def test_the_low_rank_term_of_a_float32_result_has_the_range_of_float32(name: str) -> None:
    use = USES[name]
    if name in ("a narrow result", *LOOKED_UP):
        pytest.skip("the result is in float16")
    params, x = {"w": jnp.zeros(use.kernel)}, jnp.full(use.x, 30000.0)
    adapter = jax.tree.map(lambda array: abs(array) + 1, adapted(params, {"w": use.axes}))  # x·A exceeds 65504
    args = params, adapter, x
    got = lj.lora(lambda params, x: use.call(params["w"], x, jnp.float16, jnp.float32))(*args)
    expected = dense(lambda params, x: wide(use)(params["w"], x, jnp.float16, jnp.float32))(*args)
    assert_near(got, expected, 2e-3)


def test_a_product_of_8_bit_kernels_has_a_16_bit_low_rank_term() -> None:
    params = {"q": normal(6, 5, size=0.5), "k": normal(5, 4, seed=1, size=0.5)}
    params = jax.tree.map(lambda w: w.astype(E4M3).astype(jnp.float32), params)
    adapter = adapted(params, {"q": "io", "k": "io"})

    def apply(dtype: Any) -> Any:
        return lambda params: lax.dot_general(
            params["q"].astype(dtype), params["k"].astype(dtype), IO, preferred_element_type=jnp.float32
        )

    adapter = jax.tree.map(lambda array: 20 * array, adapter)  # products of factors exceed 448
    assert_near(lj.lora(apply(E4M3))(params, adapter), dense(apply(jnp.float32))(params, adapter), 2e-2)


@pytest.mark.parametrize("name", ["Dense", "rows looked up", "experts by group"])
def test_a_gain_is_multiplied_in_sixteen_bits(name: str) -> None:
    use = USES[name]
    params = {"w": normal(*use.kernel, size=0.5).astype(E4M3).astype(jnp.float32)}
    adapter = lj.init(jax.random.key(0), params, {"w": lj.DoRA(rank=2, alpha=3, axes=use.axes)})
    adapter = jax.tree.map(lambda array: array + 0.3 * normal(*array.shape, seed=5), adapter)
    x = normal(*use.x, seed=1)
    got = lj.lora(lambda params, x: use.call(params["w"], x, E4M3, jnp.bfloat16))(params, adapter, x)
    expected = dense(lambda params, x: wide(use)(params["w"], x, E4M3, jnp.bfloat16))(params, adapter, x)
    assert_near(got, expected, 7e-2 if name in LOOKED_UP else 2e-2)


def test_a_low_rank_product_in_eight_bits_is_refused() -> None:
    params = {"w": normal(6, 5)}
    adapter = lj.init(jax.random.key(0), params, {"w": lj.DoRA(rank=2, alpha=3, dropout=0.5)})
    for use, dropout_key in [("a tied head", None), ("Dense", jax.random.key(1))]:
        call = lj.lora(lambda params, x, use=use: USES[use].call(params["w"], x, E4M3, jnp.bfloat16))
        with pytest.raises(lj.UnsupportedError, match="a product in fewer than 16 bits"):
            call(params, adapter, jnp.ones(USES[use].x), dropout_key=dropout_key)


def test_dropout_scales_8_bit_activations_in_sixteen_bits() -> None:
    params, x = {"w": jnp.zeros((6, 5))}, jnp.full((3, 6), 448.0)
    variant = lj.LoRA(rank=2, alpha=2, dropout=0.5)
    adapter = {"w": lj.Adapter(variant, "io", a=jnp.ones((6, 2)), b=jnp.ones((2, 5)))}
    call = lj.lora(lambda params, x: USES["Dense"].call(params["w"], x, E4M3, jnp.float32))
    got = call(params, adapter, x, dropout_key=jax.random.key(0))
    kept = got / (448 * 2 * 2)  # six inputs, doubled, at rank 2
    assert_near(kept, jnp.round(kept), 1e-2)
    assert 0 < kept.max() <= 6


@pytest.mark.parametrize("fast", ["ANY_F8_ANY_F8_F32", "ANY_F8_ANY_F8_F32_FAST_ACCUM"])
def test_an_8_bit_algorithm_is_not_used_for_the_factors(fast: str) -> None:
    preset = lax.DotAlgorithmPreset[fast]

    def apply(params: Any, x: jax.Array) -> jax.Array:
        narrow = x.astype(E4M3), params["w"].astype(E4M3)
        return lax.dot_general(*narrow, IO, precision=preset, preferred_element_type=jnp.float32)

    params = {"w": jnp.zeros((6, 5))}
    jaxpr = jax.make_jaxpr(lj.lora(apply))(params, adapted(params, {"w": "io"}), jnp.ones((3, 6)))
    asked = [eqn.params["precision"] for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert asked.count(preset) == 1 and len(asked) == 3


@pytest.mark.parametrize(
    ("precision", "x", "y", "kept"),
    [
        (lax.DotAlgorithmPreset.BF16_BF16_F32, jnp.bfloat16, jnp.float32, True),
        (lax.DotAlgorithmPreset.TF32_TF32_F32, jnp.float32, jnp.float32, True),
        (lax.DotAlgorithmPreset.DEFAULT, jnp.bfloat16, jnp.bfloat16, True),
        (lax.DotAlgorithmPreset.F16_F16_F16, jnp.float16, jnp.float16, True),
        (lax.DotAlgorithmPreset.F16_F16_F32, jnp.float16, jnp.float32, False),
        (lax.DotAlgorithm(E4M3, E4M3, jnp.float32), jnp.bfloat16, jnp.float32, False),
        (lax.DotAlgorithm(jnp.bfloat16, jnp.bfloat16, jnp.float32), jnp.bfloat16, jnp.float32, True),
    ],
)
def test_an_algorithm_is_kept_if_it_has_the_precision_of_the_result(precision: Any, x: Any, y: Any, kept: bool) -> None:
    def apply(params: Any, x: jax.Array) -> jax.Array:
        return lax.dot_general(x, params["w"], IO, precision=precision, preferred_element_type=y)

    params = {"w": jnp.zeros((6, 5), x)}
    adapter = adapted(params, {"w": "io"})
    jaxpr = jax.make_jaxpr(lj.lora(apply, form="factored"))(params, adapter, jnp.ones((3, 6), x))
    asked = [eqn.params["precision"] for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert asked.count(precision) == (3 if kept else 1)


def test_statistics_of_8_bit_activations_are_summed_in_float32() -> None:
    params, x = {"w": normal(6, 5)}, normal(300, 6, seed=1)
    adapter = adapted(params, {"w": "io"})
    apply = lambda params, x: USES["Dense"].call(params["w"], x, E4M3, jnp.bfloat16)  # noqa: E731
    seen = lj.starts.activations(apply, params, adapter, x)["w"]
    rounded = np.asarray(x.astype(E4M3), np.float64)
    assert_near(seen.gram[0], rounded.T @ rounded, 1e-5)
    assert seen.count[0] == 300


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((E4M3,), jnp.bfloat16),
        ((E4M3, E5M2), jnp.bfloat16),
        ((E4M3, jnp.float32), jnp.float32),
        ((E5M2, jnp.float16), jnp.float32),
        ((jnp.int4, jnp.bfloat16), jnp.bfloat16),
        ((jnp.int8, jnp.float16), jnp.float16),
        ((jnp.bfloat16, jnp.float16), jnp.float32),
    ],
)
def test_widest_returns_a_dtype_of_at_least_16_bits(dtypes: Any, expected: Any) -> None:
    assert widest(*dtypes) == expected


# Bases in few bits


def merge_error(params: Any, adapter: Any) -> str:
    with pytest.raises(lj.MergeError) as caught:
        lj.merge(params, adapter)
    return str(caught.value)


def rank_one(size: float) -> Any:
    """Adds `size` to every element of a kernel of 4 × 4."""
    return {"w": lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=jnp.full((4, 1), size), b=jnp.ones((1, 4)))}


@pytest.mark.parametrize("container", [jnp.asarray, np.asarray])
@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(E4M3, 448), (E5M2, 57344), (jnp.float8_e4m3b11fnuz, 30), (jnp.float4_e2m1fn, 6), (jnp.float16, 65504)],
)
def test_a_merge_rounds_within_the_range_of_the_dtype_and_raises_beyond(
    dtype: Any, largest: float, container: Any
) -> None:
    params = {"w": container(np.full((4, 4), largest).astype(dtype))}
    eps = float(jnp.finfo(dtype).eps)
    merged = lj.merge(params, rank_one(-0.9 * largest))["w"]
    assert merged.dtype == dtype and type(merged) is type(params["w"])
    assert_near(merged, jnp.full((4, 4), 0.1 * largest), 2 * max(eps, 0.1))
    near = lj.merge(params, rank_one(largest * eps / 8))["w"]  # rounded to the largest value
    np.testing.assert_array_equal(np.asarray(near, np.float64), np.full((4, 4), largest))
    assert merge_error(params, rank_one(largest)) == (
        f"Expected merged leaves to fit their dtype; 1 overflow.\n"
        f"  'w': {2 * largest:.6g} in {jnp.dtype(dtype).name}, whose largest value is {jnp.finfo(dtype).max}\n"
        "  Cast the base to a wider dtype before merging, such as bfloat16 or float32."
    )


def test_an_initialization_that_overflows_the_base_is_an_error() -> None:
    # PiSSA subtracts one of two equal singular values, so that an element of the residual may grow.
    w = 440 * jnp.array([[1.0, 1.0, 1.0, -1.0], [1.0, 1.0, -1.0, 1.0], [1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, 1.0]])
    params = {"w": w.astype(E4M3)}
    adapter = lj.init(jax.random.key(0), params, {"w": lj.LoRA(rank=1, alpha=1)})
    with pytest.raises(lj.AdapterError, match="`W0 - s·A·B` to be finite in the dtype of each kernel; 1 overflow"):
        lj.starts.olora(params, {"w": lj.Adapter(lj.LoRA(rank=1, alpha=-3), "io", **adapter["w"].arrays)})


@pytest.mark.parametrize("dtype", [jnp.int4, jnp.int8])
def test_an_integer_kernel_is_refused(dtype: Any) -> None:
    params = {"w": jnp.ones((4, 4), dtype)}
    with pytest.raises(lj.SpecError, match="not floating-point"):
        lj.init(jax.random.key(0), params, {"w": lj.LoRA(rank=1, alpha=1)})
    for call in (lj.merge, lambda params, adapter: lj.lora(lambda p: p["w"])(params, adapter)):
        with pytest.raises(lj.AdapterError, match=f"'w' has dtype {jnp.dtype(dtype).name}; an adapter needs"):
            call(params, rank_one(1.0))
