"""The rules for contractions, convolutions and moves, against merged kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from law import Case, adapted, assert_case, assert_law, normal

import lora_jax as lj
from lora_jax.testing import shapes_made

# Contractions


class Contraction:
    """Any `dot_general` of a kernel and an `x`."""

    def __init__(self, draw: Any) -> None:
        rest = st.lists(st.sampled_from("bio"), max_size=2)
        self.roles = "".join(draw(rest.flatmap(lambda roles: st.permutations(["i", "o", *roles]))))
        size = st.integers(1, 3)
        self.kernel = [draw(size) for _ in self.roles]
        uses = [draw(st.sampled_from(["summed", "batch", "free"])) for _ in self.roles]
        # An axis of x is the number of an axis of the kernel, or negative.
        own = {-1 - number: draw(size) for number in range(draw(st.integers(0, 2)))}
        met = [axis for axis, use in enumerate(uses) if use != "free"]
        x_axes = draw(st.permutations([*met, *own]))
        self.x = [own[axis] if axis < 0 else self.kernel[axis] for axis in x_axes]
        self.kernel_first = draw(st.booleans())
        self.dimension_numbers = []
        for kind in ("summed", "batch"):
            kernel_axes = draw(st.permutations([axis for axis, use in enumerate(uses) if use == kind]))
            positions = [x_axes.index(axis) for axis in kernel_axes]
            self.dimension_numbers.append((kernel_axes, positions) if self.kernel_first else (positions, kernel_axes))
        pairs = [("float64", "float64"), ("float32", "float32"), ("float32", "bfloat16")]
        self.dtypes = draw(st.sampled_from(pairs))
        wide = "float64" if "float64" in self.dtypes else "float32"
        self.preferred = draw(st.sampled_from([None, wide]))
        self.precision = draw(st.sampled_from([None, lax.Precision.HIGHEST, ("default", "highest")]))

    def __repr__(self) -> str:
        return f"Contraction({vars(self)})"

    @property
    def rank(self) -> int:
        def width(role: str) -> int:
            return math.prod(size for size, letter in zip(self.kernel, self.roles, strict=True) if letter == role)

        return min(2, width("i"), width("o"))

    def apply(self, params: Any, x: jax.Array) -> jax.Array:
        operands = (params["w"], x) if self.kernel_first else (x, params["w"])
        return lax.dot_general(
            *operands, self.dimension_numbers, precision=self.precision, preferred_element_type=self.preferred
        )


@given(st.composite(Contraction)())
def test_any_contraction_matches_the_merged_kernel(case: Contraction) -> None:
    w_dtype, x_dtype = case.dtypes
    with jax.enable_x64(True):
        params = {"w": normal(*case.kernel, dtype=w_dtype)}
        adapter = adapted(params, {"w": case.roles}, rank=case.rank, dtype=w_dtype)
        # An x in bfloat16 is exact for both and does not reduce the precision of the result.
        assert_law(case.apply, params, adapter, normal(*case.x, seed=1, dtype=x_dtype), dtype=w_dtype)


def einsum(equation: str, w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, w)


# Contractions of models: the equation, the shapes of the kernel and of x, and the axes of the kernel.
EINSUMS = {
    equation: Case(functools.partial(einsum, equation), kernel, [x], roles, axes)
    for equation, kernel, x, roles, axes in [
        ("...d,df->...f", (4, 5), (2, 3, 4), "io", None),
        ("btd,dhk->bthk", (4, 2, 3), (2, 3, 4), "ioo", None),
        ("btd,dhk->bhtk", (4, 2, 3), (2, 3, 4), "ioo", None),
        ("bthk,hkd->btd", (2, 4, 5), (2, 3, 2, 4), "iio", None),
        ("btd,cdhk->cbthk", (3, 4, 2, 3), (2, 3, 4), "oioo", None),
        ("btd,vd->btv", (5, 4), (2, 3, 4), "oi", None),
        ("etd,edf->etf", (2, 4, 5), (2, 3, 4), "bio", None),
        ("td,edf->etf", (2, 4, 5), (3, 4), "oio", "bio"),
        ("etd,edf->tf", (2, 4, 5), (2, 3, 4), "iio", "bio"),
        ("btf,df->btd", (4, 5), (2, 3, 5), "oi", "io"),
        ("bd,df->bdf", (4, 5), (2, 4), "bo", "io"),
        ("b,df->bdf", (4, 5), (3,), "oo", "io"),
        ("df,df->", (4, 5), (4, 5), "ii", "io"),
    ]
}
CONTRACTIONS = EINSUMS | {
    "kernel on the left": Case(lambda w, x: w @ x.T, (5, 4), [(3, 4)], "oi"),
    "vector": Case(lambda w, x: x @ w, (4, 5), [(4,)], "io"),
    "transposed by hand": Case(lambda w, x: x @ w.T, (5, 4), [(3, 4)], "oi"),
    "twice": Case(lambda w, x: jnp.tanh(x @ w) @ w.T, (4, 5), [(3, 4)], "io"),
    "tensordot over two axes": Case(lambda w, x: jnp.tensordot(x, w, 2), (4, 2, 5), [(3, 4, 2)], "iio"),
    "integer x": Case(lambda w, x: x @ w, (3, 5), [[[1, 2, 3]]], "io"),
}


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_contractions_of_models_match_the_merged_kernel(name: str) -> None:
    assert_case(CONTRACTIONS[name])


@pytest.mark.parametrize("precision", [lax.Precision.HIGHEST, lax.DotAlgorithmPreset.F32_F32_F32])
def test_low_rank_products_have_the_precision_of_the_base(precision: Any) -> None:
    case = Case(lambda w, x: lax.dot(x, w, precision=precision), (4, 5), [(3, 4)], "io")
    jaxpr = jax.make_jaxpr(lj.lora(case.apply, form="factored"))(case.params, case.adapter, *case.arrays)
    dots = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert len(dots) == 3
    assert len({str(eqn.params["precision"]) for eqn in dots}) == 1


# Convolutions


def convolution(**options: Any) -> Callable[..., Any]:
    return lambda w, x: lax.conv_general_dilated(x, w, **options)


NHWC = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
CONVOLUTIONS = {
    "plain": Case(convolution(window_strides=(1, 1), padding="SAME", **NHWC), (3, 2, 3, 4), [(2, 5, 4, 3)], "iiio"),
    "strided": Case(convolution(window_strides=(2, 3), padding="VALID", **NHWC), (3, 2, 3, 4), [(2, 7, 8, 3)], "iiio"),
    "padded, also by negative amounts": Case(
        convolution(window_strides=(1, 1), padding=((2, 1), (-1, 0)), **NHWC), (3, 2, 3, 4), [(2, 5, 4, 3)], "iiio"
    ),
    "dilated window": Case(
        convolution(window_strides=(1, 2), padding="SAME", rhs_dilation=(2, 3), **NHWC),
        (3, 2, 3, 4),
        [(2, 7, 6, 3)],
        "iiio",
    ),
    "dilated input": Case(
        convolution(window_strides=(2, 1), padding=((1, 1), (0, 3)), lhs_dilation=(2, 3), **NHWC),
        (3, 2, 3, 4),
        [(2, 5, 4, 3)],
        "iiio",
    ),
    "one axis, channels first": Case(
        convolution(window_strides=(1,), padding="SAME", dimension_numbers=("NCH", "OIH", "NCH")),
        (4, 3, 3),
        [(2, 3, 7)],
        "oii",
    ),
    "two axes, channels first": Case(
        convolution(window_strides=(1, 2), padding="SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")),
        (4, 3, 2, 3),
        [(2, 3, 5, 4)],
        "oiii",
    ),
    "an order nobody would choose": Case(
        convolution(window_strides=(1, 2), padding="VALID", dimension_numbers=("CWNH", "HOWI", "HCWN")),
        (3, 4, 2, 3),
        [(3, 5, 2, 6)],
        "ioii",
    ),
    "three axes": Case(
        convolution(
            window_strides=(1, 2, 1),
            padding="SAME",
            rhs_dilation=(1, 1, 2),
            dimension_numbers=("NHWDC", "HWDIO", "NHWDC"),
        ),
        (2, 2, 3, 2, 3),
        [(2, 3, 4, 3, 2)],
        "iiiio",
    ),
    "no window": Case(
        convolution(window_strides=(), padding=(), dimension_numbers=("NC", "IO", "NC")), (3, 4), [(2, 3)], "io"
    ),
    "transposed": Case(
        lambda w, x: lax.conv_transpose(x, w, (2, 3), "SAME", rhs_dilation=(1, 2)), (3, 2, 3, 4), [(2, 4, 3, 3)], "iiio"
    ),
    "of a batch by vmap": Case(
        lambda w, x: jax.vmap(lambda x: lax.conv(x[None], w, (1, 1), "SAME")[0])(x),
        (4, 3, 2, 3),
        [(2, 3, 5, 4)],
        "oiii",
    ),
    "with a kernel transposed by hand": Case(
        lambda w, x: lax.conv(x, w.transpose(3, 2, 0, 1), (1, 1), "SAME"), (2, 3, 3, 4), [(2, 3, 5, 4)], "iiio"
    ),
    "of a layer taken from a stack": Case(
        lambda w, x: lax.conv(lax.conv(x, w[0], (1, 1), "SAME"), w[1], (1, 1), "SAME"),
        (2, 3, 3, 2, 3),
        [(2, 3, 5, 4)],
        "boiii",
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_matches_the_merged_kernel(name: str) -> None:
    assert_case(CONVOLUTIONS[name])


# Moves: each followed by a contraction

MOVES = {
    "transpose": Case(lambda w, x: jnp.einsum("bi,koi->bko", x, w.transpose(2, 1, 0)), (4, 5, 2), [(3, 4)], "ioo"),
    "split of the input": Case(
        lambda w, x: jnp.einsum("bhk,hko->bo", x, w.reshape(2, 3, 5)), (6, 5), [(3, 2, 3)], "io"
    ),
    "split of the output": Case(lambda w, x: jnp.einsum("bi,ihk->bhk", x, w.reshape(4, 2, 3)), (4, 6), [(3, 4)], "io"),
    "merge of inputs": Case(lambda w, x: x @ w.reshape(-1, 5), (2, 3, 5), [(3, 6)], "iio"),
    "merge of outputs": Case(lambda w, x: x @ w.reshape(4, -1), (4, 2, 3), [(3, 4)], "ioo"),
    "regrouping of inputs": Case(
        lambda w, x: jnp.einsum("bhk,hko->bo", x, w.reshape(3, 4, 5)), (6, 2, 5), [(3, 3, 4)], "iio"
    ),
    "axes of size 1, inserted and removed": Case(
        lambda w, x: x @ w.reshape(1, 4, 1, 5, 1).squeeze((0, 2)).reshape(4, 5), (4, 5), [(3, 4)], "io"
    ),
    "axes of size 1 of other roles": Case(lambda w, x: x @ w.reshape(4, 5), (1, 4, 1, 5), [(3, 4)], "bibo", "oibo"),
    "squeeze": Case(lambda w, x: x @ w.squeeze((0, 2)), (1, 4, 1, 5), [(3, 4)], "bibo", "iiio"),
    "expand_dims": Case(lambda w, x: jnp.einsum("bi,nio->nbo", x, jnp.expand_dims(w, 0)), (4, 5), [(3, 4)], "io"),
    "broadcast in front": Case(
        lambda w, x: jnp.einsum("nbi,nio->nbo", x, jnp.broadcast_to(w, (2, 4, 5))), (4, 5), [(2, 3, 4)], "io"
    ),
    "broadcast between": Case(
        lambda w, x: jnp.einsum("bi,ino->bno", x, jnp.broadcast_to(w[:, None], (4, 2, 5))), (4, 5), [(3, 4)], "io"
    ),
    "broadcast of an input of size 1": Case(
        lambda w, x: jnp.einsum("bik,iko->bo", x, jnp.broadcast_to(w, (4, 3, 5))), (4, 1, 5), [(3, 4, 3)], "iio"
    ),
    "repeat": Case(lambda w, x: x @ jnp.repeat(w, 2, axis=1), (4, 5), [(3, 4)], "io"),
    "slice with strides": Case(lambda w, x: x[:, ::2] @ w[::2, 1::3], (4, 5), [(3, 4)], "io"),
    "slice of a stack": Case(lambda w, x: jnp.einsum("lbi,lio->lbo", x, w[1:]), (3, 4, 5), [(2, 3, 4)], "bio"),
    "dynamic slice": Case(lambda w, x, i: x @ lax.dynamic_slice_in_dim(w, i, 2, axis=1), (4, 5), [(3, 4), 1], "io"),
    "dynamic slice, too far on": Case(
        lambda w, x, i: x @ lax.dynamic_slice_in_dim(w, i, 2, axis=0), (4, 5), [(3, 2), 9], "io"
    ),
    "dynamic slice, too far back": Case(
        lambda w, x, i: x @ lax.dynamic_slice_in_dim(w, i, 2, axis=0), (4, 5), [(3, 2), -9], "io"
    ),
    "a layer by constant": Case(lambda w, x: x @ w[1], (3, 4, 5), [(3, 4)], "bio"),
    "a layer by index": Case(lambda w, x, i: x @ w[i], (3, 4, 5), [(3, 4), 2], "bio"),
    "a layer by negative index": Case(lambda w, x, i: x @ w[i], (3, 4, 5), [(3, 4), -1], "bio"),
    "a layer too far back": Case(lambda w, x, i: x @ w[i], (3, 4, 5), [(3, 4), -4], "bio"),
    "layers one by one": Case(lambda w, x: sum(x @ layer for layer in w), (3, 4, 5), [(3, 4)], "bio"),
    "a column": Case(lambda w, x: x @ w[:, 2], (4, 5), [(3, 4)], "ib", "io"),
    "reversed": Case(lambda w, x: x @ jnp.flip(w), (4, 5), [(3, 4)], "io"),
    "layers reversed": Case(lambda w, x: jnp.einsum("lbi,lio->lbo", x, w[::-1]), (2, 4, 5), [(2, 3, 4)], "bio"),
    "rotated by 90 degrees": Case(lambda w, x: x @ jnp.rot90(w), (5, 4), [(3, 4)], "oi"),
    "split into parts": Case(lambda w, x: [x @ part for part in jnp.split(w, 3, 1)], (4, 6), [(3, 4)], "io"),
    "split into unequal parts of the input": Case(
        lambda w, x: [x[:, :4] @ part[:4] for part in jnp.split(w, (5,))], (9, 5), [(3, 4)], "io"
    ),
    "a part of the layers": Case(
        lambda w, x: jnp.einsum("lbi,lio->lbo", x, jnp.split(w, (1,))[1]), (3, 4, 5), [(2, 3, 4)], "bio"
    ),
    "padded with zeros": Case(lambda w, x: x @ jnp.pad(w, ((1, 0), (2, 3))), (3, 5), [(3, 4)], "io"),
    "padded with ones, cropped and dilated": Case(
        lambda w, x: x @ lax.pad(w, 1.0, ((-1, 0, 1), (2, -1, 2))), (4, 5), [(3, 6)], "io"
    ),
    "a layer more": Case(
        lambda w, x: jnp.einsum("lbi,lio->lbo", x, jnp.pad(w, ((0, 1), (0, 0), (0, 0)))), (1, 4, 5), [(2, 3, 4)], "bio"
    ),
    "behind a barrier": Case(
        lambda w, x: (lambda moved: moved[1] @ moved[0])(lax.optimization_barrier((w, x))), (4, 5), [(3, 4)], "io"
    ),
    "one row, reshaped": Case(lambda w, x: x + jnp.tanh(w[2:3].reshape(-1)), (4, 5), [(3, 5)], None, "io"),
    "copy": Case(lambda w, x: x @ jnp.array(w), (4, 5), [(3, 4)], "io"),
    "name": Case(lambda w, x: x @ checkpoint_name(w, "kernel"), (4, 5), [(3, 4)], "io"),
    "stop_gradient": Case(lambda w, x: x @ lax.stop_gradient(w), (4, 5), [(3, 4)], "io"),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_moved_kernel_matches_the_moved_merged_kernel(name: str) -> None:
    assert_case(MOVES[name])


def twice(w: jax.Array, axis: int) -> jax.Array:
    return jnp.concatenate([w, w / 2], axis)


class Moves:
    """A kernel, some moves, and a contraction at the end."""

    def __init__(self, draw: Any) -> None:
        rest = st.lists(st.sampled_from("bio"), max_size=1)
        self.roles = "".join(draw(rest.flatmap(lambda roles: st.permutations(["i", "o", *roles]))))
        self.kernel = [draw(st.sampled_from([1, 2, 4, 6])) for _ in self.roles]
        self.moves: list[tuple[Callable[..., jax.Array], tuple[Any, ...]]] = []
        axes = list(zip(self.roles, self.kernel, strict=True))
        for _ in range(draw(st.integers(1, 5))):
            axes = self._move(draw, axes)
        self.summed = sorted(draw(st.sets(st.sampled_from(range(len(axes)))))) if axes else []
        self.x = [2, *(axes[axis][1] for axis in self.summed)]

    def __repr__(self) -> str:
        moves = [f"{move.__name__}{args}" for move, args in self.moves]
        return f"Moves({self.roles!r}, {self.kernel}, {moves}, x={self.x}, summed={self.summed})"

    def _move(self, draw: Any, axes: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """Adds one move that is allowed for these axes, and returns the axes after it."""
        count = len(axes)
        # Axes of one role may be merged; an axis of size 1 has any role.
        merged = [
            at for at in range(count - 1) if axes[at][0] == axes[at + 1][0] or 1 in (axes[at][1], axes[at + 1][1])
        ]
        squeezed = [at for at, (_, size) in enumerate(axes) if size == 1]
        even = [at for at, (_, size) in enumerate(axes) if size % 2 == 0]
        kinds = ["transpose", "expand", "repeat", "copy", "slice", "dynamic", "scale", "flip", "roll", "pad", "twice"]
        kinds += ["merge"] * bool(merged) + ["squeeze"] * bool(squeezed) + ["split"] * bool(even)
        kind = draw(st.sampled_from(kinds if count > 1 else ["expand", "copy"]))
        at = draw(st.integers(0, count - 1)) if count else 0
        role, size = axes[at] if count else ("o", 1)
        match kind:
            case "transpose":
                order = draw(st.permutations(range(count)))
                self.moves.append((jnp.transpose, (tuple(order),)))
                return [axes[axis] for axis in order]
            case "expand":
                self.moves.append((jnp.expand_dims, (at,)))
                return [*axes[:at], ("o", 1), *axes[at:]]
            case "repeat":
                times = draw(st.integers(1, 2))
                new = [("o", times), *axes]
                self.moves.append((jnp.broadcast_to, (tuple(size for _, size in new),)))
                return new
            case "copy":
                self.moves.append((jnp.array, ()))
                return axes
            case "scale":
                self.moves.append((jnp.multiply, (draw(st.sampled_from([2.0, -0.5])),)))
                return axes
            case "flip" | "roll":
                self.moves.append((jnp.flip, (at,)) if kind == "flip" else (jnp.roll, (1, at)))
                return axes
            case "pad" | "twice":
                widths = [(int(axis == at), 0) for axis in range(count)]
                self.moves.append((jnp.pad, (widths,)) if kind == "pad" else (twice, (at,)))
                new = [*axes]
                new[at] = (role, size + 1 if kind == "pad" else 2 * size)
                return new
            case "slice":
                start, step = draw(st.integers(0, size - 1)), draw(st.integers(1, 2))
                self.moves.append((lax.slice_in_dim, (start, None, step, at)))
                new = [*axes]
                new[at] = (role, len(range(start, size, step)))
                return new
            case "dynamic":
                length = draw(st.integers(1, size))
                self.moves.append((lax.dynamic_slice_in_dim, (draw(st.integers(-8, 8)), length, at)))
                new = [*axes]
                new[at] = (role, length)
                return new
            case "merge":
                at = draw(st.sampled_from(merged))
                (one, left), (other, right) = axes[at : at + 2]
                new = [*axes[:at], (other if left == 1 else one, left * right), *axes[at + 2 :]]
            case "squeeze":
                at = draw(st.sampled_from(squeezed))
                self.moves.append((jnp.squeeze, (at,)))
                return [*axes[:at], *axes[at + 1 :]]
            case "split":
                at = draw(st.sampled_from(even))
                role, size = axes[at]
                parts = draw(st.sampled_from([(2, size // 2), (size // 2, 2)]))
                new = [*axes[:at], *((role, part) for part in parts), *axes[at + 1 :]]
        self.moves.append((jnp.reshape, (tuple(size for _, size in new),)))
        return new

    def apply(self, params: Any, x: jax.Array) -> jax.Array:
        w = params["w"]
        for move, args in self.moves:
            w = move(w, *args)
        return lax.dot_general(x, w, ((range(1, x.ndim), self.summed), ((), ())))


@settings(max_examples=25)
@given(st.composite(Moves)())
def test_any_moves_before_a_contraction_match_the_merged_kernel(case: Moves) -> None:
    params = {"w": normal(*case.kernel)}
    adapter = adapted(params, {"w": case.roles}, rank=1)
    assert_law(case.apply, params, adapter, normal(*case.x, seed=1))


def test_gradients_stop_at_stop_gradient() -> None:
    case = MOVES["stop_gradient"]
    gradient = jax.grad(lambda ad: jnp.sum(lj.lora(case.apply)(case.params, ad, *case.arrays)))(case.adapter)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


CASTS: dict[str, Callable[..., jax.Array]] = {
    "both to bfloat16": lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
    "down and up": lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float16).astype(jnp.float32),
    "in a product that accumulates in float32": lambda w, x: lax.dot(
        x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    ),
    "to fewer digits": lambda w, x: x.astype(jnp.bfloat16) @ lax.reduce_precision(w, 8, 7).astype(jnp.bfloat16),
    "of a lookup": lambda w, x: w.astype(jnp.bfloat16)[jnp.argmax(x, 1)],
    "of a convolution": lambda w, x: lax.conv_general_dilated(
        x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), (), (), dimension_numbers=("NC", "IO", "NC")
    ),
}


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_kernel_matches_the_cast_merged_kernel(name: str) -> None:
    assert_case(Case(CASTS[name], (4, 5), [(3, 4)], "io"), dtype="bfloat16")


def test_a_cast_does_not_change_the_dtype_of_the_factors() -> None:
    # A base stored in float16 and used in float32 does not reduce the precision of the adapter.
    case = Case(lambda w, x: x @ w.astype(jnp.float16).astype(jnp.float32), (4, 5), [(3, 4)], "io")
    case_without_w = case.params | {"w": jnp.zeros((4, 5))}
    exact = Case(lambda w, x: x @ w, (4, 5), [(3, 4)], "io")
    got = lj.lora(case.apply)(case_without_w, case.adapter, *case.arrays)
    assert (got == lj.lora(exact.apply)(case_without_w, case.adapter, *case.arrays)).all()


# Sharding constraints


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


SPECS = {
    "every axis": PartitionSpec("x", "y"),
    "the first axis": PartitionSpec("x"),
    "two on one axis": PartitionSpec(None, ("y", "x")),
    "one unconstrained axis": PartitionSpec(PartitionSpec.UNCONSTRAINED, "y"),
}


@pytest.mark.parametrize("under", ["NamedSharding", "set_mesh", "scan"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_constrained_kernel_matches_the_merged_kernel(spec: str, under: str) -> None:
    sharding = SPECS[spec] if under == "set_mesh" else NamedSharding(mesh(), SPECS[spec])

    def multiply(w: jax.Array, x: jax.Array) -> jax.Array:
        return x @ lax.with_sharding_constraint(w, sharding)

    def over_layers(w: jax.Array, x: jax.Array) -> jax.Array:
        return lax.scan(lambda carry, layer: (carry, multiply(layer, x)), 0, w)[1]

    case = Case(multiply, (8, 8), [(3, 8)], "io")
    if under == "scan":
        case = Case(over_layers, (2, 8, 8), [(3, 8)], "bio")
    with jax.set_mesh(mesh()):
        assert_case(case)


def test_a_constraint_on_a_kernel_constrains_the_factors() -> None:
    def constrain(w: jax.Array, x: jax.Array) -> jax.Array:
        spec = PartitionSpec(None, "x", PartitionSpec.UNCONSTRAINED)
        return jnp.einsum("bi,lio->lbo", x, lax.with_sharding_constraint(w, NamedSharding(mesh(), spec)))

    case = Case(constrain, (2, 8, 8), [(3, 8)], "oio", "bio")
    jaxpr = jax.make_jaxpr(lj.lora(case.apply))(case.params, case.adapter, *case.arrays)
    found = {
        eqn.outvars[0].aval.shape: (eqn.params["sharding"].spec, eqn.params["unconstrained_dims"])
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "sharding_constraint"
    }
    assert {shape: (tuple(spec)[: len(shape)], set(free)) for shape, (spec, free) in found.items()} == {
        (2, 8, 8): ((None, "x", PartitionSpec.UNCONSTRAINED), {2}),
        (2, 8, 2): ((None, "x", None), set()),
        (2, 2, 8): ((None, None, PartitionSpec.UNCONSTRAINED), {2}),
    }


# Layers of Flax

Roles = dict[str, str]


def sequence(*shape: int) -> jax.Array:
    return normal(*shape, seed=1)


LINEN: dict[str, tuple[nn.Module, jax.Array, Roles]] = {
    "DenseGeneral over two axes": (nn.DenseGeneral((2, 3), axis=(-2, -1)), sequence(2, 6, 3), {"kernel": "iioo"}),
    "DenseGeneral with a batch axis": (nn.DenseGeneral(3, batch_dims=(0,)), sequence(2, 6, 4), {"kernel": "bio"}),
    "Einsum": (nn.Einsum((2, 6, 3, 4), "...d,kdnh->...knh"), sequence(5, 6), {"kernel": "oioo"}),
    "Conv, circular": (nn.Conv(4, (3, 2), padding="CIRCULAR"), sequence(2, 5, 4, 3), {"kernel": "iiio"}),
    "Conv, causal": (nn.Conv(4, (3,), padding="CAUSAL", kernel_dilation=2), sequence(2, 6, 3), {"kernel": "iio"}),
    "Conv without a batch": (nn.Conv(4, (3, 2), strides=2), sequence(5, 4, 3), {"kernel": "iiio"}),
    "ConvTranspose": (nn.ConvTranspose(4, (3, 3), strides=(2, 2)), sequence(2, 4, 3, 3), {"kernel": "iiio"}),
    "ConvLocal": (nn.ConvLocal(4, (3,)), sequence(2, 6, 3), {"kernel": "bio"}),
    "MultiHeadDotProductAttention": (
        nn.MultiHeadDotProductAttention(num_heads=2),
        sequence(2, 5, 6),
        {"query/kernel": "ioo", "key/kernel": "ioo", "value/kernel": "ioo", "out/kernel": "iio"},
    ),
    "Embed": (nn.Embed(7, 6), jnp.array([[0, 6], [3, 3]]), {"embedding": "io"}),
    "Dense over examples": (
        nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(5),
        sequence(3, 4, 6),
        {"kernel": "bio"},
    ),
    "Dense, rematerialized, in a jit": (nn.jit(nn.remat(nn.Dense))(5), sequence(3, 6), {"kernel": "io"}),
}


@pytest.mark.parametrize("name", LINEN)
def test_a_layer_of_linen_matches_the_merged_kernel(name: str) -> None:
    module, x, roles = LINEN[name]
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: normal(*leaf.shape, seed=2, size=0.5), shapes)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return module.apply({"params": params}, x)

    found = lj.kernels(apply, params, x)
    assert {path: found[path].axes for path in roles} == roles
    assert_law(apply, params, adapted(params, roles), x)


NNX: dict[str, tuple[Callable[[nnx.Rngs], nnx.Module], Callable[..., Any], jax.Array, Roles]] = {
    "Embed": (lambda rngs: nnx.Embed(7, 6, rngs=rngs), lambda m, x: m(x), jnp.array([[0, 6]]), {"embedding": "io"}),
    "Embed, tied": (
        lambda rngs: nnx.Embed(7, 6, rngs=rngs),
        lambda m, x: m.attend(jnp.tanh(m(x))),
        jnp.array([[0, 6]]),
        {"embedding": "io"},
    ),
    "Conv": (lambda rngs: nnx.Conv(3, 4, (3,), rngs=rngs), lambda m, x: m(x), sequence(2, 6, 3), {"kernel": "iio"}),
    "Linear in nnx.jit and nnx.remat": (
        lambda rngs: nnx.Linear(6, 6, rngs=rngs),
        lambda m, x: nnx.jit(nnx.remat(lambda m, x: m(m(x))))(m, x),
        sequence(3, 6),
        {"kernel": "io"},
    ),
}


@pytest.mark.parametrize("name", NNX)
def test_a_layer_of_nnx_matches_the_merged_kernel(name: str) -> None:
    make, call, x, roles = NNX[name]
    graph, state = nnx.split(make(nnx.Rngs(0)))
    apply = lambda state, x: call(nnx.merge(graph, state), x)  # noqa: E731
    found = lj.kernels(apply, state, x)
    assert {path: found[path].axes for path in roles} == roles
    assert_law(apply, state, adapted(state, roles), x)


# Roles and shapes

ALL = {
    f"{kind}: {name}": case
    for kind, cases in {
        "contraction": CONTRACTIONS,
        "convolution": CONVOLUTIONS,
        "move": MOVES,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", ALL)
def test_kernels_finds_the_role_of_each_axis(name: str) -> None:
    case = ALL[name]
    assert lj.kernels(case.apply, case.params, *case.arrays)["w"].axes == case.roles


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_materializes_no_array_of_the_kernel_s_shape(name: str) -> None:
    case = CONVOLUTIONS[name]
    assert case.kernel not in shapes_made(lj.lora(case.apply, form="factored"), case.params, case.adapter, *case.arrays)
