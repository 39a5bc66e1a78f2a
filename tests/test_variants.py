"""Every variant matches merged kernels in every use, form and transformation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close as assert_tree_close
from helpers import bits, sweep, sweep_except, trained
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from law import assert_close, assert_law, normal, total
from transforms import under
from uses import USES
from zoo import ZOO

import lora_jax as lj
from lora_jax import _variants, starts

Make = Callable[..., Any]

VARIANTS: Mapping[str, Make] = {
    "LoRA": functools.partial(lj.LoRA, rank=2, alpha=3),
    "rsLoRA": functools.partial(lj.RSLoRA, rank=2, alpha=3),
    "DoRA": functools.partial(lj.DoRA, rank=2, alpha=3),
    "DoRA, rank-stabilized": functools.partial(lj.DoRA, rank=2, alpha=3, rank_stabilized=True),
    "AdaLoRA": functools.partial(lj.AdaLoRA, rank=2, alpha=3),
    "VeRA": functools.partial(lj.VeRA, rank=6, seed=1),
}
METHODS: Mapping[str, Make] = {
    "LoRA-XS": functools.partial(lj.LoRAXS, rank=2, alpha=3),
    "DeLoRA": functools.partial(lj.DeLoRA, rank=2),
    "IA3": lj.IA3,
    "IA3 of the inputs": functools.partial(lj.IA3, inputs=True),
    "MiSS": functools.partial(lj.MiSS, rank=2),
    "QA-LoRA": functools.partial(lj.QALoRA, rank=2, alpha=3, group=2),
}
ALL = {**VARIANTS, **METHODS}
SWEPT = sweep_except(VARIANTS, ALL)
# A gain of the inputs is not a gain of the result, and the groups of QA-LoRA divide the last input axis.
EXCEPT = {
    ("IA3 of the inputs", use)
    for use in ("a convolution", "a convolution in groups", "experts by group", "concatenated with another")
} | {("QA-LoRA", "the output of attention")}


def random_adapter(params: Any, variant: Any) -> Any:
    """An adapter of a kernel `w` with nonzero arrays."""
    shapes = jax.eval_shape(lambda key, params: lj.init(key, params, {"w": variant}), jax.random.key(0), params)
    leaves, treedef = jax.tree.flatten(shapes)
    return treedef.unflatten([normal(*leaf.shape, seed=100 + at, size=0.4) for at, leaf in enumerate(leaves)])


@pytest.mark.parametrize(
    ("variant", "use"),
    [(variant, use) for variant in ("DoRA", "AdaLoRA", "VeRA") for use in USES]  # the tests of the rules cover LoRA
    + [
        (variant, use) if use == "a stack of layers" else sweep(variant, use)
        for variant in METHODS
        for use in USES
        if (variant, use) not in EXCEPT
    ],
)
def test_adapted_and_merged_are_the_same_function(variant: str, use: str) -> None:
    case = USES[use]
    adapter = random_adapter(case.params, ALL[variant](axes=case.axes or case.roles))
    assert_law(case.apply, case.params, adapter, *case.arrays)


@pytest.mark.parametrize("form", [None, "hybrid", "merged"])
@pytest.mark.parametrize("variant", SWEPT)
def test_all_forms_are_the_same_function(variant: str, form: Any) -> None:
    case = USES["a bias"]
    adapter, adapted = random_adapter(case.params, ALL[variant](axes="io")), lj.lora(case.apply, form=form)
    gradient = jax.grad(lambda ad: total(adapted(case.params, ad, *case.arrays)))(adapter)
    expected = jax.grad(lambda ad: total(case.apply(lj.merge(case.params, ad), *case.arrays)))(adapter)
    assert_close(gradient, expected, {"float32": 1e-4})


@pytest.mark.parametrize("use", ["Dense", "a stack of layers", "a convolution", "an embedding"])
@pytest.mark.parametrize("variant", SWEPT)
def test_initialization_keeps_the_model(variant: str, use: str) -> None:
    case = USES[use]
    adapter = lj.init(jax.random.key(0), case.params, {"w": ALL[variant](axes=case.roles)})
    adapted = lj.lora(case.apply, materialize=["w"] if (variant, use) in EXCEPT else [])
    assert_close(adapted(case.params, adapter, *case.arrays), case.apply(case.params, *case.arrays))


@pytest.mark.parametrize("transform", ["grad", "vmap"])
@pytest.mark.parametrize("variant", ["DoRA", "VeRA", *map(sweep, METHODS)])  # test_laws.py covers LoRA and rsLoRA
def test_a_scanned_model_matches_merged_kernels(variant: str, transform: str, key: jax.Array) -> None:
    model = ZOO["scanned_transformer"](jax.random.key(0), jnp.float32)
    kernels = lj.kernels(model.apply, model.params, *model.args)
    adapter = lj.init(key, model.params, {"**/kernel": ALL[variant]()}, kernels=kernels)
    # Close to the initial values, because random magnitudes near zero would be divided by.
    adapter = jax.tree.map(lambda leaf, noise: leaf + noise, adapter, trained(key, adapter, size=0.2))
    assert_tree_close(*under(transform, model, adapter))


@pytest.mark.parametrize("variant", SWEPT)
def test_a_base_in_bfloat16_keeps_its_dtype(variant: str) -> None:
    params, x = {"w": normal(64, 32, size=0.2, dtype="bfloat16")}, normal(8, 64, seed=1, dtype="bfloat16")
    adapter = random_adapter(params, ALL[variant](axes="io"))
    assert_law(lambda params, x: x @ params["w"], params, adapter, x, dtype="bfloat16")


@pytest.mark.parametrize("variant", SWEPT)
def test_every_variant_is_saved_and_restored(variant: str, tmp_path: Path) -> None:
    params = {"w": normal(4, 5)}
    adapter = random_adapter(params, ALL[variant](axes="io"))
    lj.save(tmp_path / "adapter", adapter, base=params)
    restored = lj.restore(tmp_path / "adapter", base=params)
    assert bits(restored) == bits(adapter)
    assert restored["w"].variant == adapter["w"].variant


@pytest.mark.parametrize("spec", [P(None, "model"), P("model")])
@pytest.mark.parametrize("variant", SWEPT)
def test_the_function_is_the_same_on_an_explicit_mesh(variant: str, spec: P) -> None:
    params, x = {"w": normal(8, 8, size=0.5), "other": normal(8, 8, seed=3)}, normal(3, 8, seed=2)
    adapter = random_adapter(params, ALL[variant](axes="io"))
    apply = lambda p, x: x @ jnp.concatenate([p["w"], p["other"]], 1)  # noqa: E731
    adapted = lj.lora(apply, materialize=["w"] if variant == "IA3 of the inputs" else [])
    expected = jax.grad(lambda ad: total(apply(lj.merge(params, ad), x)))(adapter)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, spec))
        sharded = jax.device_put(adapter, lj.sharding.like_base(adapter, NamedSharding(mesh, spec)))
        gradient = jax.jit(jax.grad(lambda ad: total(adapted(placed, ad, x))))(sharded)
    assert_close(jax.device_get(gradient), jax.device_get(expected), {"float32": 1e-4})


@pytest.mark.parametrize("variant", [case for case in SWEPT if "IA3" not in str(case)])
def test_dropout_applies_only_with_a_key(variant: str) -> None:
    case = USES["Dense"]
    adapter = random_adapter(case.params, ALL[variant](axes="io", dropout=0.5))
    without_dropout = random_adapter(case.params, ALL[variant](axes="io"))
    adapted = lj.lora(case.apply)
    expected = adapted(case.params, without_dropout, *case.arrays)
    assert bits(adapted(case.params, adapter, *case.arrays)) == bits(expected)
    dropped = adapted(case.params, adapter, *case.arrays, dropout_key=jax.random.key(0))
    assert float(jnp.abs(dropped - expected).max()) > 1e-3


# Fields

MADE: Mapping[str, Mapping[str, Any]] = {
    "LoRA": {"rank": 2, "alpha": 3, "dropout": 0.5, "clip_rank": True},
    "RSLoRA": {"rank": 2, "alpha": 3, "dropout": 0.5, "clip_rank": True},
    "DoRA": {"rank": 2, "alpha": 3, "dropout": 0.5, "clip_rank": True, "rank_stabilized": True},
    "AdaLoRA": {"rank": 2, "alpha": 3, "dropout": 0.5, "clip_rank": True},
    "ALoRA": {"rank": 2, "alpha": 3, "dropout": 0.5, "clip_rank": True, "invocation": (1, 2)},
    "VeRA": {"rank": 2, "seed": 7, "start_d": 0.5, "dropout": 0.5},
    "Rows": {"ids": (1, 2)},
    "LoRABias": {"scale": 2},
    "Full": {},
    "LoRAXS": {"rank": 2, "alpha": 3, "dropout": 0.5},
    "DeLoRA": {"rank": 2, "start_bound": 3, "dropout": 0.5},
    "IA3": {"inputs": True},
    "MiSS": {"rank": 2, "dropout": 0.5},
    "QALoRA": {"rank": 2, "alpha": 3, "group": 4, "dropout": 0.5},
    "Layers": {"variant": lj.LoRA(rank=2, alpha=3), "layers": (1, 2)},
}
FIELDS = [(name, field) for name, fields in MADE.items() for field in fields]
NUMBERS = [(name, field) for name, field in FIELDS if field != "variant"]


def test_every_field_of_every_variant_is_tested() -> None:
    # `many.mixture` makes the others.
    classes = {name: cls for name, cls in vars(_variants).items() if isinstance(cls, type) and name in lj.__all__}
    assert {name: {field.name for field in dataclasses.fields(cls)} - {"axes"} for name, cls in classes.items()} == {
        name: set(fields) for name, fields in MADE.items()
    }


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(
    "array", [np.asarray, jnp.asarray, lambda value: np.asarray(value)[()]], ids=["np", "jnp", "scalar"]
)
def test_numpy_and_jax_scalars_become_python_numbers(name: str, array: Any) -> None:
    plain = getattr(lj, name)(**MADE[name])
    fields = {field: array(value) if (name, field) in NUMBERS else value for field, value in MADE[name].items()}
    converted = getattr(lj, name)(**fields)
    assert converted == plain
    assert (hash(converted), repr(converted)) == (hash(plain), repr(plain))
    values = [
        value
        for owner, field in NUMBERS
        if owner == name
        for value in np.atleast_1d(np.asarray(getattr(converted, field), object))
    ]
    assert {type(value) for value in values} <= {int, float, bool}


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_a_value_of_another_type_is_an_error(name: str, field: str) -> None:
    make = lambda value: getattr(lj, name)(**{**MADE[name], field: value})  # noqa: E731
    wrong = ["2", None, jnp.ones((2, 2)), float("nan"), float("inf"), 2j, lj.LoRA]
    wrong += [2, 0.5] if isinstance(MADE[name][field], bool) else [True, np.True_, jnp.bool_(True)]
    wrong += [0.5, 2.0, -1] if field in ("rank", "seed", "group") else []
    wrong += [[0.5], [True], [-1], [float("nan")], [[1]]] if field in ("ids", "invocation", "layers") else []
    for value in wrong:
        with pytest.raises(lj.SpecError, match=f"`{field}`"):
            make(value)


@pytest.mark.parametrize(("name", "field"), NUMBERS)
def test_a_traced_value_is_an_error_with_the_reason(name: str, field: str) -> None:
    def make(value: Any) -> jax.Array:
        getattr(lj, name)(**{**MADE[name], field: value})
        return value

    with pytest.raises(lj.SpecError, match=f"Expected a Python value for `{field}`; got a traced array"):
        jax.jit(make)(MADE[name][field] if not isinstance(MADE[name][field], tuple) else jnp.arange(2))


def test_a_numpy_alpha_trains_and_is_saved_like_a_python_one(tmp_path: Path) -> None:
    params, x = {"w": normal(4, 5)}, normal(3, 4)
    adapter = random_adapter(params, lj.LoRA(rank=np.int64(2), alpha=np.float32(0.5)))
    step = jax.jit(jax.grad(lambda ad, x: total(lj.lora(lambda p, x: x @ p["w"])(params, ad, x))))
    assert jax.tree.structure(step(adapter, x)) == jax.tree.structure(
        random_adapter(params, lj.LoRA(rank=2, alpha=0.5))
    )
    lj.save(tmp_path / "adapter", adapter, base=params)
    assert lj.restore(tmp_path / "adapter", base=params)["w"].variant == lj.LoRA(rank=2, alpha=0.5)


def test_a_tree_map_does_not_validate_again(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = random_adapter({"w": normal(4, 5)}, lj.LoRA(rank=2, alpha=3))
    monkeypatch.setattr(lj.LoRA, "__post_init__", None)  # a call would raise
    assert jax.tree.map(lambda leaf: leaf, adapter)["w"].variant is adapter["w"].variant


# Clipped ranks


@pytest.mark.parametrize("name", ["LoRA", "RSLoRA", "DoRA", "AdaLoRA", "ALoRA"])
def test_a_clipped_rank_equals_an_explicit_rank(name: str, tmp_path: Path) -> None:
    options = {"invocation": (1,)} if name == "ALoRA" else {}
    make = functools.partial(getattr(lj, name), alpha=6, **options)
    params = {"wide": normal(8, 9), "narrow": normal(8, 3), "stack": normal(5, 2, 8)}
    spec = {"stack": make(rank=4, clip_rank=True, axes="bio"), "**": make(rank=4, clip_rank=True)}
    expected = {"stack": make(rank=2, axes="bio"), "narrow": make(rank=3), "wide": make(rank=4)}
    adapter = lj.init(jax.random.key(0), params, spec)
    assert bits(adapter) == bits(lj.init(jax.random.key(0), params, expected))
    assert {path: part.variant for path, part in adapter.items()} == {
        path: dataclasses.replace(variant, axes=None) for path, variant in expected.items()
    }
    lj.save(tmp_path / "adapter", adapter, base=params)
    restored = lj.restore(tmp_path / "adapter", base=params)
    assert jax.tree.structure(restored) == jax.tree.structure(adapter)


def test_clipped_ranks_are_used_by_explain_initializations_and_compression() -> None:
    params = {"w": normal(8, 3)}
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    adapter = lj.init(jax.random.key(0), params, {"w": lj.LoRA(rank=8, alpha=6, clip_rank=True)})
    (row,) = lj.explain(apply, params, adapter, normal(2, 8)).rows
    assert (row.rank, row.scale) == (3, 2.0)
    started = starts.pissa(params, adapter)
    assert started.adapter["w"].variant == lj.LoRA(rank=3, alpha=6)
    assert_close(lj.lora(apply)(started.params, started.adapter, normal(2, 8)), apply(params, normal(2, 8)))
    assert lj.compress(started.adapter, 2)[0]["w"].variant == lj.LoRA(rank=2, alpha=6)


def test_an_adapter_with_an_unresolved_rank_is_an_error() -> None:
    arrays = lj.init(jax.random.key(0), {"w": normal(8, 3)}, {"w": lj.LoRA(rank=3, alpha=6)})["w"].arrays
    adapter = {"w": lj.Adapter(lj.LoRA(rank=8, alpha=6, clip_rank=True), "io", **arrays)}
    with pytest.raises(
        lj.AdapterError, match=r"which is only for a spec; the adapter of this kernel needs LoRA\(rank=3, alpha=6\)"
    ):
        lj.lora(lambda p, x: x @ p["w"])({"w": normal(8, 3)}, adapter, normal(2, 8))


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_a_kernel_without_elements_has_no_rank_to_clip_to(sizes: tuple[int, int]) -> None:
    with pytest.raises(lj.SpecError, match="it can be at most 0"):
        lj.init(jax.random.key(0), {"w": jnp.ones(sizes)}, {"w": lj.LoRA(rank=2, alpha=3, clip_rank=True)})
