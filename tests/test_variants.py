"""Every variant against the merged kernel: in every use of a kernel, in every form, under every transformation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close as assert_tree_close
from helpers import bits, dense, trained
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from law import assert_close, assert_law, normal, total
from transforms import TRANSFORMS, call
from uses import USES
from zoo import ZOO

import lora_jax as lj

Make = Callable[..., Any]

VARIANTS: Mapping[str, Make] = {
    "LoRA": functools.partial(lj.LoRA, rank=2, alpha=3),
    "rsLoRA": functools.partial(lj.RSLoRA, rank=2, alpha=3),
    "DoRA": functools.partial(lj.DoRA, rank=2, alpha=3),
    "DoRA, rank-stabilised": functools.partial(lj.DoRA, rank=2, alpha=3, rank_stabilised=True),
    "AdaLoRA": functools.partial(lj.AdaLoRA, rank=2, alpha=3),
    "VeRA": functools.partial(lj.VeRA, rank=6, seed=1),
}


def drawn(params: Any, variant: Any) -> Any:
    """An adapter of all that there is of a kernel `w`, which does something."""
    shapes = jax.eval_shape(lambda key, params: lj.init(key, params, {"w": variant}), jax.random.key(0), params)
    leaves, treedef = jax.tree.flatten(shapes)
    return treedef.unflatten([normal(*leaf.shape, seed=100 + at, size=0.4) for at, leaf in enumerate(leaves)])


@pytest.mark.parametrize("variant", ["DoRA", "AdaLoRA", "VeRA"])  # LoRA, in far more uses: the tests of the rules
@pytest.mark.parametrize("use", USES)
def test_adapted_and_merged_are_the_same_function(use: str, variant: str) -> None:
    case = USES[use]
    adapter = drawn(case.params, VARIANTS[variant](axes=case.axes or case.roles))
    assert_law(case.apply, case.params, adapter, *case.arrays)


@pytest.mark.parametrize("form", [None, "hybrid", "merged"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_the_same_function_in_every_form(variant: str, form: Any) -> None:
    case = USES["a bias"]
    adapter, adapted = drawn(case.params, VARIANTS[variant](axes="io")), lj.lora(case.apply, form=form)
    gradient = jax.grad(lambda ad: total(adapted(case.params, ad, *case.arrays)))(adapter)
    expected = jax.grad(lambda ad: total(case.apply(lj.merge(case.params, ad), *case.arrays)))(adapter)
    assert_close(gradient, expected, {"float32": 1e-4})


@pytest.mark.parametrize("use", ["Dense", "a stack of layers", "a convolution", "an embedding"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_at_the_start_the_model_is_as_it_was(variant: str, use: str) -> None:
    case = USES[use]
    adapter = lj.init(jax.random.key(0), case.params, {"w": VARIANTS[variant](axes=case.roles)})
    assert_close(lj.lora(case.apply)(case.params, adapter, *case.arrays), case.apply(case.params, *case.arrays))


@pytest.mark.parametrize("transform", ["grad", "vmap"])
@pytest.mark.parametrize("variant", ["DoRA", "VeRA"])  # LoRA and rsLoRA: test_laws.py
def test_a_model_in_a_scan_is_that_of_merged_kernels(variant: str, transform: str, key: jax.Array) -> None:
    model = ZOO["scanned_transformer"](jax.random.key(0), jnp.float32)
    kernels = lj.kernels(model.apply, model.params, *model.args)
    adapter = lj.init(key, model.params, {"**/kernel": VARIANTS[variant]()}, kernels=kernels)
    # Where they started, moved a little: a magnitude that is noise alone would be divided by.
    adapter = jax.tree.map(lambda leaf, noise: leaf + noise, adapter, trained(key, adapter, size=0.2))
    under, table = TRANSFORMS[transform]
    got = under(call(lj.lora(model.apply), model), adapter, model.args[0])
    assert_tree_close(got, under(call(dense(model.apply), model), adapter, model.args[0]), table)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_base_in_bfloat16_keeps_its_dtype(variant: str) -> None:
    params, x = {"w": normal(64, 32, dtype="bfloat16")}, normal(8, 64, seed=1, dtype="bfloat16")
    adapter = drawn(params, VARIANTS[variant](axes="io"))
    assert_law(lambda params, x: x @ params["w"], params, adapter, x, dtype="bfloat16")


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_saved_and_restored(variant: str, tmp_path: Path) -> None:
    params = {"w": normal(4, 5)}
    adapter = drawn(params, VARIANTS[variant](axes="io"))
    lj.save(tmp_path / "adapter", adapter, base=params)
    restored = lj.restore(tmp_path / "adapter", base=params)
    assert bits(restored) == bits(adapter)
    assert restored["w"].variant == adapter["w"].variant


@pytest.mark.parametrize("spec", [P(None, "model"), P("model")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_where_shardings_are_types_it_is_the_same_function(variant: str, spec: P) -> None:
    params, x = {"w": normal(8, 8, size=0.5), "other": normal(8, 8, seed=3)}, normal(3, 8, seed=2)
    adapter = drawn(params, VARIANTS[variant](axes="io"))
    apply = lambda p, x: x @ jnp.concatenate([p["w"], p["other"]], 1)  # noqa: E731
    expected = jax.grad(lambda ad: total(apply(lj.merge(params, ad), x)))(adapter)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, spec))
        cut = jax.device_put(adapter, lj.sharding.of(adapter, NamedSharding(mesh, spec)))
        gradient = jax.jit(jax.grad(lambda ad: total(lj.lora(apply)(placed, ad, x))))(cut)
    assert_close(jax.device_get(gradient), jax.device_get(expected), {"float32": 1e-4})


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dropout_key_drops_activations_and_without_one_nothing_is_dropped(variant: str) -> None:
    case = USES["Dense"]
    adapter = drawn(case.params, VARIANTS[variant](axes="io", dropout=0.5))
    whole = drawn(case.params, VARIANTS[variant](axes="io"))
    adapted = lj.lora(case.apply)
    expected = adapted(case.params, whole, *case.arrays)
    assert bits(adapted(case.params, adapter, *case.arrays)) == bits(expected)
    dropped = adapted(case.params, adapter, *case.arrays, dropout_key=jax.random.key(0))
    assert float(jnp.abs(dropped - expected).max()) > 1e-3
