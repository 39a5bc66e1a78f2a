"""Products of two adapted kernels materialize neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from law import adapted, assert_close, assert_law, normal

import lora_jax as lj
from lora_jax.testing import shapes_made


class Pair(NamedTuple):
    """A function of kernels: `call(params, x)`, and the shapes and axes of the kernels."""

    call: Callable[[Any, jax.Array], Any]
    shapes: dict[str, tuple[int, ...]]
    roles: dict[str, str]
    x: tuple[int, ...] = (3, 4)

    @property
    def params(self) -> dict[str, jax.Array]:
        return {path: normal(*shape, seed=number) for number, (path, shape) in enumerate(self.shapes.items())}

    @property
    def adapter(self) -> Any:
        return adapted(self.params, self.roles)


TWO = {"one": (4, 5), "two": (5, 6)}
IO = {"one": "io", "two": "io"}
PAIRS = {
    "one after the other": Pair(lambda p, x: x @ (p["one"] @ p["two"]), TWO, IO),
    "one after the other, of other roles": Pair(
        lambda p, x: x @ (p["one"] @ p["two"]), TWO, {"one": "oi", "two": "oi"}
    ),
    "one against the other": Pair(
        lambda p, x: x @ (p["one"] @ p["two"].T), {"one": (4, 5), "two": (6, 5)}, {"one": "io", "two": "oi"}
    ),
    "with itself": Pair(lambda p, x: x @ (p["w"] @ p["w"]), {"w": (4, 4)}, {"w": "io"}),
    "times the transpose": Pair(lambda p, x: x @ (p["w"] @ p["w"].T), {"w": (4, 5)}, {"w": "io"}),
    "the transpose times the kernel": Pair(lambda p, x: x @ (p["w"].T @ p["w"]), {"w": (5, 4)}, {"w": "io"}),
    "query and key": Pair(
        lambda p, x: jnp.einsum("td,dhk,ehk,se->hts", x, p["q"], p["k"], x, optimize=[(1, 2), (0, 2), (0, 1)]),
        {"q": (4, 2, 3), "k": (4, 2, 3)},
        {"q": "ioo", "k": "ioo"},
    ),
    "batched over layers": Pair(
        lambda p, x: jnp.einsum("td,lde->lte", x, jnp.einsum("ldf,lfe->lde", p["one"], p["two"])),
        {"one": (2, 4, 5), "two": (2, 5, 3)},
        {"one": "bio", "two": "bio"},
    ),
    "scaled and sliced before": Pair(lambda p, x: x @ ((p["one"] / 2)[:, :3] @ p["two"][1:4]), TWO, IO),
    "three": Pair(lambda p, x: x @ (p["one"] @ (p["two"] @ p["three"])), TWO | {"three": (6, 2)}, IO | {"three": "io"}),
    "a lookup": Pair(lambda p, x: (p["one"] @ p["two"])[jnp.argsort(x[0])], TWO, IO),
    "an inner product": Pair(
        lambda p, x: x * jnp.tensordot(p["one"], p["two"].T, 2), {"one": (4, 5), "two": (5, 4)}, IO
    ),
    "in a jit": Pair(lambda p, x: jax.jit(lambda one, two, x: x @ (one @ two))(p["one"], p["two"], x), TWO, IO),
    "a norm of a product": Pair(lambda p, x: x * jnp.tanh(p["one"] @ p["two"]).sum(), TWO, IO),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_product_of_kernels_matches_merged_kernels(name: str) -> None:
    case = PAIRS[name]
    assert_law(case.call, case.params, case.adapter, normal(*case.x, seed=9))


@pytest.mark.parametrize("name", PAIRS)
def test_a_product_of_kernels_works_outside_jit(name: str) -> None:
    case = PAIRS[name]
    x = normal(*case.x, seed=9)
    got = lj.lora(case.call)(case.params, case.adapter, x)
    assert_close(got, case.call(lj.merge(case.params, case.adapter), x), {"float32": 1e-4})


class Product:
    """Any `dot_general` of two kernels."""

    def __init__(self, draw: Any) -> None:
        met = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 3)))]
        kinds = [draw(st.sampled_from(["summed", "batch"])) for _ in met]
        self.shapes, places, self.roles = [], [], []
        for _ in range(2):
            axes = draw(st.permutations([*range(len(met)), *(-1 - n for n in range(draw(st.integers(0, 2))))]))
            axes = axes if len(axes) > 1 else [*axes, -1]
            self.shapes.append([met[axis] if axis >= 0 else draw(st.integers(1, 3)) for axis in axes])
            places.append({axis: place for place, axis in enumerate(axes)})
            rest = [draw(st.sampled_from("bio")) for _ in axes[2:]]
            self.roles.append("".join(draw(st.permutations(["i", "o", *rest]))))
        self.numbers = tuple(
            tuple([side[axis] for axis in range(len(met)) if kinds[axis] == kind] for side in places)
            for kind in ("summed", "batch")
        )

    def __repr__(self) -> str:
        return f"Product({vars(self)})"

    def apply(self, params: Any) -> jax.Array:
        return lax.dot_general(params["one"], params["two"], self.numbers)


@settings(max_examples=25)
@given(st.composite(Product)())
def test_any_product_of_two_kernels_matches_merged_kernels(case: Product) -> None:
    with jax.enable_x64(True):
        params = {
            name: normal(*shape, seed=len(name), dtype="float64")
            for name, shape in zip(("one", "two"), case.shapes, strict=True)
        }
        adapter: Any = {}
        for name, roles in zip(params, case.roles, strict=True):
            adapter |= adapted(params, {name: roles}, rank=1, dtype="float64")
        assert_law(case.apply, params, adapter, dtype="float64")


def test_neither_kernel_is_materialized() -> None:
    params = {"one": normal(40, 50), "two": normal(50, 60)}
    adapter = adapted(params, IO)
    x = normal(3, 40, seed=9)
    model = lj.lora(lambda p, x: x @ (p["one"] @ p["two"]))
    shapes = shapes_made(jax.grad(lambda ad: model(params, ad, x).sum()), adapter)
    assert not shapes & {(40, 50), (50, 60), (50, 40), (60, 50)}


def test_explain_counts_the_use_of_each() -> None:
    case = PAIRS["one after the other"]
    rows = lj.explain(case.call, case.params, case.adapter, normal(*case.x), form="factored").rows
    assert [row.used for row in rows] == ["factored dot_general ×1"] * 2
    d, f, g, r = 4, 5, 6, 2
    through_second = 2 * r * f * r + 2 * r * r * g + r * r + r * g
    assert rows[0].flops == 2 * r * f * g + 2 * r * d * g + through_second + 2 * r * g + d * g
    assert rows[1].flops == 2 * d * f * r + 2 * d * r * g + d * r + d * g
    assert {path: found.axes for path, found in lj.kernels(case.call, case.params, normal(*case.x)).items()} == {
        "one": "oi",
        "two": "io",
    }
