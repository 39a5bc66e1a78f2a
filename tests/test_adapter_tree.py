"""A tree of adapters: merged weights at each node, the way between nodes, and the memory that it takes."""

from __future__ import annotations

import functools
import gc
import random
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from law import normal

import lora_jax as lj
from lora_jax import many

SHAPES = {"q": (6, 5), "v": (6, 5), "out": (5, 6), "bias": (5,), "untouched": (8, 8)}
PARENTS = {"chat": "base", "polite": "chat", "rude": "chat", "short": "polite", "code": "base"}


def part(shape: tuple[int, ...], variant: Any, seed: int) -> Any:
    axes = "io" if variant.needs_axes else ""
    shapes = variant.shapes(shape, axes)
    return lj.Adapter(variant, axes, **{name: normal(*size, seed=seed, size=0.5) for name, size in shapes.items()})


def additive(seed: int, rank: int = 2) -> Any:
    """LoRA and rsLoRA on some kernels, other ones for each seed, and a bias."""
    names = ["q", "v", "out"][: 1 + seed % 3]
    made = {name: part(SHAPES[name], lj.RSLoRA(rank=rank, alpha=3), 10 * seed + at) for at, name in enumerate(names)}
    return made | {"bias": part(SHAPES["bias"], lj.LoRABias(scale=0.7), seed)}


def any_variant(seed: int) -> Any:
    """With leaves that replace or normalize the leaf of the parent."""
    other = lj.DoRA(rank=1, alpha=2) if seed % 2 else lj.LoRA(rank=2, alpha=1)
    return {"q": part(SHAPES["q"], other, seed), "bias": part(SHAPES["bias"], lj.Full(), 50 + seed)}


def base(dtype: Any = jnp.float32) -> dict[str, Any]:
    return {name: normal(*shape, seed=at, dtype=dtype) for at, (name, shape) in enumerate(SHAPES.items())}


def make_tree(adapter: Any = additive) -> many.Tree:
    return many.tree({name: (parent, adapter(at)) for at, (name, parent) in enumerate(PARENTS.items())})


def merged_along(params: Any, tree: many.Tree, name: str) -> Any:
    """The oracle: one adapter after another merged into the base."""
    return functools.reduce(lambda tree_of, node: lj.merge(tree_of, tree.adapters[node]), tree.path(name), params)


def test_the_way_goes_through_the_lowest_common_ancestor() -> None:
    tree = make_tree()
    assert tree.path("short") == ("chat", "polite", "short") and tree.path("base") == ()
    assert tree.walk("short", "rude") == (("short", "polite"), ("rude",))
    assert tree.walk("short", "code") == (("short", "polite", "chat"), ("code",))
    assert tree.walk("chat", "short") == ((), ("polite", "short"))
    assert tree.walk("short", "chat") == (("short", "polite"), ())
    assert tree.walk("rude", "rude") == ((), ())
    assert repr(tree).startswith("Tree('chat' of 'base', 'polite' of 'chat'")


@pytest.mark.parametrize("adapter", [additive, any_variant])
@pytest.mark.parametrize("donate", [False, True])
def test_switching_is_merging_from_the_base_bit_for_bit(adapter: Any, donate: bool) -> None:
    params, tree = base(), make_tree(adapter)
    expected = {name: bits(merged_along(params, tree, name)) for name in ("base", *PARENTS)}
    here, choose = many.place(params, tree), random.Random(0)
    for _ in range(12):
        name = choose.choice(list(expected))
        before, here = here, many.switch(here, name, donate=donate)
        assert bits(here.params) == expected[name], (before.name, name)
        assert here.name == name and not here.drift
    assert bits(many.switch(here, "base", donate=donate).params) == bits(params)
    assert bits(jax.tree.leaves(dict(tree.adapters)))  # none was freed


def test_the_base_exists_once() -> None:
    params, tree = base(), make_tree()
    there = many.switch(many.place(params, tree), "polite")
    kept: dict[str, Any] = {}
    for saved in reversed(there.kept):
        kept |= saved
    adapted = {path for node in tree.path("polite") for path in tree.adapters[node]}
    assert set(kept) == adapted
    for path, leaf in params.items():
        assert (kept if path in adapted else there.params)[path] is leaf
    back = many.switch(there, "base")
    assert all(back.params[path] is leaf for path, leaf in params.items()) and back.kept == ()


def live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.fixture
def without_garbage() -> Iterator[None]:
    """Frees the arrays that earlier tests have left, and no others meanwhile: references are counted."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.usefixtures("without_garbage")
def test_donated_switches_take_no_memory_beyond_the_kept_leaves(exact: bool) -> None:
    params, tree = base(), make_tree()
    # Twice each way, because constants of compiled programs are arrays, too.
    here = many.place(jax.tree.map(jnp.copy, params), tree, exact=exact)
    before = live_bytes()
    seen: dict[str, set[int]] = {}
    for name in ["rude", "code", "base"] * 2:
        here = many.switch(here, name, donate=True)
        seen.setdefault(name, set()).add(live_bytes() - before)
    sizes = {path: leaf.nbytes for path, leaf in params.items()}
    for name, growth in seen.items():
        on_path = [path for node in tree.path(name) for path in tree.adapters[node]]
        assert growth == {sum(sizes[path] for path in on_path) if exact else 0}


def test_arrays_that_are_not_donated_stay_valid() -> None:
    params, tree = base(), make_tree()
    for exact in (True, False):
        places = [many.place(params, tree, exact=exact)]
        for name in ("rude", "short", "code", "base"):
            places.append(many.switch(places[-1], name))
        assert not any(leaf.is_deleted() for place in places for leaf in jax.tree.leaves(place.params))
        donated = many.switch(places[1], "code", donate=True)
        freed = {path for path, leaf in places[1].params.items() if leaf.is_deleted()}
        assert freed == {path for path, leaf in params.items() if places[1].params[path] is not leaf}
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, donated.params, dict(tree.adapters))))


@pytest.mark.parametrize(
    ("dtype", "donate"),
    [("float32", True), ("bfloat16", False), pytest.param("float16", True, marks=pytest.mark.sweep)],
)
def test_without_kept_leaves_the_drift_bounds_the_error(dtype: str, donate: bool) -> None:
    params, tree = base(jnp.dtype(dtype)), make_tree()
    wide = {path: np.asarray(leaf, np.float64) for path, leaf in params.items()}
    here, choose = many.place(jax.tree.map(jnp.copy, params), tree, exact=False), random.Random(1)
    zeros = {path: np.zeros(leaf.shape) for path, leaf in wide.items()}
    updates = {name: {**zeros, **lj.merge(zeros, adapter)} for name, adapter in tree.adapters.items()}
    assert not here.drift
    for step in range(10):
        name = "base" if step == 9 else choose.choice(list(PARENTS))
        here = many.switch(here, name, donate=donate)
        for path, bound in here.drift.items():
            expected = wide[path] + sum(updates[node][path] for node in tree.path(name))
            error = np.abs(np.asarray(here.params[path], np.float64) - expected).max()
            assert error <= bound, (path, name)
            assert here.params[path].dtype == dtype
    assert set(here.drift) == {"q", "v", "out", "bias"}
    assert max(here.drift.values()) < 400 * float(jnp.finfo(dtype).eps)
    assert here.params["untouched"].dtype == dtype


def test_a_walk_is_one_rounding() -> None:
    params = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    small = {"w": lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=jnp.full((2, 1), 2.0**-9), b=jnp.ones((1, 2)))}
    tree = many.tree({"one": ("base", small), "two": ("one", small), "three": ("two", small)})
    here = many.switch(many.place(params, tree, exact=False), "three")
    exact = many.switch(many.place(params, tree), "three")
    assert (here.params["w"] == 1 + 2.0**-7).all() and (exact.params["w"] == 1).all()  # 1 + 3·2⁻⁹, rounded to 2⁻⁷
    assert repr(here) == f"Merged('three', drift={here.drift['w']:.3g})" and repr(exact) == "Merged('three', exact)"


def test_numpy_leaves_and_containers_are_kept() -> None:
    tree = many.tree({"one": ("base", {"m/w": part((6, 5), lj.LoRA(rank=1, alpha=1), 0)})})
    params = {"m": {"w": np.asarray(normal(6, 5), np.float64)}, "other": np.ones(3)}
    for exact in (True, False):
        there = many.switch(many.place(params, tree, exact=exact), "one", donate=True)
        assert isinstance(there.params["m"]["w"], np.ndarray) and there.params["m"]["w"].dtype == np.float64
        np.testing.assert_allclose(there.params["m"]["w"], lj.merge(params, tree.adapters["one"])["m"]["w"], rtol=1e-12)
        back = many.switch(there, "base").params["m"]["w"]
        np.testing.assert_allclose(back, params["m"]["w"], rtol=0, atol=0 if exact else 1e-12)
        assert there.params["other"] is params["other"]


def test_the_adapter_of_a_node_is_the_sum_of_those_on_its_path() -> None:
    params, tree = base(), make_tree()
    for name in ("base", "short", "code"):
        merged = lj.merge(params, tree.adapter(name))
        expected = merged_along(params, tree, name)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), merged, expected)
    assert tree.adapter("base") == {}
    assert tree.adapter("polite")["q"].variant.rank == 4
    stacked = many.stack({name: tree.adapter(name) for name in PARENTS})
    assert stacked.names == tuple(PARENTS)


_NODE = {"w": part((6, 5), lj.LoRA(rank=1, alpha=1), 0)}
INVALID: list[tuple[Any, type[Exception], str]] = [
    (lambda: many.tree({"base": ("base", _NODE)}), lj.AdapterError, "Expected strings other than 'base', which is"),
    (lambda: many.tree({"x": _NODE}), lj.AdapterError, "Expected (parent, adapter) at 'x'; got dict."),
    (lambda: many.tree({"x": ("base", 3)}), lj.AdapterError, "Expected an adapter: a dict from paths to `Adapter`"),
    (lambda: many.tree({"x": ("z", _NODE)}), lj.AdapterError, "Expected the name of one of the 1 adapters; got 'z'."),
    (
        lambda: many.tree({"x": ("y", _NODE), "y": ("x", _NODE)}),
        lj.AdapterError,
        "Expected a tree with the root 'base'; got a cycle: 'x' of 'y' of 'x'.",
    ),
    (lambda: make_tree().path("chatty"), lj.AdapterError, "The nearest are 'chat'"),
    (
        lambda: many.switch(many.place(base(), make_tree()), "none"),
        lj.AdapterError,
        "one of the 5 adapters; got 'none'",
    ),
    (lambda: many.place({"q": jnp.ones((2, 2))}, make_tree()), lj.AdapterError, "Expected an adapter of `params`"),
    (
        lambda: many.place(base(), make_tree(any_variant), exact=False),
        lj.MergeError,
        "'q' of 'polite': DoRA(rank=1, alpha=2)\n",
    ),
    (
        lambda: many.place({"w": jnp.ones((6, 5))}, many.tree({"x": ("base", {"w": _ALORA})})),
        lj.MergeError,
        "Expected variants with the same update for every token",
    ),
    (
        lambda: many.place({"w": lj.quant.quantize({"w": jnp.ones((6, 5))}, {"w": lj.quant.Int8()})["w"]}, _W),
        lj.MergeError,
        "  Dequantize it first: place(quant.dequantize(params), tree).",
    ),
    (
        lambda: many.switch(many.place({"w": jnp.full((6, 5), 6e4, jnp.float16)}, _HUGE, exact=False), "x"),
        lj.MergeError,
        "Expected finite factors and merged leaves that fit their dtype; 1 leaves are not finite.\n  'w'",
    ),
    (
        lambda: many.place(dict.fromkeys(("w", "head"), jnp.ones((6, 5))), _W),
        lj.MergeError,
        "'head' holds the same one (tied weights).\n  Place a tree in which 'w' is a copy.",
    ),
    (lambda: make_tree(any_variant).adapter("polite"), lj.AdapterError, "Expected leaves that can be combined"),
]
_ALORA = part((6, 5), lj.ALoRA(rank=1, alpha=1, invocation=(1,)), 0)
_W = many.tree({"x": ("base", _NODE)})
_HUGE = many.tree(
    {"x": ("base", {"w": lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=jnp.full((6, 1), 1e5), b=jnp.ones((1, 5)))})}
)


@pytest.mark.parametrize(("call", "error", "text"), INVALID, ids=range(len(INVALID)))
def test_what_is_not_a_tree_or_does_not_fit_is_an_error(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_sharded_base_stays_sharded(exact: bool, kind: AxisType) -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    sharding = NamedSharding(mesh, PartitionSpec("x", None))
    params = {"w": normal(6, 5)}
    expected = lj.merge(params, _NODE)["w"]
    sharded = {"w": jax.device_put(params["w"], sharding)}
    with jax.set_mesh(mesh):
        there = many.switch(many.place(sharded, _W, exact=exact), "x", donate=True)
        assert there.params["w"].sharding == sharding
        np.testing.assert_allclose(there.params["w"], expected, rtol=1e-6)
        back = many.switch(there, "base", donate=True).params["w"]
        assert back.sharding == sharding
        np.testing.assert_allclose(back, params["w"], rtol=0, atol=0 if exact else 1e-5)


@pytest.mark.parametrize("exact", [True, False])
def test_a_way_that_was_gone_before_compiles_nothing(exact: bool, caplog: pytest.LogCaptureFixture) -> None:
    tree = many.tree({"one": ("base", _NODE), "two": ("base", jax.tree.map(lambda x: 2 * x, _NODE))})
    here = many.place({"w": normal(6, 5)}, tree, exact=exact)
    for name in ("one", "two", "base") * 2:  # the base of the second round is committed to its device
        here = many.switch(here, name)
    with jax.log_compiles():
        caplog.clear()
        for name in ("two", "one", "two", "base", "one"):
            here = many.switch(here, name)
        assert not [record.message for record in caplog.records if "Compiling" in record.message]
