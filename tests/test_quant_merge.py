"""Merging, measuring and saving adapters of quantized bases, and quantizing again after a merge."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, trained
from law import normal

import lora_jax as lj
from lora_jax import quant

FORMATS = {"up": quant.NF4(), "frozen": quant.Int8()}
ORIGINAL = {"up": normal(64, 24, size=0.1), "down": normal(24, 16, seed=1, size=0.2), "frozen": normal(16, 8, seed=2)}
BASE = quant.quantize(ORIGINAL, FORMATS)
DENSE = quant.dequantize(BASE)
X = normal(5, 64, seed=3)


def apply(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.tanh(x @ params["up"]) @ params["down"]) @ params["frozen"]


def adapter(variant: Any = None, path: str = "up") -> Any:
    variant = variant or lj.LoRA(rank=2, alpha=4)
    return trained(jax.random.key(1), lj.init(jax.random.key(0), BASE, {path: variant}), 0.05)


PART = adapter()
MERGED = lj.merge(DENSE, PART)

VARIANTS = {
    "DoRA": lj.DoRA(rank=2, alpha=4),
    "AdaLoRA": lj.AdaLoRA(rank=2, alpha=4),
    "Rows": lj.Rows(ids=(3, 5)),
    "LoRABias": lj.LoRABias(scale=2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_acts_on_a_quantized_leaf_as_on_the_dequantized_one(name: str) -> None:
    on_arrays, initial = (lj.init(jax.random.key(0), tree, {"up": VARIANTS[name]}) for tree in (DENSE, BASE))
    assert_close(initial, on_arrays)
    part = trained(jax.random.key(1), initial)
    got, expected = (lj.lora(apply)(tree, part, X) for tree in (BASE, DENSE))
    assert_close(got, expected)
    assert_close(expected, apply(lj.merge(DENSE, part), X))


def test_a_quantized_leaf_is_materialized_where_that_is_allowed() -> None:
    run = lambda params, x: apply(params, x) + jnp.exp(params["up"]).sum()  # noqa: E731
    got = lj.lora(run, materialize=["up"])(BASE, PART, X)
    assert_close(got, run(MERGED, X))


def test_full_on_a_quantized_leaf_is_an_error() -> None:
    text = "Cannot adapt 'up' of shape (64, 24), by the rule 'up': it is quantized, and Full() trains all of its values"
    with pytest.raises(lj.SpecError, match=re.escape(text)):
        lj.init(jax.random.key(0), BASE, {"up": lj.Full()})
    params = quant.dequantize(BASE, ["up"])
    assert lj.init(jax.random.key(0), params, {"up": lj.Full()})["up"].value.shape == (64, 24)
    assert isinstance(params["frozen"], quant.QuantizedLeaf)


# Merging


@pytest.mark.parametrize("name", ["DoRA", "LoRABias"])
def test_a_merge_into_a_quantized_leaf_names_both_choices(name: str) -> None:
    with pytest.raises(lj.MergeError) as error:
        lj.merge(BASE, adapter(VARIANTS[name]))
    assert str(error.value) == (
        "Expected the adapted leaves of `params` to be arrays; 1 of 1 are quantized.\n"
        "  'up' of shape (64, 24): NF4(axes='io')\n"
        "  Merge into the weights that the adapter was trained on: merge(quant.dequantize(params), adapter);\n"
        "  or into the weights before they were quantized: merge(original, adapter)."
    )


def test_other_quantized_leaves_stay() -> None:
    part = adapter(path="down")
    merged = lj.merge(BASE, part)
    assert merged["up"] is BASE["up"] and merged["frozen"] is BASE["frozen"]
    assert_close(lj.lora(apply)(BASE, part, X), apply(quant.dequantize(merged), X))
    assert lj.unmerge(merged, part, base=BASE)["down"] is BASE["down"]
    assert lj.merge_report(BASE, part, merged)["down"].lost == 0
    assert lj.unmerge_approximately(merged, part)[0]["up"] is BASE["up"]
    extracted, _ = lj.extract(BASE, merged, {"down": lj.LoRA(rank=2, alpha=4)})
    assert_close(lj.merge(BASE, extracted)["down"], merged["down"])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: lj.unmerge(MERGED, PART, base=BASE), "Expected the adapted leaves of `base` to be arrays"),
        (lambda: lj.unmerge(BASE, PART, base=DENSE), "Expected the adapted leaves of `merged` to be arrays"),
        (lambda: lj.unmerge_approximately(BASE, PART), "Expected the adapted leaves of `merged` to be arrays"),
        (lambda: lj.merge_report(BASE, PART, MERGED), "Expected the adapted leaves of `params` to be arrays"),
        (lambda: lj.merge_report(DENSE, PART, BASE), "Expected the adapted leaves of `merged` to be arrays"),
    ],
)
def test_a_quantized_leaf_is_a_merge_error(call: Any, text: str) -> None:
    with pytest.raises(lj.MergeError, match=re.escape(text)):
        call()


@pytest.mark.parametrize(("base", "tuned", "tree"), [(BASE, MERGED, "`base`"), (DENSE, BASE, "`tuned`")])
def test_extracting_from_a_quantized_leaf_names_both_choices(base: Any, tuned: Any, tree: str) -> None:
    with pytest.raises(lj.AdapterError, match=re.escape(f"NF4(axes='io'), in {tree}")) as error:
        lj.extract(base, tuned, {"up": lj.LoRA(rank=2, alpha=4)})
    assert "extract(original, tuned, spec)" in str(error.value) and "quant.dequantize" in str(error.value)


# Other functions of a base


@pytest.mark.parametrize("measure", [lj.analysis.relative_norms, lj.analysis.amplification, lj.analysis.intruders])
def test_analysis_measures_the_dequantized_kernel(measure: Any) -> None:
    assert_close(measure(BASE, PART), measure(DENSE, PART))


@pytest.mark.parametrize("name", ["DoRA", "Rows"])
def test_explain_counts_a_quantized_leaf_like_an_array(name: str) -> None:
    part = adapter(VARIANTS[name])
    found, expected = (lj.explain(apply, params, part, X, form="factored") for params in (BASE, DENSE))
    assert str(found) == str(expected)


def test_a_train_state_with_a_quantized_base_trains_the_adapter() -> None:
    state = lj.optim.train_state(lj.lora(apply), BASE, PART, optax.sgd(0.1))
    gradient = jax.grad(lambda tree: state.apply_fn(tree, X).sum(), allow_int=True)(state.params)
    state = state.apply_gradients(grads=gradient)
    assert not np.array_equal(state.params["adapter"]["up"].b, PART["up"].b)
    got, expected = jax.tree.leaves(state.params["base"]), jax.tree.leaves(BASE)
    assert all(
        one.dtype == other.dtype and np.array_equal(one, other) for one, other in zip(got, expected, strict=True)
    )


# Checkpoints


def test_a_checkpoint_belongs_to_its_quantized_base(tmp_path: Path) -> None:
    lj.save(tmp_path / "a", PART, base=BASE)
    assert_close(lj.restore(tmp_path / "a", base=quant.quantize(ORIGINAL, FORMATS)), PART)
    others = {
        "'up' is stored as an array; it was NF4(axes='io')": ORIGINAL,
        "'up' is stored as NF4(double=False, axes='io'); it was NF4(axes='io')": quant.quantize(
            ORIGINAL, FORMATS | {"up": quant.NF4(double=False)}
        ),
        "'up' has other values": quant.quantize(ORIGINAL | {"up": -ORIGINAL["up"]}, FORMATS),
        "'frozen' has other values": quant.quantize(ORIGINAL | {"frozen": 2 * ORIGINAL["frozen"]}, FORMATS),
    }
    for text, other in others.items():
        with pytest.raises(lj.CheckpointError, match=re.escape(text)):
            lj.restore(tmp_path / "a", base=other)
        assert_close(lj.restore(tmp_path / "a", base=other, allow_base_mismatch=True), PART)
    lj.save(tmp_path / "b", PART, base=DENSE)
    with pytest.raises(lj.CheckpointError, match=re.escape("'up' is stored as NF4(axes='io'); it was an array")):
        lj.restore(tmp_path / "b", base=BASE)


def test_a_checkpoint_of_a_quantized_base_known_by_shape_compares_the_format(tmp_path: Path) -> None:
    shapes = jax.eval_shape(lambda: BASE)
    lj.save(tmp_path / "a", PART, base=shapes)
    assert_close(lj.restore(tmp_path / "a", base=BASE), PART)
    with pytest.raises(lj.CheckpointError, match="it was NF4"):
        lj.restore(tmp_path / "a", base=DENSE)


# Formats of leaves, and quantizing again

LEAVES = {
    "NF4": ((64, 8), quant.NF4(axes="io")),
    "NF4, blocks of 16": ((2, 32, 8), quant.NF4(block=16, double=False, axes="oio")),
    "NF4, a stack": ((2, 64, 8), quant.NF4(axes="bio")),
    "NF4, two input axes": ((4, 16, 8), quant.NF4(axes="iio")),
    "NF4, a table": ((8, 64), quant.NF4(axes="oi")),
    "Int8": ((16, 4, 8), quant.Int8(axes="ioo")),
    "Float8": ((4, 8, 16), quant.Float8(axes="iio")),
}


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_knows_its_format(name: str) -> None:
    shape, form = LEAVES[name]
    leaf = quant.quantize({"w": normal(*shape)}, {"w": form})["w"]
    assert leaf.format == form
    assert leaf.storage == repr(form)


def test_a_leaf_of_another_origin_has_no_format() -> None:
    tiled = quant.ScaledLeaf(jnp.ones((8, 4), jnp.int8), jnp.ones((2, 4)), None, jnp.dtype(jnp.float32))
    assert tiled.format is None and tiled.storage == "ScaledLeaf"
    with pytest.raises(lj.SpecError, match=r"Expected leaves that a format of `lora_jax\.quant` made; 1 of 1 are not"):
        quant.requantize({"w": tiled}, {"w": jnp.ones((8, 4))})
    tree, report = quant.requantize({"w": tiled}, {"w": normal(8, 4)}, {"w": quant.Int8()})
    assert tree["w"].format == quant.Int8(axes="io") and report["w"].survived > 0.9


def test_requantizing_reports_how_much_of_the_update_is_left() -> None:
    tree, report = quant.requantize(BASE, MERGED)
    assert tree["down"] is MERGED["down"] and tree["frozen"] is BASE["frozen"] and list(report) == ["up"]
    assert tree["up"].format == BASE["up"].format
    update = np.asarray(MERGED["up"], np.float64) - np.asarray(DENSE["up"])
    left = np.asarray(quant.dequantize(tree)["up"], np.float64) - np.asarray(DENSE["up"])
    assert report["up"].survived == pytest.approx((left * update).sum() / (update**2).sum(), rel=1e-4)
    assert report["up"].error == pytest.approx(np.linalg.norm(left - update) / np.linalg.norm(update), rel=1e-4)


def test_small_updates_vanish_and_large_ones_survive() -> None:
    base = quant.quantize(ORIGINAL, {"up": quant.NF4()})
    survived = {}
    for size in (0.003, 0.3):
        merged = DENSE | {"up": DENSE["up"] + size * normal(64, 24, seed=9, size=0.1)}
        survived[size] = quant.requantize(base, merged)[1]["up"].survived
        finer = quant.requantize(base, merged, {"up": quant.Int8()})[1]["up"].survived
        assert finer > survived[size] - 0.05
    assert abs(survived[0.003]) < 0.1 and survived[0.3] > 0.8


def test_an_unchanged_leaf_is_not_quantized_again() -> None:
    tree, report = quant.requantize(BASE, DENSE)
    assert tree["up"] is BASE["up"] and tree["frozen"] is BASE["frozen"] and not report
    tree, report = quant.requantize(BASE, DENSE, {"up": quant.NF4(), "frozen": quant.Float8()})
    assert tree["up"] is BASE["up"] and tree["frozen"].format == quant.Float8(axes="io") and not report
    tree, report = quant.requantize(BASE, BASE)
    assert tree["up"] is BASE["up"] and not report


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_update_of_few_units_in_the_last_place_is_quantized_again(dtype: str) -> None:
    base = quant.quantize({"w": normal(64, 16).astype(dtype)}, {"w": quant.Int8()})
    part = lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=jnp.full((64, 1), 0.05), b=jnp.ones((1, 16)))
    tree, report = quant.requantize(base, lj.merge(quant.dequantize(base), {"w": part}))
    before, after = (quant.dequantize(leaves)["w"].astype(jnp.float32) for leaves in (base, tree))
    assert abs(float((after - before).mean()) - 0.05) < 0.002 and abs(report["w"].survived - 1) < 0.05


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["NF4", "Int8"])
def test_a_leaf_of_another_program_is_unchanged(name: str, dtype: str) -> None:
    base = quant.quantize({"w": normal(256, 64, size=0.02).astype(dtype)}, {"w": getattr(quant, name)()})
    with jax.disable_jit():
        dense = quant.dequantize(base)
    tree, report = quant.requantize(base, dense)
    assert tree["w"] is base["w"] and not report


def test_a_merged_leaf_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(lj.SpecError, match="Expected finite kernels; 1 of 2 contain NaN or infinity"):
        quant.requantize(BASE, DENSE | {"up": DENSE["up"].at[0, 0].set(jnp.nan)})


@pytest.mark.parametrize("name", ["NF4", "Int8"])
def test_leaves_in_host_memory_stay_there(name: str) -> None:
    params, spec = {"up": ORIGINAL["up"]}, {"up": getattr(quant, name)()}
    base, expected = quant.quantize(lj.sharding.to_host(params), spec), quant.quantize(params, spec)
    dense, plain = quant.dequantize(base), quant.dequantize(expected)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves((base, dense))} == {"pinned_host"}
    assert_close(jax.device_get(dense), jax.device_get(plain))
    tree, report = quant.requantize(base, dense)
    assert tree["up"] is base["up"] and not report
    tree, report = quant.requantize(base, lj.merge(dense, PART))
    assert report == quant.requantize(expected, lj.merge(plain, PART))[1]
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)} == {"pinned_host"}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: quant.requantize(MERGED, BASE), "Expected `base` to have quantized leaves"),
        (lambda: quant.requantize(BASE, {"up": MERGED["up"]}), "'down' is only in `base`"),
        (lambda: jax.jit(lambda tree: quant.requantize(BASE, tree)[0])(MERGED), "Call requantize outside `jit`"),
    ],
)
def test_requantizing_other_trees_is_an_error(call: Any, text: str) -> None:
    with pytest.raises(lj.MergeError, match=re.escape(text)):
        call()
