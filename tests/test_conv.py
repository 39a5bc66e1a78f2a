"""Convolutions: groups, layouts, windows in either factor, and the layers of Flax."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import sweep
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from law import Case, adapted, assert_case, assert_law, normal

import lora_jax as lj
from lora_jax import starts, testing

NHWC = ("NHWC", "HWIO", "NHWC")


def convolution(**options: Any) -> Callable[..., Any]:
    return lambda w, x: lax.conv_general_dilated(x, w, **options)


def grouped(groups: int, *, strides: Any = (1, 1), padding: Any = "SAME", numbers: Any = NHWC, **options: Any) -> Any:
    return convolution(
        window_strides=strides, padding=padding, dimension_numbers=numbers, feature_group_count=groups, **options
    )


GROUPED = {
    "two groups": Case(grouped(2), (3, 2, 3, 6), [(2, 5, 4, 6)], "iiio"),
    "three groups, strided": Case(grouped(3, strides=(2, 3)), (3, 2, 2, 9), [(2, 7, 8, 6)], "iiio"),
    "two groups, dilated": Case(
        grouped(2, padding=((2, 1), (-1, 4)), lhs_dilation=(1, 3), rhs_dilation=(2, 1)),
        (3, 2, 3, 6),
        [(2, 5, 4, 6)],
        "iiio",
    ),
    "two groups, channels first": Case(
        grouped(2, numbers=("NCHW", "OIHW", "NCHW")), (6, 3, 3, 2), [(2, 6, 5, 4)], "oiii"
    ),
    "two groups, an order nobody would choose": Case(
        grouped(2, padding="VALID", numbers=("CWNH", "HOWI", "HCWN")), (3, 6, 2, 3), [(6, 5, 2, 6)], "ioii"
    ),
    "two groups, one axis": Case(
        grouped(2, strides=(2,), numbers=("NHC", "HIO", "NHC")), (3, 3, 6), [(2, 7, 6)], "iio"
    ),
    "two groups, three axes": Case(
        grouped(2, strides=(1, 2, 1), numbers=("NHWDC", "HWDIO", "NHWDC")),
        (2, 2, 3, 2, 6),
        [(2, 3, 4, 3, 4)],
        "iiiio",
    ),
    "two groups, no window": Case(
        grouped(2, strides=(), padding=(), numbers=("NC", "IO", "NC")), (3, 6), [(2, 6)], "io"
    ),
    "depthwise": Case(grouped(6), (3, 2, 1, 6), [(2, 5, 4, 6)], "iiio"),
    "depthwise, three outputs a channel": Case(grouped(3, strides=(2, 1)), (3, 2, 1, 9), [(2, 5, 4, 3)], "iiio"),
    "two groups, of a batch by vmap": Case(
        lambda w, x: jax.vmap(lambda x: grouped(2)(w, x))(x), (3, 2, 3, 6), [(2, 1, 5, 4, 6)], "iiio"
    ),
    "two groups, of a layer of a stack": Case(
        lambda w, x: lax.scan(lambda x, w: (grouped(2)(w, x), None), x, w)[0], (2, 3, 2, 3, 6), [(1, 5, 4, 6)], "biiio"
    ),
    "two groups, in remat in jit": Case(
        lambda w, x: jax.jit(jax.checkpoint(grouped(2)))(w, x), (3, 2, 3, 6), [(2, 5, 4, 6)], "iiio"
    ),
}


def separable(w: jax.Array, x: jax.Array) -> jax.Array:
    """Keras's depthwise step: a kernel (height, width, channels, multiplier) that the model converts to groups."""
    channels = w.shape[2]
    return grouped(channels)(w.reshape(*w.shape[:2], 1, channels * w.shape[3]), x)


# Axes of size 1 that the model inserts or merges have no role.
ONES = {
    "Keras' depthwise": Case(separable, (3, 2, 6, 1), [(2, 5, 4, 6)], "iioo"),
    "Keras' depthwise, two outputs a channel": Case(separable, (3, 2, 3, 2), [(2, 5, 4, 3)], "iioo"),
    "Keras' depthwise, the multiplier a batch": Case(separable, (3, 2, 6, 1), [(2, 5, 4, 6)], "iioo", "iiob"),
    "Keras' depthwise, the multiplier an input": Case(separable, (3, 2, 6, 1), [(2, 5, 4, 6)], "iioo", "iioi"),
    "depthwise, squeezed and expanded": Case(
        lambda w, x: grouped(6)(w[..., 0][:, :, None], x), (3, 2, 6, 1), [(2, 5, 4, 6)], "iiob"
    ),
    "depthwise, one more axis merged": Case(
        lambda w, x: grouped(6)(w.reshape(3, 2, 1, 6), x), (3, 2, 1, 6, 1), [(2, 5, 4, 6)], "iiioo", "iiboo"
    ),
    "two groups, of a stack of one": Case(
        lambda w, x: grouped(2)(w.reshape(3, 2, 3, 6), x), (1, 3, 2, 3, 6), [(2, 5, 4, 6)], "biiio"
    ),
    "one axis as two": Case(lambda w, x: grouped(1)(w[None], x), (3, 4, 5), [(2, 5, 4, 4)], "iio"),
    "Dense as a convolution": Case(lambda w, x: grouped(1)(w[None, None], x), (4, 5), [(2, 3, 4, 4)], "io"),
    "Dense with an axis between": Case(
        lambda w, x: jnp.einsum("td,dxf->txf", x, w.reshape(4, 1, 5)), (4, 5), [(3, 4)], "io"
    ),
    "Dense with an axis that is summed": Case(
        lambda w, x: jnp.einsum("tdx,dxf->tf", x, w[:, None]), (4, 5), [(3, 4, 1)], "io"
    ),
}

# The adapter may have other axes, as long as no factor has both a window axis and an output axis.
OTHERWISE = {
    f"{''.join(roles)}, {groups} groups": Case(
        grouped(groups, strides=(2, 1), padding=((2, 1), (-1, 3)), lhs_dilation=(1, 3), rhs_dilation=(2, 1)),
        (3, 2, 3, 6),
        [(2, 5, 4, 3 * groups)],
        "iiio",
        "".join(roles),
    )
    for *roles, groups in [(*window, *channels, groups) for window in itertools.product("io", repeat=2)
                           for channels in ("io", "oi") for groups in (1, 2)]
}  # fmt: skip
CASES = GROUPED | ONES | OTHERWISE


@pytest.mark.parametrize("name", CASES)
def test_a_convolution_matches_the_merged_kernel(name: str) -> None:
    assert_case(CASES[name])


@pytest.mark.parametrize("name", GROUPED | ONES)
def test_kernels_finds_the_role_of_each_axis(name: str) -> None:
    case = CASES[name]
    assert lj.kernels(case.apply, case.params, *case.arrays)["w"].axes == case.roles


@pytest.mark.parametrize("name", CASES)
def test_explain_counts_the_flops_of_the_factors(name: str) -> None:
    case = CASES[name]
    total_flops = testing.flops(lj.lora(case.apply, form="factored"), case.params, case.adapter, *case.arrays)
    base = testing.flops(case.apply, case.params, *case.arrays)
    (row,) = lj.explain(case.apply, case.params, case.adapter, *case.arrays, form="factored").rows
    assert row.flops == total_flops - base


@pytest.mark.parametrize("name", CASES)
def test_no_array_of_the_kernel_s_shape_is_materialized(name: str) -> None:
    case = CASES[name]
    assert case.kernel not in testing.shapes_made(
        lj.lora(case.apply, form="factored"), case.params, case.adapter, *case.arrays
    )


@pytest.mark.parametrize("name", ["two groups", "depthwise", "oiio, 2 groups"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_grouped_convolution_keeps_its_dtype(dtype: str, name: str) -> None:
    case = CASES[name]
    with jax.enable_x64(True):
        params = {"w": normal(*case.kernel, dtype=dtype)}
        (x,) = case.arrays
        adapter = adapted(params, {"w": case.axes or case.roles}, dtype=dtype)
        assert_law(case.apply, params, adapter, x.astype(dtype))


class Convolution:
    """Any convolution of a kernel."""

    def __init__(self, draw: Any) -> None:
        spatial = draw(st.integers(0, 2))
        size = st.integers(1, 3)
        self.groups = draw(st.integers(1, 3))
        out = self.groups * draw(st.integers(1, 2))
        its_in = draw(size)
        lhs_spec, rhs_spec, out_spec = (draw(st.permutations(range(spatial + 2))) for _ in range(3))
        self.numbers = lax.ConvDimensionNumbers(*map(tuple, (lhs_spec, rhs_spec, out_spec)))
        per_axis = lambda strategy: [draw(strategy) for _ in range(spatial)]  # noqa: E731
        self.strides, self.input_dilation, self.dilation = (
            per_axis(size),
            per_axis(st.integers(1, 2)),
            per_axis(st.integers(1, 2)),
        )
        self.padding = per_axis(st.tuples(st.integers(-1, 2), st.integers(0, 2)))
        self.x, self.kernel, self.roles = [0] * (spatial + 2), [0] * (spatial + 2), [""] * (spatial + 2)
        for place, axis in enumerate(lhs_spec):
            self.x[axis] = (draw(size), its_in * self.groups)[place] if place < 2 else draw(st.integers(6, 8))
        channels = draw(st.sampled_from(["io", "oi"]))
        for place, axis in enumerate(rhs_spec):
            self.kernel[axis] = (out, its_in)[place] if place < 2 else draw(size)
            self.roles[axis] = channels[place] if place < 2 else draw(st.sampled_from("io"))

    def __repr__(self) -> str:
        return f"Convolution({vars(self)})"

    def apply(self, params: Any, x: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            params["w"],
            self.strides,
            self.padding,
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.dilation,
            dimension_numbers=self.numbers,
            feature_group_count=self.groups,
        )


@given(st.composite(Convolution)())
def test_any_convolution_matches_the_merged_kernel(case: Convolution) -> None:
    with jax.enable_x64(True):
        params = {"w": normal(*case.kernel, dtype="float64")}
        adapter = adapted(params, {"w": "".join(case.roles)}, rank=1, dtype="float64")
        assert_law(case.apply, params, adapter, normal(*case.x, seed=1, dtype="float64"))


def test_a_vmap_over_kernels_shares_the_factor_of_the_input() -> None:
    # JAX converts it to groups: the kernels are concatenated along the output.
    case = Case(lambda w, x: jax.vmap(grouped(1))(w, x), (2, 3, 2, 3, 5), [(2, 1, 5, 4, 3)], "oiiio")
    assert lj.kernels(case.apply, case.params, *case.arrays)["w"].axes == case.roles
    assert_case(case)
    assert_case(Case(lambda w, x: jax.vmap(grouped(2))(w, x), (2, 3, 2, 3, 4), [(2, 1, 5, 4, 6)], "oiiio"))
    assert_case(Case(lambda w, x: jax.vmap(grouped(1), (0, None))(w, x), (2, 3, 2, 3, 5), [(1, 5, 4, 3)], "oiiio"))


# Layers of Flax

PADDINGS = ["SAME", "VALID", "CIRCULAR", "REFLECT", 1, ((2, 1), (0, 3))]
LINEN: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "Conv, one axis, causal": (nn.Conv(4, (3,), padding="CAUSAL", kernel_dilation=2), (2, 6, 3), "iio"),
    "Conv, causal, in groups": (nn.Conv(4, 3, padding="CAUSAL", feature_group_count=2), (2, 6, 4), "iio"),
    "Conv, three axes": (nn.Conv(4, (2, 3, 2), strides=(1, 2, 1)), (2, 3, 5, 4, 2), "iiiio"),
    "Conv, input dilation": (nn.Conv(4, (3, 2), padding=1, input_dilation=(2, 3)), (2, 4, 3, 3), "iiio"),
    "Conv, depthwise": (nn.Conv(6, (3, 3), feature_group_count=6, strides=2), (2, 5, 4, 6), "iiio"),
    "Conv, depthwise, twice the channels": (nn.Conv(6, (3, 3), feature_group_count=3), (2, 5, 4, 3), "iiio"),
    "Conv without a batch": (nn.Conv(6, (3, 2), feature_group_count=3), (5, 4, 6), "iiio"),
    "Conv with two axes of batch": (nn.Conv(4, (3, 2)), (2, 2, 5, 4, 3), "iiio"),
    "ConvTranspose, dilated": (nn.ConvTranspose(4, (3, 2), (2, 3), kernel_dilation=(1, 2)), (2, 4, 3, 3), "iiio"),
    "ConvTranspose, one axis": (nn.ConvTranspose(4, (3,), (2,), padding="VALID"), (2, 5, 3), "iio"),
    "ConvTranspose, three axes": (nn.ConvTranspose(4, (2, 3, 2), (1, 2, 1)), (2, 3, 4, 3, 2), "iiiio"),
    "ConvLocal": (nn.ConvLocal(4, (3, 2), strides=(2, 1)), (2, 6, 4, 3), "bbio"),
} | {
    f"{layer.__name__}, padding {padding}": (layer(4, (3, 2), strides=(2, 1), padding=padding), (2, 6, 5, 3), "iiio")
    for layer in (nn.Conv, nn.ConvTranspose)
    for padding in PADDINGS
    if not (layer is nn.ConvTranspose and padding == "REFLECT")
}


@pytest.mark.parametrize("name", LINEN)
def test_a_layer_of_linen_matches_the_merged_kernel(name: str) -> None:
    module, shape, roles = LINEN[name]
    assert_layer(lambda params, x: module.apply({"params": params}, x), linen_params(module, shape), shape, roles)


def linen_params(module: nn.Module, shape: tuple[int, ...]) -> Any:
    return random_params(
        jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))["params"]
    )


def random_params(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: normal(*leaf.shape, seed=2, size=0.5), shapes)


def assert_layer(apply: Any, params: Any, shape: tuple[int, ...], roles: str) -> None:
    x = normal(*shape, seed=1)
    assert lj.kernels(apply, params, x)["kernel"].axes == roles
    assert_law(apply, params, adapted(params, {"kernel": roles}), x)


NNX: dict[str, tuple[Callable[[nnx.Rngs], nnx.Module], tuple[int, ...], str]] = {
    "Conv, in groups": (
        lambda rngs: nnx.Conv(6, 4, (3, 2), strides=2, feature_group_count=2, rngs=rngs),
        (2, 5, 4, 6),
        "iiio",
    ),
    "Conv, depthwise, circular": (
        lambda rngs: nnx.Conv(4, 4, (3,), feature_group_count=4, padding="CIRCULAR", rngs=rngs),
        (2, 6, 4),
        "iio",
    ),
    "Conv, reflected": (lambda rngs: nnx.Conv(3, 4, (3, 3), padding="REFLECT", rngs=rngs), (2, 5, 4, 3), "iiio"),
    "Conv, causal": (lambda rngs: nnx.Conv(3, 4, 3, padding="CAUSAL", kernel_dilation=2, rngs=rngs), (2, 6, 3), "iio"),
    "Conv, input dilation": (
        lambda rngs: nnx.Conv(3, 4, (3, 2), padding=1, input_dilation=2, rngs=rngs),
        (2, 4, 3, 3),
        "iiio",
    ),
    "ConvTranspose": (lambda rngs: nnx.ConvTranspose(3, 4, (3, 2), strides=(2, 3), rngs=rngs), (2, 4, 3, 3), "iiio"),
    "ConvTranspose, circular": (
        lambda rngs: nnx.ConvTranspose(3, 4, (3,), strides=2, padding="CIRCULAR", rngs=rngs),
        (2, 5, 3),
        "iio",
    ),
}


@pytest.mark.parametrize("name", NNX)
def test_a_layer_of_nnx_matches_the_merged_kernel(name: str) -> None:
    make, shape, roles = NNX[name]
    graph, state = nnx.split(make(nnx.Rngs(0)))
    assert_layer(lambda state, x: nnx.merge(graph, state)(x), random_params(state), shape, roles)


# Transposed kernels: reversed, with input and output exchanged

TRANSPOSED: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "one axis": (nn.ConvTranspose(4, (3,), (2,), transpose_kernel=True), (2, 5, 3), "ioi"),
    "two axes": (nn.ConvTranspose(4, (3, 2), (2, 3), transpose_kernel=True), (2, 4, 3, 3), "iioi"),
    "two axes, dilated": (
        nn.ConvTranspose(4, (3, 2), kernel_dilation=(1, 2), padding="VALID", transpose_kernel=True),
        (2, 5, 4, 3),
        "iioi",
    ),
    "circular": (
        nn.ConvTranspose(4, (6, 6), (2, 2), padding="CIRCULAR", transpose_kernel=True),
        (2, 6, 6, 3),
        "iioi",
    ),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_transposed_layer_of_linen_matches_the_merged_kernel(name: str) -> None:
    module, shape, roles = TRANSPOSED[name]
    assert_layer(lambda params, x: module.apply({"params": params}, x), linen_params(module, shape), shape, roles)


def test_a_transposed_layer_of_nnx_matches_the_merged_kernel() -> None:
    layer = nnx.ConvTranspose(3, 4, (3, 2), strides=(2, 3), transpose_kernel=True, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    assert_layer(lambda state, x: nnx.merge(graph, state)(x), random_params(state), (2, 4, 3, 3), "iioi")


def test_a_convolution_inside_a_gradient_matches_the_merged_kernel() -> None:
    def energy(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(grouped(1, strides=(2, 1))(w, x)))

    assert_case(Case(lambda w, x: jax.grad(energy, 1)(w, x), (3, 2, 3, 4), [(2, 5, 4, 3)], "iiio"))


ROW = Case(lambda w, x: jnp.einsum("td,xd->tx", x, w.reshape(1, 4)), (4, 1), [(3, 4)], "io")


@pytest.mark.parametrize("variant", [sweep(lj.LoRA), lj.DoRA])
@pytest.mark.parametrize("name", [*ONES, "one output as a row"])
def test_axes_of_size_1_have_no_role_for_a_gain(name: str, variant: Any) -> None:
    case = ONES.get(name, ROW)
    variant = variant(rank=1, alpha=3, axes=case.axes or case.roles)
    adapter = lj.init(jax.random.key(0), case.params, {"w": variant})
    adapter = jax.tree.map(lambda leaf: leaf + normal(*leaf.shape, seed=7, size=0.1), adapter)
    assert_law(case.apply, case.params, adapter, *case.arrays)


@pytest.mark.parametrize("multiplier", [1, 2])
def test_a_depthwise_kernel_can_be_initialized_from_activations(multiplier: int) -> None:
    params, x = {"w": normal(3, 2, 4, multiplier)}, normal(2, 5, 4, 4, seed=1)
    apply = lambda p, x: separable(p["w"], x)  # noqa: E731
    adapter = lj.init(jax.random.key(0), params, {"w": lj.LoRA(rank=2, alpha=4)}, kernels=lj.kernels(apply, params, x))
    seen = starts.activations(apply, params, adapter, x)["w"]
    windows = jnp.stack(
        [jnp.pad(x, ((0, 0), (1, 1), (0, 1), (0, 0)))[:, i : i + 5, j : j + 4] for i in range(3) for j in range(2)]
    )
    flat = windows.reshape(6, -1)
    np.testing.assert_allclose(seen.gram[0], flat @ flat.T, rtol=1e-4)
    assert float(seen.count[0]) == flat.shape[1]


def test_merging_input_and_output_axes_larger_than_1_is_an_error() -> None:
    case = Case(separable, (3, 2, 3, 2), [(2, 5, 4, 3)], "iioo", "iiio")
    with pytest.raises(lj.UnsupportedError, match="merges axes with the roles 'io'"):
        lj.lora(case.apply)(case.params, case.adapter, *case.arrays)
